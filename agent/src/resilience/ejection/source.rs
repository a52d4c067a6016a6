//! One source of requests, usually a pod, as a destination knows it.

use std::collections::HashSet;

use serde::Serialize;

use super::super::budget::{BudgetSettings, RetryBudget};
use super::super::endpoint::Target;
use super::super::sync::{AtomicU32, AtomicU64, Mutex, Ordering};
use super::super::time::Timestamp;
use super::shelf::Shelf;

/// Who asks: the netns cookie of a pod, which nobody can forge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct SourceId(pub u64);

/// What is ejected for one source alone, and when it last asked.
#[derive(Debug)]
pub struct SourceState<T> {
    id: SourceId,
    last_seen: AtomicU64,
    /// How many are ejected: zero lets a pick pass without the lock.
    count: AtomicU32,
    next_return: AtomicU64,
    ejected: Mutex<HashSet<T>>,
    /// What its own requests paid for.
    pub(in super::super) budget: RetryBudget,
}

impl<T: Target> SourceState<T> {
    pub(in super::super) fn new(id: SourceId, budget: &BudgetSettings, now: Timestamp) -> Self {
        Self {
            id,
            last_seen: AtomicU64::new(now.as_nanos()),
            count: AtomicU32::new(0),
            next_return: AtomicU64::new(Timestamp::NEVER.as_nanos()),
            ejected: Mutex::new(HashSet::new()),
            budget: RetryBudget::new(budget),
        }
    }

    /// Who it is.
    pub const fn id(&self) -> SourceId {
        self.id
    }

    /// When it last asked, to a tenth of a second.
    pub(in super::super) fn last_seen(&self) -> Timestamp {
        Timestamp::from_nanos(self.last_seen.load(Ordering::Relaxed))
    }

    pub(in super::super) fn seen(&self, now: Timestamp) {
        const TENTH: u64 = 100_000_000;
        // Written ten times a second at most: the line is shared by all workers.
        if now
            .as_nanos()
            .saturating_sub(self.last_seen.load(Ordering::Relaxed))
            >= TENTH
        {
            self.last_seen.store(now.as_nanos(), Ordering::Relaxed);
        }
    }

    /// Whether an endpoint is ejected for this source alone.
    pub fn ejects(&self, target: &T) -> bool {
        self.count.load(Ordering::Relaxed) != 0 && self.ejected.lock().contains(target)
    }

    /// How many endpoints are ejected for this source alone.
    pub fn ejected(&self) -> usize {
        self.count.load(Ordering::Relaxed) as usize
    }

    pub(in super::super) fn next_return(&self) -> Timestamp {
        Timestamp::from_nanos(self.next_return.load(Ordering::Relaxed))
    }

    pub(super) fn publish(&self, shelf: &Shelf<T>) {
        self.next_return
            .store(shelf.next_return().as_nanos(), Ordering::Relaxed);
        if shelf.len() == 0 && self.ejected() == 0 {
            return;
        }
        let mut ejected = self.ejected.lock();
        ejected.clear();
        ejected.extend(shelf.entries().map(|entry| entry.endpoint.target().clone()));
        self.count.store(
            u32::try_from(shelf.len()).unwrap_or(u32::MAX),
            Ordering::Relaxed,
        );
    }
}
