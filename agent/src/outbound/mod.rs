//! From a pod of this node to the mesh: find the endpoint, choose the way, connect, relay.

mod clock;
mod connect;
mod destinations;
mod opaque;
mod path;
mod target;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::capture::{Accepted, Capture, EnrolledPod};
use crate::identity::Certificates;
use crate::mesh::{SharedSnapshot, Snapshot};
use crate::telemetry::{
    Connection, ConnectionInfo, Direction, FailureReason, Party, Security, Telemetry,
};
use crate::tunnel::Pool;

use connect::{Dialer, Failure};
use opaque::Origin;
use target::{Target, target};

pub use clock::Clock;
pub use destinations::{Destinations, EventReporter, maintain};

/// Takes captured connections of this node's pods to where they want to go.
pub struct Outbound {
    snapshot: SharedSnapshot,
    dialer: Dialer,
    destinations: Arc<Destinations>,
    telemetry: Arc<Telemetry>,
    tunnels: Arc<Pool>,
    /// Pods (by netns cookie) whose end is waited for, to clean up after them.
    watched: Arc<Mutex<HashSet<u64>>>,
}

impl Outbound {
    /// Puts it together.
    #[must_use]
    pub fn new(
        snapshot: SharedSnapshot,
        certificates: Arc<Certificates>,
        tunnels: Arc<Pool>,
        destinations: Arc<Destinations>,
        telemetry: Arc<Telemetry>,
    ) -> Self {
        Self {
            snapshot,
            dialer: Dialer::new(certificates, tunnels.clone()),
            destinations,
            telemetry,
            tunnels,
            watched: Arc::default(),
        }
    }

    /// Serves one captured connection to its end. Whatever fails before bytes flow resets it: a
    /// client whose connect succeeded must not take a FIN for an answer.
    pub async fn serve(&self, accepted: Accepted, capture: &Capture) {
        let Accepted {
            pod,
            stream,
            peer,
            local,
            ..
        } = accepted;
        self.clean_up_after(&pod);
        let snapshot = self.snapshot.load_full();
        let target = target(&snapshot, local);
        let connection = self.open(&pod, peer, local, target.as_ref(), &snapshot);
        let origin = Origin {
            pod: &pod,
            capture,
            snapshot: &snapshot,
            peer,
            local,
            connection: &connection,
        };
        let connecting = async {
            match &target {
                Some(target) => self.connect(&origin, target).await,
                None => Err(Failure::new(
                    FailureReason::NoRoute,
                    "not a destination of the mesh",
                )),
            }
        };
        let connected = tokio::select! {
            connected = connecting => connected,
            () = pod.gone().cancelled() => Err(Failure::new(FailureReason::PodGone, "the pod left the mesh")),
        };
        let connected = match connected {
            Ok(connected) => connected,
            Err(failure) => return connection.fail(failure.reason, &failure.detail),
        };
        connection.established();
        // A connection may outlive many a state of the mesh.
        drop((snapshot, target));
        let bytes = connection.bytes().clone();
        let ended = self.relay(stream, connected, &pod, &bytes).await;
        connection.close(ended.into());
    }

    /// Closes the pod's tunnels when it is gone, as a pooled one would keep its network namespace
    /// alive, and forgets what was kept for it alone.
    fn clean_up_after(&self, pod: &EnrolledPod) {
        let cookie = pod.netns_cookie();
        if !self.watched.lock().insert(cookie) {
            return;
        }
        let (gone, watched) = (pod.gone().clone(), self.watched.clone());
        let (tunnels, destinations) = (self.tunnels.clone(), self.destinations.clone());
        tokio::spawn(async move {
            gone.cancelled().await;
            tunnels.close_source(cookie);
            destinations.forget_source(cookie);
            watched.lock().remove(&cookie);
        });
    }

    fn open(
        &self,
        pod: &EnrolledPod,
        peer: SocketAddr,
        local: SocketAddr,
        target: Option<&Target>,
        snapshot: &Snapshot,
    ) -> Connection {
        let destination = snapshot.workload_at(local.ip()).map_or_else(
            || Party::unknown(local),
            |workload| Party::of(workload, local),
        );
        self.telemetry.open(ConnectionInfo {
            direction: Direction::Outbound,
            source: Party::of(&pod.workload(), peer),
            destination,
            service: target.and_then(Target::service).cloned(),
            security: Security::Unknown,
            original_destination: local,
        })
    }
}
