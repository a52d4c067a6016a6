//! What is known of the destinations of this node's pods, for longer than a request, a connection
//! and a snapshot: how their endpoints do, who is ejected, which breakers are open, what limits are
//! left.
//!
//! Whoever asks for a destination finds it as the newest snapshot has it: a change of endpoints or
//! policy is applied by whoever sees it first, and by [`Destinations::maintain`] where nobody asks.

mod book;
mod destination;
mod name;
mod reachable;

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use super::clock::Clock;
use crate::mesh::{SharedSnapshot, Snapshot};
use crate::resilience::ejection::SourceId;
use crate::resilience::{EventSink, Timestamp};

pub use destination::{Destination, Route};
pub use name::{DestinationId, EndpointId, RouteKey, Traffic};
pub use reachable::Reachable;

/// All destinations that pods of this node asked for. An entry stands only for a port that the newest
/// snapshot has, so the snapshot bounds them.
#[derive(Debug)]
pub struct Destinations {
    snapshot: SharedSnapshot,
    /// The node that they are seen from.
    node: Arc<str>,
    clock: Clock,
    /// Jitter of one node is not that of another.
    seed: u64,
    sink: Arc<dyn EventSink>,
    by_id: RwLock<HashMap<DestinationId, Arc<Destination>>>,
    /// Endpoints that have left since the last maintenance.
    departed: Mutex<Vec<SocketAddr>>,
}

impl Destinations {
    /// None yet.
    #[must_use]
    pub fn new(
        snapshot: SharedSnapshot,
        node: &str,
        clock: Clock,
        sink: Arc<dyn EventSink>,
    ) -> Arc<Self> {
        Arc::new(Self {
            snapshot,
            node: node.into(),
            clock,
            seed: RandomState::new().hash_one(()),
            sink,
            by_id: RwLock::default(),
            departed: Mutex::default(),
        })
    }

    /// The clock by which they are judged.
    #[must_use]
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// A destination as the newest snapshot has it. `seen` is the asker's snapshot, which may be
    /// older than what was applied already. None if the newest has no such port.
    pub fn of(&self, id: &DestinationId, seen: &Snapshot) -> Option<Arc<Destination>> {
        let there = self.by_id.read().get(id).cloned();
        if let Some(destination) = there
            && destination.is_as_in(seen)
        {
            return Some(destination);
        }
        let newest = self.snapshot.load();
        let mut by_id = self.by_id.write();
        let now = self.clock.now();
        if let Some(destination) = by_id.get(id) {
            return self
                .follow(destination, &newest, now)
                .then(|| destination.clone());
        }
        let sibling = by_id.get(&id.for_other_traffic()).cloned();
        let destination = Destination::new(
            id.clone(),
            self.node.clone(),
            self.seed,
            self.sink.clone(),
            &newest,
            sibling.as_deref(),
            now,
        )?;
        by_id.insert(id.clone(), destination.clone());
        Some(destination)
    }

    fn follow(&self, destination: &Destination, newest: &Snapshot, now: Timestamp) -> bool {
        destination.follow(newest, now, &mut self.departed.lock())
    }

    /// The work that belongs on a timer: follows the snapshot where nobody asks, forgets what is
    /// gone, compares endpoints with their peers. Linear in destinations and their endpoints. Returns
    /// the endpoints that have left, whose connections nobody needs.
    pub fn maintain(&self) -> Vec<SocketAddr> {
        let newest = self.snapshot.load_full();
        let now = self.clock.now();
        let all: Vec<Arc<Destination>> = self.by_id.read().values().cloned().collect();
        for destination in all {
            if self.follow(&destination, &newest, now) {
                destination.maintain(now);
            } else {
                let mut by_id = self.by_id.write();
                // A newer snapshot may have brought it back meanwhile.
                if !self.follow(&destination, &self.snapshot.load(), now) {
                    by_id.remove(destination.id());
                }
            }
        }
        std::mem::take(&mut self.departed.lock())
    }

    /// A pod is gone: what was kept for it alone is forgotten.
    pub fn forget_source(&self, netns_cookie: u64) {
        for destination in self.by_id.read().values() {
            destination.forget_source(SourceId(netns_cookie));
        }
    }

    /// All of them, for status and metrics.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Destination>> {
        self.by_id.read().values().cloned().collect()
    }

    /// One of them, for the operator.
    #[must_use]
    pub fn get(&self, id: &DestinationId) -> Option<Arc<Destination>> {
        self.by_id.read().get(id).cloned()
    }
}

#[cfg(test)]
pub(super) mod tests;
