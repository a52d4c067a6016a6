//! From a pod of this node to the mesh: find the endpoint, choose the way, connect, relay.

mod balance;
mod connect;
mod path;
mod target;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::capture::{Accepted, Capture, EnrolledPod};
use crate::identity::Certificates;
use crate::mesh::{Endpoint, SharedSnapshot, Snapshot};
use crate::relay::{self, Peer};
use crate::telemetry::{
    Connection, ConnectionInfo, Direction, FailureReason, Party, Security, Telemetry,
};
use crate::tunnel::Pool;

use connect::{Connected, Failure, Origin, Upstream};
use target::{Target, target};

pub use balance::{Load, Loads};

/// Endpoints tried for one connection. Only a connect that failed is tried again, elsewhere: no
/// byte of the client has left by then.
const ENDPOINTS_TRIED: usize = 3;

/// Takes captured connections of this node's pods to where they want to go.
pub struct Outbound {
    snapshot: SharedSnapshot,
    certificates: Arc<Certificates>,
    pool: Arc<Pool>,
    telemetry: Arc<Telemetry>,
    loads: Arc<Loads>,
    /// Pods (by netns cookie) whose end is waited for, to close their tunnels with them.
    watched: Arc<Mutex<HashSet<u64>>>,
}

impl Outbound {
    /// Puts it together.
    #[must_use]
    pub fn new(
        snapshot: SharedSnapshot,
        certificates: Arc<Certificates>,
        pool: Arc<Pool>,
        telemetry: Arc<Telemetry>,
    ) -> Self {
        let (loads, watched) = (Arc::default(), Arc::default());
        Self {
            snapshot,
            certificates,
            pool,
            telemetry,
            loads,
            watched,
        }
    }

    /// Closes the pod's tunnels when it is gone: a pooled one would keep its network namespace
    /// alive.
    fn close_tunnels_with(&self, pod: &EnrolledPod) {
        let cookie = pod.netns_cookie();
        if !self.watched.lock().insert(cookie) {
            return;
        }
        let (gone, pool, watched) = (pod.gone().clone(), self.pool.clone(), self.watched.clone());
        tokio::spawn(async move {
            gone.cancelled().await;
            pool.close_source(cookie);
            watched.lock().remove(&cookie);
        });
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
        let _live = pod.track();
        let snapshot = self.snapshot.load_full();
        let target = target(&snapshot, local);
        let connection = self.open(&pod, peer, local, target.as_ref(), &snapshot);

        let connecting = self.connect(&pod, capture, &snapshot, (peer, local), target, &connection);
        let connected = tokio::select! {
            connected = connecting => connected,
            () = pod.gone().cancelled() => Err(Failure::new(FailureReason::PodGone, "the pod left the mesh")),
        };
        let Connected { upstream, load } = match connected {
            Ok(connected) => connected,
            Err(failure) => return connection.fail(failure.reason, &failure.detail),
        };
        connection.established();
        let bytes = connection.bytes().clone();
        let counts = (&*bytes).into();
        let ended = match upstream {
            Upstream::Socket(upstream) => {
                relay::relay_tcp(stream, upstream, counts, pod.gone()).await
            }
            Upstream::Tunnel(tunnel) => {
                let (send, receive) = (tunnel.send, tunnel.receive);
                relay::relay_tunnel(stream, Peer::Downstream, send, receive, counts, pod.gone())
                    .await
            }
        };
        drop(load);
        connection.close(ended.into());
    }

    /// Tries endpoints until one accepts, at most [`ENDPOINTS_TRIED`].
    async fn connect(
        &self,
        pod: &Arc<EnrolledPod>,
        capture: &Capture,
        snapshot: &Snapshot,
        (peer, local): (SocketAddr, SocketAddr),
        target: Option<Target>,
        connection: &Connection,
    ) -> Result<Connected, Failure> {
        let Some(target) = target else {
            return Err(Failure::new(
                FailureReason::NoRoute,
                "not a destination of the mesh",
            ));
        };
        let origin = Origin {
            peer,
            target: &target,
            connection,
        };
        let client = pod.workload();
        let mut tried: Vec<SocketAddr> = Vec::with_capacity(ENDPOINTS_TRIED);
        let mut last = None;
        while tried.len() < ENDPOINTS_TRIED {
            let usable = |endpoint: &Endpoint| {
                endpoint.ready
                    && client.has_family(endpoint.address)
                    && !tried.contains(&endpoint.address)
            };
            // A dual-stack Service lists every pod twice: once for each family.
            let same_family = |endpoint: &Endpoint| {
                endpoint.address.is_ipv4() == local.is_ipv4() && usable(endpoint)
            };
            let pick = |usable: &dyn Fn(&Endpoint) -> bool| {
                self.loads.pick(&target.endpoints, usable, &mut rand::rng())
            };
            let Some(endpoint) = pick(&same_family).or_else(|| pick(&usable)) else {
                break;
            };
            let load = self.loads.begin(endpoint.address);
            tried.push(endpoint.address);
            match self
                .connect_to(pod, capture, snapshot, &origin, endpoint)
                .await
            {
                Ok(upstream) => return Ok(Connected { upstream, load }),
                Err(failure) if failure.may_go_elsewhere() => last = Some(failure),
                Err(failure) => return Err(failure),
            }
        }
        Err(last.unwrap_or_else(|| {
            Failure::new(
                FailureReason::NoEndpoint,
                "no endpoint of the service is ready",
            )
        }))
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
            service: target.and_then(|target| target.service.clone()),
            security: Security::Unknown,
            original_destination: local,
        })
    }
}
