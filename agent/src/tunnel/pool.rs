//! Tunnels that are kept for more than one connection.

mod lead;

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use self::lead::{Flight, Lead};
use super::client::{ConnectFailure, Fitness, Place, Tunnel};
use super::error::TunnelError;
use super::headers::ConnectRequest;
use super::limits::Limits;
use super::liveness::Transport;
use super::status::{Counters, TunnelStatus, count};
use super::stream::{TunnelReceive, TunnelSend};
use crate::identity::WorkloadCertificate;
use crate::mesh::SpiffeId;
use crate::workers::WorkerId;

/// Who talks to whom, where, and on which worker. Two pods never share a tunnel, since its source address is the
/// pod's; two workers do not, so that a tunnel and its streams are always on one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TunnelKey {
    /// The source pod's network namespace.
    pub netns_cookie: u64,
    /// The source pod's identity.
    pub source: SpiffeId,
    /// The peer must be one of these.
    pub destinations: Arc<BTreeSet<SpiffeId>>,
    /// The peer's address, port 15008.
    pub address: SocketAddr,
    /// Where the tunnel is driven, and where everybody has to be who uses it.
    pub worker: Option<WorkerId>,
}

/// Bounds of the pool.
#[derive(Debug, Clone)]
pub struct PoolOptions {
    /// Streams per tunnel, or fewer if the peer says so. Default 100, as ztunnel.
    pub streams_per_tunnel: usize,
    /// Tunnels per key. When all are full, new connections fail as
    /// [`TunnelError::Saturated`]. Default 164: with 100 streams each, as many as one pod may have
    /// connections (16,384), so that all of them may go to one other pod, were they on one worker.
    pub tunnels_per_key: usize,
    /// Tunnels in all. At the bound the one that is idle for longest is closed to make room; if
    /// none is idle, new ones fail as [`TunnelError::Saturated`]. Default 16,384.
    pub tunnels: usize,
    /// A tunnel without streams is closed after this time. Default 5 min.
    pub idle: Duration,
    /// And after this time, if another one of its key would take the next stream: after a burst one is kept, not as many
    /// as the burst needed, each of which costs either node some 50 KiB. Default 3 s: before the agent counts as quiet
    /// and forgets what it ran.
    pub surplus: Duration,
    /// Time bounds of each tunnel.
    pub limits: Limits,
}

impl Default for PoolOptions {
    fn default() -> Self {
        Self {
            streams_per_tunnel: 100,
            tunnels_per_key: 164,
            tunnels: 16_384,
            idle: Duration::from_secs(300),
            surplus: Duration::from_secs(3),
            limits: Limits::default(),
        }
    }
}

/// A connection through a tunnel.
pub struct Tunnelled {
    /// Towards the peer.
    pub send: TunnelSend,
    /// From the peer.
    pub receive: TunnelReceive,
    /// Who the peer proved to be: one of the key's destinations.
    pub peer: SpiffeId,
    /// What the peer says about itself (W3C baggage): hearsay.
    pub baggage: Option<String>,
}

/// Keeps the tunnels of all local pods.
///
/// A CONNECT that failed on a tunnel which others had used before (it was reset, closed by
/// GOAWAY, refused by REFUSED_STREAM, or simply silent) is tried once more on one that was made
/// after the failure. That is safe: no byte of the application was sent before the answer. A
/// failure there is final.
pub struct Pool {
    options: PoolOptions,
    next_id: AtomicU64,
    /// One permit for each tunnel that may exist.
    room: Arc<Semaphore>,
    keys: Mutex<HashMap<TunnelKey, Tunnels>>,
    counters: Counters,
}

/// What goes to one key.
#[derive(Default)]
struct Tunnels {
    open: Vec<Arc<Tunnel>>,
    /// The handshake under way, if any; the id tells it from a later one.
    flight: Option<(u64, watch::Receiver<Flight>)>,
}

/// What to do next for a place in a tunnel.
enum Step<'a> {
    Use(Place),
    Wait(watch::Receiver<Flight>),
    Lead(Lead<'a>),
}

impl Pool {
    /// An empty pool.
    #[must_use]
    pub fn new(options: PoolOptions) -> Arc<Self> {
        let permits = options.tunnels.min(Semaphore::MAX_PERMITS);
        Arc::new(Self {
            room: Arc::new(Semaphore::new(permits)),
            options,
            next_id: AtomicU64::new(1),
            keys: Mutex::default(),
            counters: Counters::default(),
        })
    }

    /// A connection to `request.authority` through a tunnel to `key`, which is made if there is
    /// none with room: then `dial` makes its TCP connection, from the source pod. To be called on
    /// a tokio runtime; safe to cancel.
    pub async fn open<D, F, T>(
        self: &Arc<Self>,
        key: &TunnelKey,
        certificate: Arc<WorkloadCertificate>,
        request: ConnectRequest,
        dial: D,
    ) -> Result<Tunnelled, TunnelError>
    where
        D: Fn() -> F,
        F: Future<Output = io::Result<T>> + Send,
        T: Transport,
    {
        let bounds = &self.options.limits;
        let (place, own) = self.place(key, &certificate, 0, &dial).await?;
        let tunnel = place.tunnel().clone();
        let failure = match place.connect(&request, bounds).await {
            Ok(tunnelled) => return Ok(tunnelled),
            Err(ConnectFailure::Final(error)) => return Err(error),
            Err(ConnectFailure::Tunnel(error)) => error,
        };
        if !failure.is_refused_stream() {
            tunnel.retire();
        }
        drop(tunnel);
        if own {
            return Err(failure);
        }

        tracing::debug!(address = %key.address, error = %failure, "trying a fresh tunnel");
        count(&self.counters.replaced);
        let later_than = self.next_id.load(Ordering::Relaxed);
        let (place, _) = self.place(key, &certificate, later_than, &dial).await?;
        let tunnel = place.tunnel().clone();
        place
            .connect(&request, bounds)
            .await
            .map_err(|failure| match failure {
                ConnectFailure::Final(error) => error,
                ConnectFailure::Tunnel(error) => {
                    tunnel.retire();
                    error
                }
            })
    }

    /// All tunnels.
    #[must_use]
    pub fn status(&self) -> Vec<TunnelStatus> {
        let keys = self.keys.lock();
        keys.iter()
            .flat_map(|(key, tunnels)| {
                tunnels
                    .open
                    .iter()
                    .map(|tunnel| TunnelStatus::of(key, tunnel))
            })
            .collect()
    }

    /// Totals by name: `established`, `failed` handshakes, `reused` by a further stream,
    /// `replaced` because they failed a new stream, `rotated` out with their certificate,
    /// `evicted` at the bound of the pool, and connections refused as `saturated`.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.by_name()
    }

    /// Ends the tunnels of a pod at once, with all streams in them: it is gone.
    pub fn close_source(&self, netns_cookie: u64) {
        let gone: Vec<_> = self
            .keys
            .lock()
            .extract_if(|key, _| key.netns_cookie == netns_cookie)
            .collect();
        for (_, tunnels) in gone {
            for tunnel in tunnels.open {
                tunnel.retire();
                tunnel.abort.cancel();
            }
        }
    }

    /// A place in a tunnel whose id is at least `oldest`, and whether this caller made the tunnel.
    ///
    /// One caller per key makes a tunnel while the others wait. If it fails, or goes away, one of
    /// them takes over with a dialler of its own; who has seen two others fail fails with them.
    async fn place<D, F, T>(
        self: &Arc<Self>,
        key: &TunnelKey,
        certificate: &Arc<WorkloadCertificate>,
        oldest: u64,
        dial: &D,
    ) -> Result<(Place, bool), TunnelError>
    where
        D: Fn() -> F,
        F: Future<Output = io::Result<T>> + Send,
        T: Transport,
    {
        let mut seen_failing = 0;
        loop {
            let mut flight = match self.step(key, certificate, oldest)? {
                Step::Use(place) => {
                    count(&self.counters.reused);
                    return Ok((place, false));
                }
                Step::Lead(lead) => {
                    // Rare and large: it shall not be part of every connection's task.
                    let place = Box::pin(self.lead(lead, certificate, dial)).await?;
                    return Ok((place, true));
                }
                Step::Wait(flight) => flight,
            };
            let end = flight
                .wait_for(|flight| !matches!(flight, Flight::UnderWay))
                .await
                .map(|end| end.clone());
            // An error means that the leader went away: try again.
            if let Ok(Flight::Failed(error)) = end {
                seen_failing += 1;
                if seen_failing == 2 {
                    return Err(error);
                }
            }
        }
    }

    fn step<'a>(
        &'a self,
        key: &'a TunnelKey,
        certificate: &WorkloadCertificate,
        oldest: u64,
    ) -> Result<Step<'a>, TunnelError> {
        let limit = self.options.streams_per_tunnel;
        let mut keys = self.keys.lock();
        if let Some(tunnels) = keys.get_mut(key) {
            for tunnel in &tunnels.open {
                if tunnel.is_replaced_by(certificate) && !tunnel.is_retired() {
                    count(&self.counters.rotated);
                    tunnel.retire();
                }
            }
            let room = !self.is_full(tunnels);
            let best = tunnels
                .open
                .iter()
                .filter(|tunnel| tunnel.id >= oldest)
                .map(|tunnel| (tunnel.fitness(limit), tunnel))
                .filter(|(fitness, _)| match fitness {
                    Fitness::Good => true,
                    Fitness::Stalled => !room,
                    Fitness::Full => false,
                })
                .max_by_key(|(fitness, tunnel)| (*fitness, tunnel.streams()))
                .and_then(|(_, tunnel)| tunnel.claim(limit));
            if let Some(place) = best {
                return Ok(Step::Use(place));
            }
            if let Some((_, flight)) = &tunnels.flight {
                return Ok(Step::Wait(flight.clone()));
            }
            if !room {
                count(&self.counters.saturated);
                return Err(TunnelError::Saturated {
                    address: key.address,
                    bound: self.options.tunnels_per_key,
                });
            }
        }
        let permit = self.make_room(&keys, key)?;
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = watch::channel(Flight::UnderWay);
        keys.entry(key.clone()).or_default().flight = Some((id, receiver));
        Ok(Step::Lead(Lead {
            pool: self,
            key,
            id,
            permit,
            flight: sender,
        }))
    }

    /// Retired tunnels do not count: they only wait for their last streams, which have bounds of
    /// their own.
    fn is_full(&self, tunnels: &Tunnels) -> bool {
        let live = tunnels.open.iter().filter(|tunnel| !tunnel.is_retired());
        live.count() >= self.options.tunnels_per_key
    }

    /// A permit for one more tunnel; `None` if it has to be waited for, because an idle tunnel is
    /// being closed for it.
    fn make_room(
        &self,
        keys: &HashMap<TunnelKey, Tunnels>,
        key: &TunnelKey,
    ) -> Result<Option<OwnedSemaphorePermit>, TunnelError> {
        if let Ok(permit) = self.room.clone().try_acquire_owned() {
            return Ok(Some(permit));
        }
        let idle = keys
            .values()
            .flat_map(|tunnels| &tunnels.open)
            .filter(|tunnel| !tunnel.is_retired())
            .filter_map(|tunnel| Some((tunnel.idle_since()?, tunnel)))
            .min_by_key(|(since, _)| *since);
        let Some((_, tunnel)) = idle else {
            count(&self.counters.saturated);
            return Err(TunnelError::Saturated {
                address: key.address,
                bound: self.options.tunnels,
            });
        };
        count(&self.counters.evicted);
        tunnel.retire();
        Ok(None)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for tunnel in self.keys.get_mut().values().flat_map(|key| &key.open) {
            tunnel.retire();
        }
    }
}

impl Tunnels {
    fn is_unused(&self) -> bool {
        self.open.is_empty() && self.flight.is_none()
    }
}
