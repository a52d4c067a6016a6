//! What the pool tells about itself.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use super::client::Tunnel;
use super::pool::TunnelKey;
use crate::mesh::SpiffeId;
use crate::workers::WorkerId;

/// A tunnel, for those who look.
#[derive(Debug, Clone, Serialize)]
pub struct TunnelStatus {
    /// Netns cookie of the source pod.
    pub netns_cookie: u64,
    /// Identity of the source pod.
    pub source: SpiffeId,
    /// The peer's address.
    pub address: SocketAddr,
    /// The peer's identity, proven.
    pub peer: SpiffeId,
    /// Serial number of the certificate that we showed.
    pub certificate: String,
    /// When the handshake was done.
    #[serde(with = "time::serde::rfc3339")]
    pub established: time::OffsetDateTime,
    /// Streams in it now.
    pub streams: usize,
    /// Streams that wait for a peer that does not read.
    pub stalled: usize,
    /// Whether it takes no new streams and ends with its last.
    pub retired: bool,
    /// The worker that drives it.
    pub worker: Option<WorkerId>,
}

impl TunnelStatus {
    pub(super) fn of(key: &TunnelKey, tunnel: &Tunnel) -> Self {
        Self {
            netns_cookie: key.netns_cookie,
            source: key.source.clone(),
            address: key.address,
            peer: tunnel.peer.clone(),
            certificate: tunnel.serial.clone(),
            established: tunnel.established.into(),
            streams: tunnel.streams(),
            stalled: tunnel.stalled(),
            retired: tunnel.is_retired(),
            worker: key.worker,
        }
    }
}

/// Totals since the start.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) established: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) reused: AtomicU64,
    pub(super) replaced: AtomicU64,
    pub(super) rotated: AtomicU64,
    pub(super) evicted: AtomicU64,
    pub(super) saturated: AtomicU64,
}

impl Counters {
    pub(super) fn by_name(&self) -> Vec<(&'static str, u64)> {
        let Counters {
            established,
            failed,
            reused,
            replaced,
            rotated,
            evicted,
            saturated,
        } = self;
        [
            ("established", established),
            ("failed", failed),
            ("reused", reused),
            ("replaced", replaced),
            ("rotated", rotated),
            ("evicted", evicted),
            ("saturated", saturated),
        ]
        .map(|(name, value)| (name, value.load(Ordering::Relaxed)))
        .to_vec()
    }
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
