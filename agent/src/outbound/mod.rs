//! From a pod of this node to the mesh: find what was dialled, see what is spoken, and bring each
//! request, or the connection, to an endpoint.

mod clock;
mod connect;
mod destinations;
mod http;
mod opaque;
mod path;
mod target;
mod tries;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::capture::{Accepted, Capture, EnrolledPod, Task};
use crate::fairness::Quotas;
use crate::http::{
    ClientView, HttpCounters, PoolLimits, Protocol, ServerContext, ServerLimits, UpstreamPool,
    Wire, detect, serve_http,
};
use crate::identity::Certificates;
use crate::mesh::{SharedSnapshot, Snapshot};
use crate::resilience::ejection::SourceId;
use crate::telemetry::{
    Connection, ConnectionInfo, Direction, End, FailureReason, Party, Security, Side, Telemetry,
};
use crate::tunnel::Pool;

use connect::{Dialer, Failure, Way};
use http::{Caller, Client, Engine, Frontend, PodNetwork};
use opaque::Origin;
use target::{Target, target};

pub use clock::Clock;
pub use destinations::Destinations;

/// How often destinations are looked after that nobody asks.
const MAINTENANCE: Duration = Duration::from_secs(1);

/// How long a client may be silent before it is taken for one whose server speaks first, where the
/// port does not say what is spoken and the mesh sets nothing else. Here the client and nobody else
/// is on the same machine, so it is short, and all that it delays is servers that speak first.
const SILENCE: Duration = Duration::from_millis(200);

/// Takes captured connections of this node's pods to where they want to go.
pub struct Outbound {
    snapshot: SharedSnapshot,
    dialer: Dialer,
    destinations: Arc<Destinations>,
    engine: Arc<Engine>,
    upstreams: Arc<UpstreamPool>,
    limits: ServerLimits,
    counters: Arc<HttpCounters>,
    telemetry: Arc<Telemetry>,
    tunnels: Arc<Pool>,
    quotas: Arc<Quotas>,
    /// Cancelled when the agent stops: HTTP connections then end with their next answers.
    drain: CancellationToken,
    /// Pods (by netns cookie) whose end is waited for, to clean up after them.
    watched: Mutex<HashSet<u64>>,
}

/// What outbound connections are made with.
pub struct OutboundParts {
    /// The mesh.
    pub snapshot: SharedSnapshot,
    /// Identities of the pods.
    pub certificates: Arc<Certificates>,
    /// Tunnels to other nodes.
    pub tunnels: Arc<Pool>,
    /// What is known of destinations.
    pub destinations: Arc<Destinations>,
    /// What HTTP's guards refuse is counted here.
    pub counters: Arc<HttpCounters>,
    /// Connections and requests are told of here.
    pub telemetry: Arc<Telemetry>,
    /// What requests of one pod may hold.
    pub quotas: Arc<Quotas>,
    /// Cancelled when the agent stops.
    pub drain: CancellationToken,
}

impl Outbound {
    /// Puts it together, on a tokio runtime.
    #[must_use]
    pub fn new(parts: OutboundParts) -> Arc<Self> {
        let upstreams = UpstreamPool::new(PoolLimits::default());
        Arc::new(Self {
            engine: Engine::new(
                parts.snapshot.clone(),
                parts.destinations.clone(),
                upstreams.clone(),
            ),
            quotas: parts.quotas,
            dialer: Dialer::new(parts.certificates, parts.tunnels.clone()),
            snapshot: parts.snapshot,
            destinations: parts.destinations,
            upstreams,
            limits: ServerLimits::default(),
            counters: parts.counters,
            telemetry: parts.telemetry,
            tunnels: parts.tunnels,
            drain: parts.drain,
            watched: Mutex::default(),
        })
    }

    /// The connections that are kept for HTTP requests.
    #[must_use]
    pub fn upstreams(&self) -> &Arc<UpstreamPool> {
        &self.upstreams
    }

    /// Looks after destinations until `stop`.
    pub async fn maintain(self: Arc<Self>, stop: CancellationToken) {
        let mut timer = tokio::time::interval(MAINTENANCE);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while stop.run_until_cancelled(timer.tick()).await.is_some() {
            for endpoint in self.destinations.maintain() {
                self.upstreams.close_endpoint(endpoint);
            }
        }
    }

    /// Sets one captured connection up; what it gives back serves it to its end. Whatever fails before bytes flow
    /// resets it: a client whose connect succeeded must not take a FIN for an answer.
    pub async fn serve(self: Arc<Self>, accepted: Accepted, capture: Arc<Capture>) -> Option<Task> {
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
        let Some(target) = target else {
            connection.fail(FailureReason::NoRoute, &"not a destination of the mesh");
            return None;
        };
        let silence = snapshot.config().detection_timeout.unwrap_or(SILENCE);
        let protocol = tokio::select! {
            protocol = detect(&stream, target.hint(&snapshot), silence) => protocol,
            () = pod.gone().cancelled() => Ok(Protocol::Opaque),
        };
        let origin = Origin {
            pod,
            capture,
            peer,
            local,
            target,
            connection,
        };
        let sni = match protocol {
            Ok(Protocol::Http1) => {
                return Some(Box::pin(self.serve_http(origin, stream, Wire::Http1)));
            }
            Ok(Protocol::Http2) => {
                return Some(Box::pin(self.serve_http(origin, stream, Wire::Http2)));
            }
            Ok(Protocol::Tls { sni }) => sni,
            Ok(Protocol::Opaque) => None,
            Err(_) => {
                origin.connection.close(End::Reset { by: Side::Source });
                return None;
            }
        };
        self.serve_opaque(origin, snapshot, stream, sni.as_deref())
            .await
    }

    /// Serves requests, each for itself, until the connection ends.
    async fn serve_http(self: Arc<Self>, origin: Origin, stream: TcpStream, wire: Wire) {
        let Origin {
            pod,
            capture,
            peer,
            local,
            target,
            connection,
        } = origin;
        let workload = pod.workload();
        let source = Party::of(&workload, peer);
        let requester =
            self.telemetry
                .requester(Direction::Outbound, source, local, connection.id());
        let (reached, mut first) = oneshot::channel();
        let network = PodNetwork {
            outbound: self.clone(),
            pod: pod.clone(),
            capture,
            peer,
            reached: Mutex::new(Some(reached)),
        };
        let refused = requester.clone();
        let caller = Caller {
            workload,
            source: SourceId(pod.netns_cookie()),
            quota: self.quotas.of(pod.netns_cookie()),
            local,
            frontend: Frontend::from(target),
            view: ClientView {
                address: peer.ip(),
                side: crate::http::Side::Source,
            },
            requester,
        };
        let client = Client::new(self.engine.clone(), network, caller);
        let context = ServerContext {
            limits: &self.limits,
            counters: &self.counters,
            bytes: connection.bytes().clone(),
            requester: Some(refused),
        };
        let service = move |request| client.clone().serve(request);
        let drain = self.drain.child_token();
        let stop = pod.gone();
        let mut serving = pin!(serve_http(
            stream.into(),
            wire,
            context,
            service,
            &drain,
            stop
        ));
        let mut leaving = pin!(pod.leaving().cancelled());
        let (mut is_leaving, mut is_told) = (false, false);
        let served = loop {
            tokio::select! {
                served = &mut serving => break served,
                () = &mut leaving, if !is_leaving => {
                    is_leaving = true;
                    drain.cancel();
                }
                way = &mut first, if !is_told => {
                    is_told = true;
                    if let Ok(way) = way {
                        settled(&connection, &way);
                    }
                }
            }
        };
        connection.close(served.end.into());
    }

    /// Takes a connection to one endpoint.
    async fn serve_opaque(
        &self,
        origin: Origin,
        snapshot: Arc<Snapshot>,
        stream: TcpStream,
        sni: Option<&str>,
    ) -> Option<Task> {
        let connected = tokio::select! {
            connected = self.connect(&origin, &snapshot, sni) => connected,
            () = origin.pod.gone().cancelled() => Err(Failure::new(FailureReason::PodGone, "the pod left the mesh")),
        };
        // A connection may outlive many a state of the mesh.
        drop(snapshot);
        let Origin {
            pod, connection, ..
        } = origin;
        let connected = match connected {
            Ok(connected) => connected,
            Err(failure) => {
                connection.fail(failure.reason, &failure.detail);
                return None;
            }
        };
        connection.established();
        let clock = self.destinations.clock();
        Some(Box::pin(opaque::relay(
            stream, connected, pod, connection, clock,
        )))
    }

    /// Closes the pod's tunnels and upstream connections when it is gone, as one that is kept would
    /// keep its network namespace alive, and forgets what was kept for it alone.
    fn clean_up_after(self: &Arc<Self>, pod: &EnrolledPod) {
        let cookie = pod.netns_cookie();
        if !self.watched.lock().insert(cookie) {
            return;
        }
        let (gone, outbound) = (pod.gone().clone(), self.clone());
        tokio::spawn(async move {
            gone.cancelled().await;
            outbound.upstreams.close_source(cookie);
            outbound.tunnels.close_source(cookie);
            outbound.destinations.forget_source(cookie);
            outbound.watched.lock().remove(&cookie);
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

/// Requests of one connection may go to many endpoints; the connection itself counts with the first.
fn settled(connection: &Connection, way: &Way) {
    connection.update(|info| {
        info.destination = way.party();
        info.security = way.security();
    });
    connection.established();
}
