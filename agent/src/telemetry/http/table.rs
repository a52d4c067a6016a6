//! A bounded table of things that count, from which those of whom nothing is left are removed.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::RwLock;
use tokio::time::Instant;

/// Set in [`Tracked::users`] once it is out of the table.
const REMOVED: u64 = 1 << 63;

/// Something that counts, and who is counting just now.
#[derive(Debug, Default)]
pub(super) struct Tracked<V> {
    value: V,
    users: AtomicU64,
    uses: AtomicU64,
}

impl<V> Tracked<V> {
    /// Counts, unless it was removed from its table: what is counted there would be lost.
    pub fn with(&self, count: impl FnOnce(&V)) -> Result<(), Removed> {
        if self.users.fetch_add(1, Ordering::AcqRel) & REMOVED != 0 {
            self.users.fetch_sub(1, Ordering::AcqRel);
            return Err(Removed);
        }
        self.uses.fetch_add(1, Ordering::Relaxed);
        count(&self.value);
        self.users.fetch_sub(1, Ordering::AcqRel);
        Ok(())
    }

    pub fn value(&self) -> &V {
        &self.value
    }

    fn remove(&self) -> Result<(), InUse> {
        self.users
            .compare_exchange(0, REMOVED, Ordering::AcqRel, Ordering::Relaxed)
            .map(drop)
            .map_err(|_| InUse)
    }
}

/// It is out of the table: ask the table again.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Removed;

/// Somebody counts just now.
#[derive(Debug)]
struct InUse;

/// Values by labels: at most as many as the bound says, and what stands for all others.
#[derive(Debug)]
pub(super) struct Table<K, V> {
    slots: RwLock<HashMap<K, Slot<V>>>,
    bound: usize,
    overflow: fn(&K) -> K,
    overflowed: AtomicU64,
}

#[derive(Debug)]
struct Slot<V> {
    tracked: Arc<Tracked<V>>,
    /// Since when somebody that the labels name is gone and nothing was counted.
    stale: Option<Stale>,
}

#[derive(Debug)]
struct Stale {
    since: Instant,
    uses: u64,
}

impl<K: Clone + Eq + Hash, V: Default> Table<K, V> {
    /// An empty one. `overflow` names what stands for labels that found no room.
    pub fn new(bound: usize, overflow: fn(&K) -> K) -> Self {
        Self {
            slots: RwLock::default(),
            bound,
            overflow,
            overflowed: AtomicU64::new(0),
        }
    }

    /// What counts for these labels.
    pub fn get(&self, labels: &K) -> Arc<Tracked<V>> {
        if let Some(slot) = self.slots.read().get(labels) {
            return slot.tracked.clone();
        }
        let mut slots = self.slots.write();
        let labels = if slots.len() < self.bound || slots.contains_key(labels) {
            labels.clone()
        } else {
            self.overflowed.fetch_add(1, Ordering::Relaxed);
            (self.overflow)(labels)
        };
        let slot = slots.entry(labels).or_insert_with(|| Slot {
            tracked: Arc::default(),
            stale: None,
        });
        slot.tracked.clone()
    }

    /// Counts for these labels; `cached` is what [`Table::get`] gave for them some time ago.
    pub fn count(&self, labels: &K, cached: &Tracked<V>, count: impl Fn(&V)) {
        if cached.with(&count).is_ok() {
            return;
        }
        // What was just got may be removed again, but only after the grace period: one more round
        // is all there is.
        while self.get(labels).with(&count).is_err() {}
    }

    /// Removes what names somebody that is not `known`, when nothing was counted for `grace`.
    pub fn retain(&self, known: impl Fn(&K) -> bool, grace: Duration, now: Instant) {
        self.slots.write().retain(|labels, slot| {
            if known(labels) {
                slot.stale = None;
                return true;
            }
            let uses = slot.tracked.uses.load(Ordering::Relaxed);
            match &slot.stale {
                Some(stale) if stale.uses == uses => {
                    now.saturating_duration_since(stale.since) < grace
                        || slot.tracked.remove().is_err()
                }
                _ => {
                    slot.stale = Some(Stale { since: now, uses });
                    true
                }
            }
        });
    }

    pub fn len(&self) -> usize {
        self.slots.read().len()
    }

    /// Labels that found no room, as often as they were asked for.
    pub fn overflowed(&self) -> u64 {
        self.overflowed.load(Ordering::Relaxed)
    }

    pub fn all(&self) -> Vec<(K, Arc<Tracked<V>>)> {
        let slots = self.slots.read();
        slots
            .iter()
            .map(|(labels, slot)| (labels.clone(), slot.tracked.clone()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(60);

    fn table(bound: usize) -> Table<u32, AtomicU64> {
        Table::new(bound, |_| u32::MAX)
    }

    fn add(value: &AtomicU64) {
        value.fetch_add(1, Ordering::Relaxed);
    }

    fn value(table: &Table<u32, AtomicU64>, labels: u32) -> u64 {
        table.get(&labels).value().load(Ordering::Relaxed)
    }

    #[test]
    fn labels_beyond_the_bound_share_what_stands_for_all_others() {
        let table = table(2);
        for labels in 0..5 {
            let cached = table.get(&labels);
            table.count(&labels, &cached, add);
        }
        assert_eq!((table.len(), table.overflowed()), (3, 3));
        assert_eq!(value(&table, u32::MAX), 3);
    }

    #[test]
    fn what_counts_again_before_the_grace_period_ends_stays() {
        let table = table(10);
        let start = Instant::now();
        let cached = table.get(&1);
        table.retain(|_| false, GRACE, start);
        table.count(&1, &cached, add);
        table.retain(|_| false, GRACE, start + GRACE);
        assert_eq!(table.len(), 1);
        table.retain(|_| false, GRACE, start + 2 * GRACE);
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn a_count_through_a_reference_that_outlived_its_place_is_not_lost() {
        let table = table(10);
        let start = Instant::now();
        let cached = table.get(&1);
        table.retain(|_| false, GRACE, start);
        table.retain(|_| false, GRACE, start + GRACE);
        assert_eq!(cached.with(|_| ()), Err(Removed));
        table.count(&1, &cached, add);
        assert_eq!(value(&table, 1), 1);
    }

    #[test]
    fn what_counts_at_the_moment_of_its_removal_is_not_removed() {
        let table = table(10);
        let start = Instant::now();
        let cached = table.get(&1);
        table.retain(|_| false, GRACE, start);
        cached
            .with(|_| {
                cached.uses.store(0, Ordering::Relaxed);
                table.retain(|_| false, GRACE, start + GRACE);
            })
            .unwrap();
        assert_eq!(table.len(), 1);
    }
}
