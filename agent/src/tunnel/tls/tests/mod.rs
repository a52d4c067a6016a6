//! Against rustls' own streams, on the other side of a pipe.

mod blocked;
mod drip;
mod floods;
mod openssl;
mod records;
mod shaking;
mod stirred;

use std::pin::pin;
use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use self::drip::Drip;
use super::handshake::Shaken;
use super::records::{HEAD, MAX_PLAIN};
use super::*;
use crate::identity::WorkloadCertificate;
use crate::tunnel::limits::TLS_BUFFER;
use crate::tunnel::tests::{CLIENT, Mesh, SERVER, within};

type Ours = TlsStream<DuplexStream>;
type TheirServer = tokio_rustls::server::TlsStream<DuplexStream>;
type TheirClient = tokio_rustls::client::TlsStream<DuplexStream>;

const PIPE: usize = 1 << 20;

fn name() -> ServerName<'static> {
    ServerName::try_from("10.0.0.1").unwrap()
}

/// Two that trust each other.
fn certificates() -> (Arc<WorkloadCertificate>, Arc<WorkloadCertificate>) {
    let mesh = Mesh::new();
    (mesh.certificate(CLIENT), mesh.certificate(SERVER))
}

async fn to_their_server(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
) -> (Ours, TheirServer) {
    to_their_server_by(|near| near, client, server).await
}

/// The same, by another transport at our end.
async fn to_their_server_by<T: AsyncRead + AsyncWrite + Unpin>(
    transport: impl FnOnce(DuplexStream) -> T,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
) -> (TlsStream<T>, TheirServer) {
    let (near, far) = duplex(PIPE);
    let (ours, theirs) = within(async {
        tokio::join!(
            connect(client, name(), transport(near)),
            TlsAcceptor::from(server).accept(far)
        )
    })
    .await;
    (ours.unwrap().into_stream().unwrap(), theirs.unwrap())
}

/// The same, a few bytes at a time.
async fn to_their_server_in_drips(at_once: usize) -> (TlsStream<Drip<DuplexStream>>, TheirServer) {
    let (client, server) = certificates();
    let drip = |near| Drip::new(near, at_once);
    to_their_server_by(drip, client.client.clone(), server.server.clone()).await
}

async fn to_their_client() -> (Ours, TheirClient) {
    let (client, server) = certificates();
    let (near, far) = duplex(PIPE);
    let (ours, theirs) = within(async {
        tokio::join!(
            accept(server.server.clone(), near),
            TlsConnector::from(client.client.clone()).connect(name(), far)
        )
    })
    .await;
    (ours.unwrap().into_stream().unwrap(), theirs.unwrap())
}

async fn pair() -> (Ours, TheirServer) {
    let (client, server) = certificates();
    to_their_server(client.client.clone(), server.server.clone()).await
}

/// Two of ours.
async fn both() -> (
    Shaken<UnbufferedClientConnection, DuplexStream>,
    Shaken<UnbufferedServerConnection, DuplexStream>,
) {
    let (client, server) = certificates();
    let (near, far) = duplex(PIPE);
    let (ours, theirs) = within(async {
        tokio::join!(
            connect(client.client.clone(), name(), near),
            accept(server.server.clone(), far)
        )
    })
    .await;
    (ours.unwrap(), theirs.unwrap())
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n % 251) as u8).collect()
}

/// What one writes, the other reads.
async fn carries<A, B>(from: &mut A, to: &mut B, bytes: &[u8])
where
    A: AsyncWrite + Unpin,
    B: AsyncRead + Unpin,
{
    let mut got = vec![0; bytes.len()];
    let write = async {
        from.write_all(bytes).await.unwrap();
        from.flush().await.unwrap();
    };
    within(async { tokio::join!(write, to.read_exact(&mut got)) })
        .await
        .1
        .unwrap();
    assert!(got == bytes);
}

fn tls_error(error: &io::Error) -> &Error {
    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
    error.get_ref().unwrap().downcast_ref().unwrap()
}

/// Two streams of ours, the client's first.
async fn streams() -> (Ours, Ours) {
    let (client, server) = both().await;
    (client.into_stream().unwrap(), server.into_stream().unwrap())
}

/// Seals a record that this side would never send.
fn seal(stream: &mut Ours, typ: ContentType, payload: &[u8]) -> Vec<u8> {
    stream.outgoing.seal_for_test(typ, payload)
}

#[tokio::test]
async fn bytes_of_all_lengths_pass_between_it_and_rustls_in_either_role() {
    let (mut client, mut their_server) = pair().await;
    let (mut server, mut their_client) = to_their_client().await;
    for length in [1, 100, MAX_PLAIN, MAX_PLAIN + 1, TLS_BUFFER + 77, 3_000_017] {
        let bytes = pattern(length);
        carries(&mut client, &mut their_server, &bytes).await;
        carries(&mut their_server, &mut client, &bytes).await;
        carries(&mut server, &mut their_client, &bytes).await;
        carries(&mut their_client, &mut server, &bytes).await;
    }
}

#[tokio::test]
async fn both_sides_know_each_other_before_they_talk() {
    let (client, server) = both().await;
    assert_eq!(client.session().alpn_protocol(), Some(&b"h2"[..]));
    assert_eq!(client.session().peer_certificates().unwrap().len(), 1);
    assert_eq!(server.session().peer_certificates().unwrap().len(), 1);
    let (mut client, mut server) = (client.into_stream().unwrap(), server.into_stream().unwrap());
    carries(&mut client, &mut server, &pattern(100_000)).await;
    carries(&mut server, &mut client, &pattern(100_000)).await;
}

#[tokio::test]
async fn a_peer_may_update_its_keys_and_ask_for_ours() {
    let (mut ours, mut theirs) = pair().await;
    for round in 0..100 {
        let bytes = pattern(1000 + round);
        // It asks for ours as well.
        theirs.get_mut().1.refresh_traffic_keys().unwrap();
        carries(&mut theirs, &mut ours, &bytes).await;
        carries(&mut ours, &mut theirs, &bytes).await;
    }
}

#[tokio::test]
async fn keys_that_sealed_as_much_as_they_may_are_replaced_by_both_sides() {
    let (mut ours, mut theirs) = pair().await;
    // For the first keys: those that follow have the cipher's own limit.
    ours.outgoing.limit_to(4);
    for _ in 0..5 {
        carries(&mut ours, &mut theirs, b"a record").await;
        // Its answer to our KeyUpdate is under its old keys, and what follows under new ones.
        carries(&mut theirs, &mut ours, b"a record").await;
    }
    assert!(!ours.outgoing.is_limited(), "the keys were replaced");
}

#[tokio::test]
async fn the_end_is_in_order_only_with_close_notify() {
    let (mut ours, mut theirs) = pair().await;
    theirs.write_all(b"last").await.unwrap();
    theirs.shutdown().await.unwrap();
    let mut last = Vec::new();
    within(ours.read_to_end(&mut last)).await.unwrap();
    assert_eq!(last, b"last");
    // And ours is one for rustls.
    ours.write_all(b"and ours").await.unwrap();
    ours.shutdown().await.unwrap();
    within(theirs.read_to_end(&mut last)).await.unwrap();
    assert_eq!(last, b"lastand ours");
    let error = ours.write_all(b"more").await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);

    let (mut ours, theirs) = pair().await;
    let (mut theirs, _) = theirs.into_inner();
    // Half a record, and no more.
    let record = seal(&mut ours, ContentType::ApplicationData, b"half");
    theirs.write_all(&record[..10]).await.unwrap();
    drop(theirs);
    let error = within(ours.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[tokio::test]
async fn a_record_that_was_tampered_with_ends_it_and_the_peer_is_told() {
    let (client, server) = both().await;
    let (mut client, mut server) = (client.into_stream().unwrap(), server.into_stream().unwrap());
    let good = seal(&mut client, ContentType::ApplicationData, b"good");
    let mut bad = seal(&mut client, ContentType::ApplicationData, b"bad");
    *bad.last_mut().unwrap() ^= 1;
    client.io.write_all(&[good, bad].concat()).await.unwrap();
    let mut got = [0; 100];
    // What came before is good.
    assert_eq!(within(server.read(&mut got)).await.unwrap(), 4);
    for _ in 0..2 {
        let error = within(server.read(&mut got)).await.unwrap_err();
        assert_eq!(*tls_error(&error), Error::DecryptError);
    }
    let error = within(client.read_u8()).await.unwrap_err();
    let alert = AlertDescription::BadRecordMac;
    assert_eq!(*tls_error(&error), Error::AlertReceived(alert));
    assert!(server.write_all(b"more").await.is_err());
}

#[tokio::test]
async fn nothing_is_shown_of_a_stream_that_the_peer_calls_broken() {
    let (mut ours, mut theirs) = pair().await;
    ours.io.write_all(&[23, 3, 3, 0, 1, 7]).await.unwrap();
    assert!(within(theirs.read_u8()).await.is_err());
    let error = within(ours.read_u8()).await.unwrap_err();
    let alert = AlertDescription::BadRecordMac;
    assert_eq!(*tls_error(&error), Error::AlertReceived(alert));
}

#[tokio::test]
async fn tickets_of_another_implementation_are_taken_and_forgotten() {
    let (client, server) = certificates();
    let mut generous = (*server.server).clone();
    generous.send_tls13_tickets = 4;
    generous.session_storage = rustls::server::ServerSessionMemoryCache::new(8);
    let (mut ours, mut theirs) = to_their_server(client.client.clone(), Arc::new(generous)).await;
    carries(&mut theirs, &mut ours, &pattern(50_000)).await;
    carries(&mut ours, &mut theirs, &pattern(50_000)).await;
}
