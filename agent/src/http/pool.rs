//! The upstream connections of a node: kept between requests, never shared between two pods.

use std::collections::HashMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;
use tokio::time::MissedTickBehavior;

use super::client::{Lease, SendError};
use super::h2;
use super::places::Places;
use super::server::Wire;
use super::upstreams::{Connected, Cut, Upstreams};
use crate::workers::WorkerId;

/// How a connection gets to its endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// A stream of a HBONE tunnel.
    Tunnel,
    /// An admitted connection on this node.
    SameNode,
    /// A plain connection to a peer outside the mesh.
    Plaintext,
}

/// Which connections can serve a request in each other's place.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct UpstreamKey {
    /// Netns cookie of the source pod: two pods never share a connection.
    pub source: u64,
    /// Address and port of the app.
    pub endpoint: SocketAddr,
    /// The protocol spoken.
    pub protocol: Wire,
    /// How it gets there.
    pub way: Way,
    /// Where the connection is driven, and where everybody has to be who uses it.
    pub worker: Option<WorkerId>,
}

/// Bounds of a pool. Each holds on the node of the client; those of one pod and one endpoint for each worker.
#[derive(Debug, Clone)]
pub struct PoolLimits {
    /// How long a HTTP/1 connection is kept without a request. Default 4 s: below the 5 s after
    /// which Node.js, uvicorn and Apache close theirs, since a request that crosses such a close
    /// cannot always be repeated.
    pub idle: Duration,
    /// How long a HTTP/2 connection is kept without a stream. Default 60 s.
    pub idle_h2: Duration,
    /// Idle HTTP/1 connections of one pod to one endpoint. Default 128; a further one is closed.
    pub idle_per_key: usize,
    /// Idle HTTP/1 connections in all. Default 8,192; a further one is closed.
    pub idle_total: usize,
    /// HTTP/2 connections of one pod to one endpoint, each for 100 streams. Default 8; beyond it
    /// requests wait for a stream on one of them.
    pub h2_per_key: usize,
}

impl Default for PoolLimits {
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(4),
            idle_h2: h2::IDLE,
            idle_per_key: 128,
            idle_total: 8_192,
            h2_per_key: 8,
        }
    }
}

/// What a request asks of its connection, beyond that it leads to the endpoint.
#[derive(Debug, Clone, Default)]
pub struct Terms<'a> {
    /// Requests that a connection carries at most, this one too: one that has carried as many is
    /// closed in order, and another made. None is no limit.
    pub requests: Option<u32>,
    /// How long the connection is kept without a request after this one, which is looked at once a
    /// second. None: as [`PoolLimits`] say.
    pub idle: Option<Duration>,
    /// How many connections there may be, this request's too.
    pub places: Option<Arc<Places>>,
    /// Set for as long as the request waits for one of them.
    pub waits: Option<&'a AtomicBool>,
}

/// What [`PoolCounters`] shows.
#[derive(Debug, Default)]
pub(super) struct Totals {
    pub(super) idle: AtomicUsize,
    pub(super) created: AtomicU64,
    pub(super) reused: AtomicU64,
    pub(super) overflowed: AtomicU64,
    pub(super) expired: AtomicU64,
    pub(super) found_closed: AtomicU64,
}

/// Totals of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PoolCounters {
    /// Idle HTTP/1 connections now.
    pub idle: usize,
    /// Connections made.
    pub created: u64,
    /// Requests that found a connection.
    pub reused: u64,
    /// Connections closed because as many as allowed were idle.
    pub overflowed: u64,
    /// Connections closed because nobody used them.
    pub expired: u64,
    /// Idle connections that the upstream had closed.
    pub found_closed: u64,
}

/// The connections of one key, for the admin endpoint.
#[derive(Debug, Clone, Serialize)]
pub struct PoolStatus {
    /// Netns cookie of the source pod.
    pub source: u64,
    /// Address and port of the app.
    pub endpoint: SocketAddr,
    /// The protocol spoken.
    pub protocol: Wire,
    /// How it gets there.
    pub way: Way,
    /// The worker that it is on.
    pub worker: Option<WorkerId>,
    /// Idle HTTP/1 connections.
    pub idle: usize,
    /// HTTP/2 connections.
    pub multiplexed: usize,
    /// Streams on them.
    pub streams: usize,
}

/// Keys are spread over so many maps, so that requests of different pods, and on different workers, do not wait for each
/// other.
const SHARDS: usize = 64;

type Shard = Mutex<HashMap<UpstreamKey, Arc<Upstreams>>>;

/// Keeps the upstream connections of all local pods.
pub struct UpstreamPool {
    limits: PoolLimits,
    shards: [Shard; SHARDS],
    totals: Arc<Totals>,
}

impl UpstreamPool {
    /// An empty pool, to be made on a tokio runtime: a task of its own closes what idles.
    #[must_use]
    pub fn new(limits: PoolLimits) -> Arc<Self> {
        let pool = Arc::new(Self {
            limits,
            shards: std::array::from_fn(|_| Mutex::default()),
            totals: Arc::default(),
        });
        tokio::spawn(sweep(Arc::downgrade(&pool)));
        pool
    }

    /// An idle HTTP/1 connection, or a HTTP/2 one with room, or a new one made by `connect`. Safe to
    /// cancel.
    pub async fn get<C, F, E>(
        &self,
        key: &UpstreamKey,
        terms: &Terms<'_>,
        connect: C,
    ) -> Result<Lease, E>
    where
        C: FnOnce() -> F,
        F: Future<Output = Result<Connected, E>>,
        E: From<SendError>,
    {
        self.upstreams(key).get(terms, connect).await
    }

    /// The connections of a key, to be asked for on the runtime that is to serve them.
    #[must_use]
    pub fn upstreams(&self, key: &UpstreamKey) -> Arc<Upstreams> {
        let mut shard = self.shard(key).lock();
        if let Some(upstreams) = shard.get(key) {
            return upstreams.clone();
        }
        let upstreams = Upstreams::counted(key.protocol, self.limits.clone(), self.totals.clone());
        shard.insert(key.clone(), upstreams.clone());
        upstreams
    }

    /// Closes the connections of a pod at once: it is gone.
    pub fn close_source(&self, netns_cookie: u64) {
        self.close(Cut::AtOnce, |key| key.source == netns_cookie);
    }

    /// Closes the idle connections to an endpoint in order, and those in use after their requests:
    /// it has left its Service.
    pub fn close_endpoint(&self, endpoint: SocketAddr) {
        self.close(Cut::InOrder, |key| key.endpoint == endpoint);
    }

    /// Totals.
    #[must_use]
    pub fn counters(&self) -> PoolCounters {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        PoolCounters {
            idle: self.totals.idle.load(Ordering::Relaxed),
            created: load(&self.totals.created),
            reused: load(&self.totals.reused),
            overflowed: load(&self.totals.overflowed),
            expired: load(&self.totals.expired),
            found_closed: load(&self.totals.found_closed),
        }
    }

    /// What is kept for each key.
    #[must_use]
    pub fn status(&self) -> Vec<PoolStatus> {
        let mut all = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock();
            all.extend(shard.iter().map(|(key, upstreams)| upstreams.status(key)));
        }
        all
    }

    fn shard(&self, key: &UpstreamKey) -> &Shard {
        // The kernel counts cookies up.
        let worker = key.worker.map_or(0, |worker| worker.index() as u64);
        let place = key.source.wrapping_add(worker) % SHARDS as u64;
        &self.shards[place as usize]
    }

    fn close(&self, cut: Cut, which: impl Fn(&UpstreamKey) -> bool) {
        for shard in &self.shards {
            let gone: Vec<_> = shard.lock().extract_if(|key, _| which(key)).collect();
            for (_, upstreams) in gone {
                upstreams.close(cut);
            }
        }
    }
}

/// Idle connections are looked at so often: a peer's close is noticed by then at the latest.
const SWEEP: Duration = Duration::from_secs(1);

async fn sweep(pool: Weak<UpstreamPool>) {
    let mut ticks = tokio::time::interval(SWEEP);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let now = ticks.tick().await;
        let Some(pool) = pool.upgrade() else {
            return;
        };
        for shard in &pool.shards {
            let all: Vec<_> = shard.lock().values().cloned().collect();
            for upstreams in all {
                upstreams.sweep(now);
            }
            // One that a request holds is about to be used.
            shard
                .lock()
                .retain(|_, upstreams| Arc::strong_count(upstreams) > 1 || !upstreams.is_unused());
        }
    }
}
