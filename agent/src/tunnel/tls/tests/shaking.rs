//! Handshakes: however their bytes come, and whom they let in.

use std::time::Duration;

use rustls::CertificateError;

use super::drip::Drip;
use super::*;

#[tokio::test]
async fn what_comes_together_with_the_handshake_is_not_lost() {
    // More than a record, so that some of it is sealed still when keys are handed over.
    let bytes = pattern(20_000);
    let (client, server) = certificates();
    let (near, mut relay_near) = duplex(PIPE);
    let (mut relay_far, far) = duplex(PIPE);
    let talk = async {
        let connector = TlsConnector::from(client.client.clone());
        let mut tls = connector.connect(name(), near).await.unwrap();
        tls.write_all(&bytes).await.unwrap();
        tls
    };
    // Holds back the client's last words of the handshake until there is more.
    let relay = async {
        let mut hello = vec![0; 64 * 1024];
        let length = relay_near.read(&mut hello).await.unwrap();
        relay_far.write_all(&hello[..length]).await.unwrap();
        let mut answer = vec![0; 64 * 1024];
        let length = relay_far.read(&mut answer).await.unwrap();
        relay_near.write_all(&answer[..length]).await.unwrap();
        let mut rest = Vec::new();
        while rest.len() < bytes.len() {
            relay_near.read_buf(&mut rest).await.unwrap();
        }
        relay_far.write_all(&rest).await.unwrap();
        (relay_near, relay_far)
    };
    let serve = async {
        let shaken = accept(server.server.clone(), far).await.unwrap();
        let mut stream = shaken.into_stream().unwrap();
        let mut got = vec![0; bytes.len()];
        stream.read_exact(&mut got).await.unwrap();
        got
    };
    let (_tls, _relay, got) = within(async { tokio::join!(talk, relay, serve) }).await;
    assert!(got == bytes);
}

#[tokio::test]
async fn a_request_for_new_keys_together_with_the_handshake_is_answered() {
    let (client, server) = certificates();
    let (near, mut relay_near) = duplex(PIPE);
    let (mut relay_far, far) = duplex(PIPE);
    let (held, wait) = tokio::sync::oneshot::channel();
    let talk = Box::pin(async {
        let connector = TlsConnector::from(client.client.clone());
        let mut tls = connector.connect(name(), near).await.unwrap();
        tls.get_mut().1.refresh_traffic_keys().unwrap();
        tls.write_all(b"under new keys").await.unwrap();
        held.send(()).unwrap();
        let mut answer = [0; 12];
        tls.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"so are these");
        tls
    });
    let relay = Box::pin(async {
        let mut bytes = vec![0; 64 * 1024];
        let length = relay_near.read(&mut bytes).await.unwrap();
        relay_far.write_all(&bytes[..length]).await.unwrap();
        let length = relay_far.read(&mut bytes).await.unwrap();
        relay_near.write_all(&bytes[..length]).await.unwrap();
        // The last words of the handshake, and what follows, at once.
        wait.await.unwrap();
        tokio::io::copy_bidirectional(&mut relay_near, &mut relay_far)
            .await
            .unwrap();
    });
    let serve = Box::pin(async {
        let shaken = accept(server.server.clone(), far).await.unwrap();
        let mut stream = shaken.into_stream().unwrap();
        let mut got = [0; 14];
        stream.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"under new keys");
        stream.write_all(b"so are these").await.unwrap();
        stream.flush().await.unwrap();
        stream
    });
    within(async {
        tokio::select! {
            () = relay => unreachable!("it goes on"),
            _ = async { tokio::join!(talk, serve) } => {}
        }
    })
    .await;
}

#[tokio::test]
async fn a_handshake_succeeds_however_its_bytes_are_cut() {
    let (client, server) = certificates();
    for at_once in [1, 2, 3, 4, 5, 6, 7, 64, 1000] {
        let (mut ours, mut theirs) = to_their_server_in_drips(at_once).await;
        carries(&mut ours, &mut theirs, b"to a server").await;

        let (near, far) = duplex(PIPE);
        let (ours, theirs) = within(async {
            tokio::join!(
                accept(server.server.clone(), Drip::new(near, at_once)),
                TlsConnector::from(client.client.clone()).connect(name(), far)
            )
        })
        .await;
        let mut ours = ours.unwrap().into_stream().unwrap();
        carries(&mut theirs.unwrap(), &mut ours, b"to a client").await;
    }
}

#[tokio::test]
async fn messages_of_a_handshake_may_span_many_records() {
    let (client, server) = certificates();
    let mut small_client = (*client.client).clone();
    small_client.max_fragment_size = Some(64);
    let mut small_server = (*server.server).clone();
    small_server.max_fragment_size = Some(64);
    let (mut ours, mut theirs) =
        to_their_server(client.client.clone(), Arc::new(small_server)).await;
    carries(&mut theirs, &mut ours, &pattern(10_000)).await;

    let (near, far) = duplex(PIPE);
    let (ours, theirs) = within(async {
        tokio::join!(
            accept(server.server.clone(), near),
            TlsConnector::from(Arc::new(small_client)).connect(name(), far)
        )
    })
    .await;
    let (mut ours, mut theirs) = (ours.unwrap().into_stream().unwrap(), theirs.unwrap());
    carries(&mut theirs, &mut ours, &pattern(10_000)).await;
}

/// What becomes of our server if a client says this and waits.
async fn said_to_a_server(bytes: &[u8]) -> io::Error {
    let (_, server) = certificates();
    let (near, mut far) = duplex(PIPE);
    far.write_all(bytes).await.unwrap();
    within(accept(server.server.clone(), near))
        .await
        .err()
        .unwrap()
}

#[tokio::test]
async fn what_is_no_handshake_is_refused_without_waiting_for_more_of_it() {
    // Its third to fifth bytes would be a record of 8 KiB.
    let error = said_to_a_server(b"GET / HTTP/1.1\r\n\r\n").await;
    let invalid = InvalidMessage::InvalidContentType;
    assert_eq!(*tls_error(&error), Error::InvalidMessage(invalid));
    // A record that is too long, of a hello that is too long.
    for head in [
        &[22, 3, 1, 0xff, 0xff][..],
        &[22, 3, 1, 0, 4, 1, 1, 0, 0],
        &[22, 3, 1, 0, 0],
        &[23, 3, 3, 0, 1, 1],
    ] {
        tls_error(&said_to_a_server(head).await);
    }
}

#[tokio::test]
async fn a_hello_without_end_is_refused_once_it_is_longer_than_any() {
    // A hello of 65,535 bytes, in records of one byte: five of head for each.
    let mut bytes = vec![22, 3, 1, 0, 4, 1, 0, 0xff, 0xff];
    for _ in 0..40_000 {
        bytes.extend_from_slice(&[22, 3, 1, 0, 1, 0]);
    }
    let invalid = InvalidMessage::HandshakePayloadTooLarge;
    let error = said_to_a_server(&bytes).await;
    assert_eq!(*tls_error(&error), Error::InvalidMessage(invalid));
}

#[tokio::test]
async fn an_end_in_the_middle_of_a_handshake_is_an_error() {
    let (client, server) = certificates();
    for held_back in [1, 100, 10_000] {
        let (near, mut far) = duplex(PIPE);
        let cut = async {
            let (mut inner, outer) = duplex(PIPE);
            let accepting = tokio::spawn(TlsAcceptor::from(server.server.clone()).accept(outer));
            let mut hello = vec![0; 64 * 1024];
            let length = far.read(&mut hello).await.unwrap();
            inner.write_all(&hello[..length]).await.unwrap();
            let length = inner.read(&mut hello).await.unwrap();
            let some = length.saturating_sub(held_back);
            far.write_all(&hello[..some]).await.unwrap();
            far.shutdown().await.unwrap();
            accepting.abort();
            far
        };
        let ours = connect(client.client.clone(), name(), near);
        let (ours, _) = within(async { tokio::join!(ours, cut) }).await;
        let kind = ours.err().unwrap().kind();
        assert_eq!(kind, io::ErrorKind::UnexpectedEof);
    }
}

/// What our server and a client say of each other.
async fn refusal(
    server: &WorkloadCertificate,
    client: ClientConfig,
) -> (io::Error, Option<io::Error>) {
    let (near, far) = duplex(PIPE);
    let talk = Box::pin(async {
        let mut tls = TlsConnector::from(Arc::new(client))
            .connect(name(), far)
            .await?;
        // In TLS 1.3 a client learns of it only now.
        tls.read_u8().await.map(|_| ())
    });
    let serve = Box::pin(async {
        let error = accept(server.server.clone(), near).await.err();
        error.unwrap()
    });
    let (served, talked) = within(async { tokio::join!(serve, talk) }).await;
    (served, talked.err())
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let (client, server) = certificates();
    let mut nobody = (*client.client).clone();
    nobody.client_auth_cert_resolver = Arc::new(Nobody);
    let (served, talked) = refusal(&server, nobody).await;
    assert_eq!(*tls_error(&served), Error::NoCertificatesPresented);
    let alert = AlertDescription::CertificateRequired;
    let told = talked.unwrap();
    assert_eq!(*tls_error(&told), Error::AlertReceived(alert));
}

#[derive(Debug)]
struct Nobody;

impl rustls::client::ResolvesClientCert for Nobody {
    fn resolve(
        &self,
        _: &[&[u8]],
        _: &[rustls::SignatureScheme],
    ) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn a_client_that_offers_other_protocols_only_is_refused() {
    let (client, server) = certificates();
    let mut other = (*client.client).clone();
    other.alpn_protocols = vec![b"http/1.1".to_vec()];
    let (served, talked) = refusal(&server, other).await;
    assert_eq!(*tls_error(&served), Error::NoApplicationProtocol);
    let alert = AlertDescription::NoApplicationProtocol;
    let told = talked.unwrap();
    assert_eq!(*tls_error(&told), Error::AlertReceived(alert));
}

#[tokio::test]
async fn a_certificate_that_has_expired_is_refused_by_either_side() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.certificate(CLIENT), mesh.certificate(SERVER));
    let expired = |error: &io::Error| {
        let Error::InvalidCertificate(why) = tls_error(error) else {
            return false;
        };
        matches!(
            why,
            CertificateError::Expired | CertificateError::ExpiredContext { .. }
        )
    };
    // Both are as good as they were: it is later for one side.
    let mut later_server = (*server.server).clone();
    later_server.time_provider = Arc::new(Later);
    let (near, far) = duplex(PIPE);
    let (ours, _) = within(async {
        tokio::join!(
            accept(Arc::new(later_server), near),
            TlsConnector::from(client.client.clone()).connect(name(), far)
        )
    })
    .await;
    assert!(expired(&ours.err().unwrap()));

    let mut later_client = (*client.client).clone();
    later_client.time_provider = Arc::new(Later);
    let (near, far) = duplex(PIPE);
    let (ours, theirs) = within(async {
        tokio::join!(
            connect(Arc::new(later_client), name(), near),
            TlsAcceptor::from(server.server.clone()).accept(far)
        )
    })
    .await;
    assert!(expired(&ours.err().unwrap()));
    let alert = AlertDescription::CertificateExpired;
    let told = theirs.err().unwrap();
    assert_eq!(*tls_error(&told), Error::AlertReceived(alert));
}

/// Two hours from now.
#[derive(Debug)]
struct Later;

impl rustls::time_provider::TimeProvider for Later {
    fn current_time(&self) -> Option<rustls::pki_types::UnixTime> {
        let now = rustls::pki_types::UnixTime::now().as_secs();
        let later = Duration::from_secs(now + 7200);
        Some(rustls::pki_types::UnixTime::since_unix_epoch(later))
    }
}

#[tokio::test]
async fn a_refused_handshake_tells_the_peer_why() {
    let (client, _) = certificates();
    let (_, stranger) = certificates();
    let (near, far) = duplex(PIPE);
    let (ours, theirs) = within(async {
        tokio::join!(
            connect(client.client.clone(), name(), near),
            TlsAcceptor::from(stranger.server.clone()).accept(far)
        )
    })
    .await;
    assert!(matches!(
        tls_error(&ours.err().unwrap()),
        Error::InvalidCertificate(_)
    ));
    assert!(matches!(
        tls_error(&theirs.err().unwrap()),
        Error::AlertReceived(_)
    ));
}
