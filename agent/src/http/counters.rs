//! What the guards of HTTP have refused, for the metrics.

use std::sync::atomic::{AtomicU64, Ordering};

use super::guard::BadRequest;

/// Floods that end a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Flood {
    /// Streams opened and reset at once (CVE-2023-44487), or errors that made us reset many.
    Resets,
    /// A header block in more CONTINUATION frames than its bound needs (CVE-2024-27316).
    Continuations,
    /// DATA frames that carry nothing, or next to nothing.
    EmptyData,
    /// Another reason for ENHANCE_YOUR_CALM.
    Other,
}

impl Flood {
    /// All of them, in the order of their declaration.
    pub const ALL: [Self; 4] = [
        Self::Resets,
        Self::Continuations,
        Self::EmptyData,
        Self::Other,
    ];

    /// Value of the label `kind`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Resets => "resets",
            Self::Continuations => "continuations",
            Self::EmptyData => "empty_data",
            Self::Other => "other",
        }
    }

    /// What a peer flooded with whose connection h2 ended, by the type of the last frame that was
    /// read of it (RFC 9113 §6): h2 itself tells only the peer.
    pub(super) fn of(frame: u8) -> Self {
        match frame {
            0 => Self::EmptyData,
            1 | 3 => Self::Resets,
            9 => Self::Continuations,
            _ => Self::Other,
        }
    }
}

/// Counts of one process, shared by all its connections.
#[derive(Debug, Default)]
pub struct HttpCounters {
    connections: AtomicU64,
    requests: AtomicU64,
    bad_requests: [AtomicU64; BadRequest::ALL.len()],
    floods: [AtomicU64; Flood::ALL.len()],
    slow_heads: AtomicU64,
    idle_closed: AtomicU64,
    upgrades: AtomicU64,
}

impl HttpCounters {
    /// Totals by name: `connections`, `requests`, `slow_heads` (connections ended because a head
    /// took too long), `idle_closed`, `upgrades`.
    #[must_use]
    pub fn by_name(&self) -> Vec<(&'static str, u64)> {
        [
            ("connections", &self.connections),
            ("requests", &self.requests),
            ("slow_heads", &self.slow_heads),
            ("idle_closed", &self.idle_closed),
            ("upgrades", &self.upgrades),
        ]
        .map(|(name, count)| (name, count.load(Ordering::Relaxed)))
        .into()
    }

    /// Requests refused with 400 (or what [`BadRequest::status`] says), by reason.
    #[must_use]
    pub fn bad_requests(&self) -> Vec<(&'static str, u64)> {
        BadRequest::ALL
            .iter()
            .zip(&self.bad_requests)
            .map(|(bad, count)| (bad.as_str(), count.load(Ordering::Relaxed)))
            .collect()
    }

    /// Connections ended because of a flood, by kind.
    #[must_use]
    pub fn floods(&self) -> Vec<(&'static str, u64)> {
        Flood::ALL
            .iter()
            .zip(&self.floods)
            .map(|(flood, count)| (flood.as_str(), count.load(Ordering::Relaxed)))
            .collect()
    }

    pub(super) fn connection(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn bad_request(&self, bad: BadRequest) {
        self.bad_requests[bad as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn flood(&self, flood: Flood) {
        self.floods[flood as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn slow_head(&self) {
        self.slow_heads.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn idle_closed(&self) {
        self.idle_closed.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn upgrade(&self) {
        self.upgrades.fetch_add(1, Ordering::Relaxed);
    }
}
