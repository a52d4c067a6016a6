//! The CA's port: TLS handshakes and connections, both bounded, before gRPC sees anything.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use std::{fmt, io};

use parking_lot::Mutex;
use rustls::ServerConfig;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use super::signer::OwnKey;
use crate::identity::tls::{ALPN_H2, crypto_provider};

/// Most connections at once, those in their handshake included; more are closed at accept.
const MAX_CONNECTIONS: usize = 512;
/// Most connections from one address, so that no node can shut out the others.
const MAX_PER_ADDRESS: usize = 32;
/// Limit of a handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Pause after a failed accept, which is most often a lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// TLS for the CA's own port: TLS 1.3, h2, no client certificate (agents have none yet).
pub(super) fn tls_config(key: OwnKey) -> Result<Arc<ServerConfig>, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(crypto_provider())
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Own(key)));
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// Presents the key of the moment, whatever name is asked for.
struct Own(OwnKey);

impl fmt::Debug for Own {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Own")
    }
}

impl ResolvesServerCert for Own {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

/// Accepts until `stop`, and hands on what came through its handshake.
pub(super) async fn accept(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    accepted: mpsc::Sender<io::Result<Admitted>>,
    stop: CancellationToken,
) {
    let acceptor = TlsAcceptor::from(tls);
    let places = Arc::new(Places::default());
    loop {
        let (stream, peer) = tokio::select! {
            () = stop.cancelled() => return,
            connection = listener.accept() => match connection {
                Ok(connection) => connection,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        let Some(place) = places.clone().take(peer.ip()) else {
            tracing::warn!(%peer, "connection closed: too many are open");
            continue;
        };
        let (acceptor, accepted) = (acceptor.clone(), accepted.clone());
        let stop = stop.clone();
        tokio::spawn(async move {
            let handshake = timeout(HANDSHAKE, acceptor.accept(stream));
            let stream = tokio::select! {
                () = stop.cancelled() => return,
                stream = handshake => stream,
            };
            match stream {
                Ok(Ok(stream)) => {
                    let admitted = Admitted {
                        stream,
                        peer,
                        _place: place,
                    };
                    // Fails only when the server is gone already.
                    let _ = accepted.send(Ok(admitted)).await;
                }
                Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake failed"),
                Err(_) => tracing::debug!(%peer, "TLS handshake took too long"),
            }
        });
    }
}

/// Who holds how many connections.
#[derive(Default)]
struct Places(Mutex<HashMap<IpAddr, usize>>);

impl Places {
    fn take(self: Arc<Self>, address: IpAddr) -> Option<Place> {
        let mut held = self.0.lock();
        if held.values().sum::<usize>() >= MAX_CONNECTIONS {
            return None;
        }
        let own = held.entry(address).or_default();
        if *own >= MAX_PER_ADDRESS {
            return None;
        }
        *own += 1;
        drop(held);
        Some(Place {
            places: self,
            address,
        })
    }
}

/// One connection's place, given back when it ends.
struct Place {
    places: Arc<Places>,
    address: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.places.0.lock();
        if let Some(own) = held.get_mut(&self.address) {
            *own -= 1;
            if *own == 0 {
                held.remove(&self.address);
            }
        }
    }
}

/// A connection after its handshake.
pub(super) struct Admitted {
    stream: TlsStream<TcpStream>,
    peer: SocketAddr,
    _place: Place,
}

/// Where a request came from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer(pub(super) SocketAddr);

impl Connected for Admitted {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        Peer(self.peer)
    }
}

impl AsyncRead for Admitted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Admitted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_cannot_take_the_places_of_others() {
        let places = Arc::new(Places::default());
        let (one, two) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let mut held: Vec<_> = (0..MAX_PER_ADDRESS)
            .map(|_| places.clone().take(one).unwrap())
            .collect();
        assert!(places.clone().take(one).is_none());
        assert!(places.clone().take(two).is_some());
        held.pop();
        assert!(places.clone().take(one).is_some());
        drop(held);
        assert!(places.0.lock().is_empty(), "nothing is remembered");
    }

    #[test]
    fn all_addresses_together_are_bounded() {
        let places = Arc::new(Places::default());
        let held: Vec<_> = (0..MAX_CONNECTIONS)
            .map(|n| {
                let address = IpAddr::from([10, 0, (n / 256) as u8, (n % 256) as u8]);
                places.clone().take(address).unwrap()
            })
            .collect();
        assert!(places.clone().take(IpAddr::from([10, 1, 0, 0])).is_none());
        assert_eq!(held.len(), MAX_CONNECTIONS);
    }
}
