//! A tunnel that another agent opened to a pod, and the connections inside it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use super::Inbound;
use super::deliver::deliver;
use crate::capture::{Accepted, EnrolledPod};
use crate::mesh::{Mode, authorize};
use crate::relay::{Ended, Peer, relay_tunnel};
use crate::telemetry::{ConnectionInfo, Direction, FailureReason, Party, Security};
use crate::tunnel::{self, Incoming, Refusal, TunnelService};

/// How long a tunnel waits for its pod's first certificate, as right after enrolment.
const FIRST_CERTIFICATE: Duration = Duration::from_secs(5);

/// What serves the streams of one tunnel.
struct ToPod {
    inbound: Arc<Inbound>,
    pod: Arc<EnrolledPod>,
}

impl Inbound {
    /// Serves one tunnel to its end.
    pub async fn serve_tunnel(self: Arc<Self>, accepted: Accepted) {
        let Accepted {
            pod,
            stream,
            peer,
            local,
            ..
        } = accepted;
        let identity = pod.workload().identity.clone();
        let certificate = match self.certificates.ready(&identity, FIRST_CERTIFICATE).await {
            Ok(certificate) => certificate,
            Err(error) => {
                tracing::warn!(%peer, %local, %identity, %error, "tunnel refused: no certificate");
                return;
            }
        };
        let service = Arc::new(ToPod {
            inbound: self.clone(),
            pod: pod.clone(),
        });
        let drain = self.drain.child_token();
        let serving = tunnel::serve(stream, certificate, local, service, drain);
        let served = tokio::select! {
            served = serving => served,
            // Dropping the tunnel resets its streams and its socket.
            () = pod.gone().cancelled() => return,
        };
        if let Err(error) = served {
            tracing::info!(%peer, %local, %identity, %error, "tunnel ended");
        }
    }
}

impl TunnelService for ToPod {
    fn connect(&self, incoming: Incoming) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(serve_stream(
            self.inbound.clone(),
            self.pod.clone(),
            incoming,
        ))
    }
}

/// One CONNECT: authorized from the peer's certificate before the app is dialled, and answered
/// with 200 only once the app has accepted.
async fn serve_stream(inbound: Arc<Inbound>, pod: Arc<EnrolledPod>, incoming: Incoming) {
    let _live = pod.track();
    let workload = pod.workload();
    let app = incoming.authority;
    let connection = inbound.telemetry.open(ConnectionInfo {
        direction: Direction::Inbound,
        source: source(&inbound, &incoming),
        destination: Party::of(&workload, app),
        service: None,
        security: Security::MutualTls,
        original_destination: app,
    });
    let mode = workload.mode().unwrap_or(Mode::Permissive);
    if let Err(denied) = authorize(mode, Some(&incoming.peer)) {
        incoming.refuse(Refusal::Denied);
        return connection.fail(FailureReason::Denied, &denied);
    }
    let limit = inbound.snapshot.load().config().connect_timeout;
    let socket = match deliver(&pod, incoming.peer_address, app, limit).await {
        Ok(socket) => socket,
        Err(failure) => {
            incoming.refuse(Refusal::Unavailable);
            return connection.fail(failure.reason, &failure.detail);
        }
    };
    let (send, receive) = match incoming.accept(None) {
        Ok(halves) => halves,
        Err(_) => return connection.close(Ended::Reset(Peer::Downstream).into()),
    };
    connection.established();
    let bytes = connection.bytes().clone();
    let counts = (&*bytes).into();
    let ended = relay_tunnel(socket, Peer::Upstream, send, receive, counts, pod.gone()).await;
    connection.close(ended.into());
}

/// The peer by its certificate. Its pod's name is taken from the address only if the pod there has
/// that very identity: it labels, and decides nothing.
fn source(inbound: &Inbound, incoming: &Incoming) -> Party {
    let snapshot = inbound.snapshot.load();
    match snapshot.workload_at(incoming.peer_address.ip()) {
        Some(workload) if workload.identity == incoming.peer => {
            Party::of(workload, incoming.peer_address)
        }
        _ => Party::of_identity(&incoming.peer, incoming.peer_address),
    }
}
