//! A tunnel that another agent opened to a pod, and the connections inside it.

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use super::deliver::deliver;
use super::talk::Talk;
use super::{Caller, Inbound};
use crate::capture::{Accepted, EnrolledPod, Task, in_parts};
use crate::mesh::{Mode, Snapshot, SpiffeId, authorize};
use crate::relay::{Ended, Peer};
use crate::telemetry::{ConnectionInfo, Direction, FailureReason, Party, Security};
use crate::tunnel::{self, Incoming, Refusal, TunnelError, TunnelIo, TunnelService};

/// How long a tunnel waits for its pod's first certificate, as right after enrolment: less than
/// the peer waits for the handshake, so that it learns of a refusal.
const FIRST_CERTIFICATE: Duration = Duration::from_secs(4);

/// What serves the streams of one tunnel.
struct ToPod {
    inbound: Arc<Inbound>,
    pod: Arc<EnrolledPod>,
}

impl Inbound {
    /// A peer of whom the certificate is known.
    pub(super) fn party(&self, peer: &SpiffeId, address: SocketAddr) -> Party {
        source(&self.snapshot.load(), peer, address)
    }

    /// Serves one tunnel to its end.
    pub async fn serve_tunnel(self: Arc<Self>, accepted: Accepted) {
        let Accepted {
            pod,
            stream,
            peer,
            local,
            ..
        } = accepted;
        let workload = pod.workload();
        let identity = &workload.identity;
        // What is refused before it says who it is counts as a connection that failed.
        let refuse = |reason, error: &dyn fmt::Display| {
            let connection = self.telemetry.open(ConnectionInfo {
                direction: Direction::Inbound,
                source: Party::unknown(peer),
                destination: Party::of(&workload, local),
                service: None,
                security: Security::Unknown,
                original_destination: local,
            });
            connection.fail(reason, error);
        };
        let certificate = match self.certificates.ready(identity, FIRST_CERTIFICATE).await {
            Ok(certificate) => certificate,
            Err(error) => return refuse(FailureReason::NoCertificate, &error),
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
            match refusal(&error) {
                Some(reason) => refuse(reason, &error),
                None => tracing::info!(%peer, %local, %identity, %error, "tunnel ended"),
            }
        }
    }
}

/// Why a peer did not get as far as a tunnel; none if it did, and the tunnel ended later.
fn refusal(error: &TunnelError) -> Option<FailureReason> {
    match error {
        TunnelError::Tls { .. } | TunnelError::Protocol { .. } | TunnelError::Timeout { .. } => {
            Some(FailureReason::Tls)
        }
        TunnelError::PeerCertificate { .. } | TunnelError::PeerIdentity { .. } => {
            Some(FailureReason::PeerIdentity)
        }
        TunnelError::Dial { .. }
        | TunnelError::Refused { .. }
        | TunnelError::Broken { .. }
        | TunnelError::Saturated { .. }
        | TunnelError::SourceGone
        | TunnelError::Silent { .. }
        | TunnelError::Flood { .. } => None,
    }
}

impl TunnelService for ToPod {
    fn connect(&self, incoming: Incoming) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let setup = serve_stream(self.inbound.clone(), self.pod.clone(), incoming);
        Box::pin(in_parts(Box::pin(setup)))
    }
}

/// One CONNECT: authorized from the peer's certificate before the app is dialled, and answered
/// with 200 only once the app has accepted. What it gives back serves the connection to its end.
async fn serve_stream(
    inbound: Arc<Inbound>,
    pod: Arc<EnrolledPod>,
    incoming: Incoming,
) -> Option<Task> {
    let workload = pod.workload();
    let app = incoming.authority;
    let connection = inbound.telemetry.open(ConnectionInfo {
        direction: Direction::Inbound,
        source: inbound.party(&incoming.peer, incoming.peer_address),
        destination: Party::of(&workload, app),
        service: None,
        security: Security::MutualTls,
        original_destination: app,
    });
    let live = match pod.admit() {
        Ok(live) => live,
        Err(full) => {
            incoming.refuse(Refusal::Unavailable);
            connection.fail(FailureReason::Overload, &full);
            return None;
        }
    };
    let mode = workload.mode().unwrap_or(Mode::Permissive);
    if let Err(denied) = authorize(mode, Some(&incoming.peer)) {
        incoming.refuse(Refusal::Denied);
        connection.fail(FailureReason::Denied, &denied);
        return None;
    }
    // There is no other app, and whoever asks gives up when it likes.
    let limit = inbound.snapshot.load().config().last_connect_limit();
    let socket = match deliver(&pod, incoming.peer_address, app, limit).await {
        Ok(socket) => socket,
        Err(failure) => {
            incoming.refuse(Refusal::Unavailable);
            connection.fail(failure.reason, &failure.detail);
            return None;
        }
    };
    let caller = Caller {
        identity: Some(incoming.peer.clone()),
        address: incoming.peer_address,
    };
    let (send, receive) = match incoming.accept(None) {
        Ok(halves) => halves,
        Err(_) => {
            connection.close(Ended::Reset(Peer::Downstream).into());
            return None;
        }
    };
    connection.established();
    let talk = Talk {
        pod,
        caller,
        app,
        security: Security::MutualTls,
        limit,
        connection,
        live: Some(live),
    };
    let client = TunnelIo::new(send, receive).into();
    inbound.talk(talk, client, socket).await
}

/// The peer by its certificate. Its pod's name is taken from the address only if the pod there has
/// that very identity: it labels, and decides nothing.
fn source(snapshot: &Snapshot, peer: &SpiffeId, address: SocketAddr) -> Party {
    match snapshot.workload_at(address.ip()) {
        Some(workload) if workload.identity == *peer => Party::of(workload, address),
        _ => Party::of_identity(peer, address),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::testing::workload;

    #[test]
    fn a_peers_address_names_its_pod_only_if_that_has_the_peers_identity() {
        let web = workload("web", "10.0.0.1");
        let mut snapshot = Snapshot::default();
        snapshot.insert_workload(web.clone());
        snapshot.insert_workload(workload("cart", "10.0.0.2"));
        let from = |address: &str| source(&snapshot, &web.identity, address.parse().unwrap());

        assert_eq!(from("10.0.0.1:1").pod(), Some(&web.name));
        // The address was another pod's a moment ago, or is nobody's.
        for address in ["10.0.0.2:1", "10.0.0.9:1"] {
            let party = from(address);
            assert_eq!(party.pod(), None);
            assert_eq!(party.identity(), Some(&web.identity));
        }
    }
}
