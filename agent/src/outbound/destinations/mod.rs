//! What is known of the destinations of this node's pods, for longer than a request, a connection
//! and a snapshot: how their endpoints do, who is ejected, which breakers are open, what limits are
//! left.
//!
//! Whoever asks for a destination finds it as the newest snapshot has it: a change of endpoints or
//! policy is applied by whoever sees it first, and by [`Destinations::maintain`] where nobody asks.

mod destination;
mod events;
mod name;
mod reachable;

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::clock::Clock;
use crate::mesh::{SharedSnapshot, Snapshot};
use crate::resilience::EventSink;
use crate::resilience::ejection::SourceId;

pub use destination::{Destination, Route};
pub use events::EventReporter;
pub use name::{DestinationId, EndpointId, RouteKey, Traffic};
pub use reachable::Reachable;

/// How often what nobody asks for is followed and compared.
const MAINTENANCE: Duration = Duration::from_secs(1);

/// All destinations that pods of this node asked for. An entry stands only for a port that the newest
/// snapshot has, so the snapshot bounds them.
#[derive(Debug)]
pub struct Destinations {
    snapshot: SharedSnapshot,
    clock: Clock,
    /// Jitter of one node is not that of another.
    seed: u64,
    sink: Arc<dyn EventSink>,
    by_id: RwLock<HashMap<DestinationId, Arc<Destination>>>,
}

impl Destinations {
    /// None yet.
    #[must_use]
    pub fn new(snapshot: SharedSnapshot, clock: Clock, sink: Arc<dyn EventSink>) -> Arc<Self> {
        Arc::new(Self {
            snapshot,
            clock,
            seed: RandomState::new().hash_one(()),
            sink,
            by_id: RwLock::default(),
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
            return destination
                .follow(&newest, now)
                .then(|| destination.clone());
        }
        let destination = Destination::new(id.clone(), self.seed, self.sink.clone(), &newest, now)?;
        by_id.insert(id.clone(), destination.clone());
        Some(destination)
    }

    /// The work that belongs on a timer: follows the snapshot where nobody asks, forgets what is
    /// gone, compares endpoints with their peers. Linear in destinations and their endpoints.
    pub fn maintain(&self) {
        let newest = self.snapshot.load_full();
        let now = self.clock.now();
        let all: Vec<Arc<Destination>> = self.by_id.read().values().cloned().collect();
        for destination in all {
            if destination.follow(&newest, now) {
                destination.maintain(now);
            } else {
                let mut by_id = self.by_id.write();
                // A newer snapshot may have brought it back meanwhile.
                if !destination.follow(&self.snapshot.load(), now) {
                    by_id.remove(destination.id());
                }
            }
        }
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

/// Maintains the destinations until `stop`.
pub async fn maintain(destinations: Arc<Destinations>, stop: CancellationToken) {
    let mut timer = tokio::time::interval(MAINTENANCE);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(timer.tick()).await.is_some() {
        destinations.maintain();
    }
}

#[cfg(test)]
mod tests;
