//! What a connection to an app speaks.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;

use crate::http::{Hint, HttpIo, Protocol, Wire, detect, detect_tunnel, hint};
use crate::mesh::{Snapshot, Workload};

/// How long a client that has said nothing that can be told apart is waited for, where no hint says
/// what it speaks and the mesh sets nothing else. An app that speaks first ends the wait at once, so
/// only a client that is slow with its very first bytes is affected: it is served as an opaque stream.
/// Longer than at the client's side, as those bytes may have a whole round trip of the network behind
/// the answer to CONNECT, and a lost one as much as a retransmission; and nobody waits for it.
const SILENCE: Duration = Duration::from_secs(1);

/// What the Services in front of a pod's port say about it, else the port's own name.
pub(super) fn hint_for(snapshot: &Snapshot, workload: &Workload, app: SocketAddr) -> Hint {
    if snapshot.is_opaque(workload, app) {
        return Hint::Opaque;
    }
    let services = snapshot.services_of(&workload.uid);
    let of_service = services
        .iter()
        .flat_map(|service| &service.ports)
        .filter(|port| port.endpoints.iter().any(|one| one.address == app))
        .map(|port| hint(port.app_protocol.as_deref(), &port.name, false))
        .find(|hint| *hint != Hint::None);
    of_service.unwrap_or_else(|| hint(None, workload.port_name(app.port()), false))
}

/// Which HTTP a client speaks to an app; none if it is something else, or nobody can tell. An error
/// is the client's connection's. `silence` is what the mesh sets for detection.
pub(super) async fn recognize(
    client: &mut HttpIo,
    app: &TcpStream,
    hint: Hint,
    silence: Option<Duration>,
) -> std::io::Result<Option<Wire>> {
    let silence = silence.unwrap_or(SILENCE);
    let looking = async {
        match client {
            HttpIo::Socket(socket) => detect(socket, hint, silence).await,
            HttpIo::Tunnel(tunnel) => detect_tunnel(tunnel, hint, silence).await,
        }
    };
    let protocol = tokio::select! {
        biased;
        protocol = looking => protocol?,
        // It speaks first, or has gone: no server of HTTP does so.
        _ = app.readable() => return Ok(None),
    };
    Ok(match protocol {
        Protocol::Http1 => Some(Wire::Http1),
        Protocol::Http2 => Some(Wire::Http2),
        Protocol::Tls { .. } | Protocol::Opaque => None,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;
    use crate::mesh::{Endpoint, ObjectName, Service, ServicePort};
    use crate::telemetry::testing::workload;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
        (near.unwrap(), far.unwrap().0)
    }

    #[tokio::test]
    async fn an_app_that_speaks_first_is_not_kept_waiting_for() {
        let (_client, accepted) = pair().await;
        let (near_app, mut app) = pair().await;
        app.write_all(b"220 ready\r\n").await.unwrap();
        let before = std::time::Instant::now();
        let wire = recognize(&mut accepted.into(), &near_app, Hint::None, None).await;
        assert_eq!(wire.unwrap(), None);
        assert!(before.elapsed() < SILENCE / 2);
    }

    #[tokio::test]
    async fn a_client_that_speaks_http_is_recognized() {
        let (mut client, accepted) = pair().await;
        let (near_app, _app) = pair().await;
        client.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        let wire = recognize(&mut accepted.into(), &near_app, Hint::None, None).await;
        assert_eq!(wire.unwrap(), Some(Wire::Http1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_is_silent_is_waited_for_as_long_as_the_mesh_says() {
        for (set, expected) in [
            (None, SILENCE),
            (Some(Duration::from_secs(5)), Duration::from_secs(5)),
        ] {
            let (_client, accepted) = pair().await;
            let (near_app, _app) = pair().await;
            let before = tokio::time::Instant::now();
            let wire = recognize(&mut accepted.into(), &near_app, Hint::None, set).await;
            assert_eq!(wire.unwrap(), None);
            let waited = before.elapsed();
            assert!(
                (expected..expected + SILENCE / 2).contains(&waited),
                "{waited:?}"
            );
        }
    }

    fn in_front(cart: &Workload, name: &str, opaque: bool, app: SocketAddr) -> Arc<Service> {
        let endpoint = Endpoint {
            address: app,
            readiness: crate::mesh::Readiness::Ready,
            workload: Some(cart.uid.clone()),
        };
        Arc::new(Service {
            name: ObjectName::new("shop", name),
            vips: Vec::new(),
            ports: vec![ServicePort {
                name: "db".into(),
                port: 80,
                app_protocol: Some(name.into()),
                opaque,
                endpoints: Arc::new([endpoint]),
            }],
        })
    }

    #[test]
    fn a_services_word_on_a_port_comes_before_the_pods_own() {
        let mut snapshot = Snapshot::default();
        let mut cart = (*workload("cart", "10.0.0.2")).clone();
        cart.named_ports.insert("http-api".to_owned(), 8080);
        let cart = Arc::new(cart);
        snapshot.insert_workload(cart.clone());
        let app = "10.0.0.2:8080".parse().unwrap();
        assert_eq!(hint_for(&snapshot, &cart, app), Hint::Http);
        snapshot.insert_service(in_front(&cart, "tcp", false, app));
        assert_eq!(hint_for(&snapshot, &cart, app), Hint::Opaque);
        let other = "10.0.0.2:9090".parse().unwrap();
        assert_eq!(hint_for(&snapshot, &cart, other), Hint::None);
    }

    #[test]
    fn a_port_that_its_pod_or_one_of_its_services_calls_opaque_is_not_looked_into() {
        let mut snapshot = Snapshot::default();
        let mut cart = (*workload("cart", "10.0.0.2")).clone();
        cart.named_ports.insert("http-api".to_owned(), 8080);
        cart.opaque_ports = "9000-9100".parse().unwrap();
        let cart = Arc::new(cart);
        snapshot.insert_workload(cart.clone());
        let at = |port: u16| SocketAddr::from(([10, 0, 0, 2], port));
        assert_eq!(hint_for(&snapshot, &cart, at(9050)), Hint::Opaque);
        snapshot.insert_service(in_front(&cart, "http", false, at(8080)));
        assert_eq!(hint_for(&snapshot, &cart, at(8080)), Hint::Http);
        snapshot.insert_service(in_front(&cart, "grpc", true, at(8080)));
        assert_eq!(hint_for(&snapshot, &cart, at(8080)), Hint::Opaque);
        assert_eq!(hint_for(&snapshot, &cart, at(8081)), Hint::None);
    }
}
