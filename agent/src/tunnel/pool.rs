//! Tunnels that are kept for more than one connection.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;
use tracing::Instrument;

use super::client::{ConnectFailure, Fitness, IdleBounds, Place, Tunnel, establish};
use super::error::{Stage, TunnelError};
use super::headers::ConnectRequest;
use super::limits::Limits;
use super::liveness::Transport;
use super::status::{Counters, TunnelStatus, count};
use super::stream::{TunnelReceive, TunnelSend};
use crate::fairness;
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

/// How a handshake stands that others wait for.
#[derive(Clone)]
enum Flight {
    UnderWay,
    Landed,
    Failed(TunnelError),
}

/// What to do next for a place in a tunnel.
enum Step<'a> {
    Use(Place),
    Wait(watch::Receiver<Flight>),
    Lead(Lead<'a>),
}

/// The one who makes the tunnel that others wait for. Dropped, it lets another one lead.
struct Lead<'a> {
    pool: &'a Pool,
    key: &'a TunnelKey,
    id: u64,
    permit: Option<OwnedSemaphorePermit>,
    flight: watch::Sender<Flight>,
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

    /// Makes a tunnel, and takes the first place in it before others see it.
    async fn lead<D, F, T>(
        self: &Arc<Self>,
        mut lead: Lead<'_>,
        certificate: &Arc<WorkloadCertificate>,
        dial: &D,
    ) -> Result<Place, TunnelError>
    where
        D: Fn() -> F,
        F: Future<Output = io::Result<T>> + Send,
        T: Transport,
    {
        let address = lead.key.address;
        let bounds = &self.options.limits;
        let permit = lead.permit.take();
        let made = async {
            let permit = match permit {
                Some(permit) => permit,
                None => self.evicted(address).await?,
            };
            let transport = match timeout(bounds.dial, dial()).await {
                Ok(Ok(transport)) => transport,
                Ok(Err(error)) => {
                    return Err(TunnelError::Dial {
                        address,
                        source: Arc::new(error),
                    });
                }
                Err(_) => {
                    return Err(TunnelError::Timeout {
                        address,
                        stage: Stage::Dial,
                        after: bounds.dial,
                    });
                }
            };
            let established = establish(lead.id, lead.key, certificate, transport, bounds).await?;
            Ok((established, permit))
        };
        let (established, permit) = match made.await {
            Ok(made) => made,
            Err(error) => {
                count(&self.counters.failed);
                lead.fail(error.clone());
                return Err(error);
            }
        };
        let place = lead.land(&established.tunnel)?;
        count(&self.counters.established);
        let (pool, key) = (Arc::downgrade(self), lead.key.clone());
        let bounds = bounds.clone();
        let idle = IdleBounds {
            alone: self.options.idle,
            surplus: self.options.surplus,
        };
        let span = tracing::debug_span!("tunnel", id = lead.id, netns_cookie = key.netns_cookie,
            source = %key.source, %address, peer = %established.tunnel.peer);
        let driven = async move {
            let id = established.tunnel.id;
            let is_surplus = || is_surplus(&pool, &key, id);
            established.drive(idle, is_surplus, bounds).await;
            forget(&pool, &key, id);
            drop(permit);
        };
        fairness::spawn(driven.instrument(span));
        Ok(place)
    }
}

impl Pool {
    async fn evicted(&self, address: SocketAddr) -> Result<OwnedSemaphorePermit, TunnelError> {
        let room = self.room.clone().acquire_owned();
        match timeout(self.options.limits.dial, room).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_)) | Err(_) => Err(TunnelError::Saturated {
                address,
                bound: self.options.tunnels,
            }),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for tunnel in self.keys.get_mut().values().flat_map(|key| &key.open) {
            tunnel.retire();
        }
    }
}

impl Lead<'_> {
    /// The tunnel is there: a place in it for the leader, then for all.
    fn land(&self, tunnel: &Arc<Tunnel>) -> Result<Place, TunnelError> {
        let mut keys = self.pool.keys.lock();
        // Not there, or not ours: the source was closed meanwhile.
        let tunnels = keys
            .get_mut(self.key)
            .filter(|tunnels| {
                tunnels
                    .flight
                    .as_ref()
                    .is_some_and(|(id, _)| *id == self.id)
            })
            .ok_or(TunnelError::SourceGone)?;
        let place = tunnel.claim(1).ok_or(TunnelError::SourceGone)?;
        tunnels.flight = None;
        tunnels.open.push(tunnel.clone());
        drop(keys);
        self.flight.send_replace(Flight::Landed);
        Ok(place)
    }

    fn fail(&self, error: TunnelError) {
        self.leave();
        self.flight.send_replace(Flight::Failed(error));
    }

    fn leave(&self) {
        let mut keys = self.pool.keys.lock();
        if let Some(tunnels) = keys.get_mut(self.key) {
            tunnels.flight.take_if(|(id, _)| *id == self.id);
            if tunnels.is_unused() {
                keys.remove(self.key);
            }
        }
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Tunnels {
    fn is_unused(&self) -> bool {
        self.open.is_empty() && self.flight.is_none()
    }
}

/// Whether the next stream has no need of this tunnel, which is idle. Of those that are all idle the oldest stays.
fn is_surplus(pool: &Weak<Pool>, key: &TunnelKey, id: u64) -> bool {
    let Some(pool) = pool.upgrade() else {
        return false;
    };
    let limit = pool.options.streams_per_tunnel;
    let keys = pool.keys.lock();
    let Some(tunnels) = keys.get(key) else {
        return false;
    };
    let mut others = tunnels.open.iter().filter(|other| other.id != id);
    others.any(|other| {
        other.fitness(limit) == Fitness::Good && (other.id < id || other.streams() > 0)
    })
}

fn forget(pool: &Weak<Pool>, key: &TunnelKey, id: u64) {
    let Some(pool) = pool.upgrade() else {
        return;
    };
    let mut keys = pool.keys.lock();
    if let Some(tunnels) = keys.get_mut(key) {
        tunnels.open.retain(|tunnel| tunnel.id != id);
        if tunnels.is_unused() {
            keys.remove(key);
        }
    }
}
