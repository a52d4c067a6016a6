//! The ejected endpoints of one scope, in the order in which they may return.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::super::endpoint::{Endpoint, Target};
use super::super::time::Timestamp;

/// One ejected endpoint.
#[derive(Debug)]
pub(super) struct Entry<T> {
    pub(super) endpoint: Arc<Endpoint<T>>,
    pub(super) until: Timestamp,
    /// How often in a row it was ejected.
    pub(super) times: u32,
    /// Tells this ejection from an earlier one of the same endpoint, so that a straggling probe
    /// decides nothing.
    pub(super) serial: u64,
    probing: bool,
}

/// Ejected endpoints by target, and by when they may return.
#[derive(Debug)]
pub(super) struct Shelf<T> {
    entries: HashMap<T, Entry<T>>,
    due: BTreeMap<(Timestamp, u64), T>,
}

impl<T> Default for Shelf<T> {
    fn default() -> Self {
        Self {
            entries: HashMap::new(),
            due: BTreeMap::new(),
        }
    }
}

impl<T: Target> Shelf<T> {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn contains(&self, target: &T) -> bool {
        self.entries.contains_key(target)
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = &Entry<T>> {
        self.entries.values()
    }

    pub(super) fn put(
        &mut self,
        endpoint: Arc<Endpoint<T>>,
        until: Timestamp,
        times: u32,
        serial: u64,
    ) {
        let target = endpoint.target().clone();
        self.take(&target);
        self.due.insert((until, serial), target.clone());
        let entry = Entry {
            endpoint,
            until,
            times,
            serial,
            probing: false,
        };
        self.entries.insert(target, entry);
    }

    pub(super) fn take(&mut self, target: &T) -> Option<Entry<T>> {
        let entry = self.entries.remove(target)?;
        self.due.remove(&(entry.until, entry.serial));
        Some(entry)
    }

    /// When the next one may return; [`Timestamp::NEVER`] when none waits.
    pub(super) fn next_return(&self) -> Timestamp {
        self.due
            .keys()
            .next()
            .map_or(Timestamp::NEVER, |(until, _)| *until)
    }

    /// The one that is nearest to its return, be it under probe or not.
    pub(super) fn earliest(&self) -> Option<T> {
        let entry = self
            .entries
            .values()
            .min_by_key(|entry| (entry.until, entry.serial))?;
        Some(entry.endpoint.target().clone())
    }

    /// Takes the place of the probe of one that is due and that `wanted` takes.
    pub(super) fn start_probe(
        &mut self,
        now: Timestamp,
        wanted: impl Fn(&T) -> bool,
    ) -> Option<(Arc<Endpoint<T>>, u64)> {
        let (key, target) = self
            .due
            .range(..=(now, u64::MAX))
            .find(|(_, target)| wanted(target))
            .map(|(key, target)| (*key, target.clone()))?;
        self.due.remove(&key);
        let entry = self.entries.get_mut(&target)?;
        entry.probing = true;
        Some((Arc::clone(&entry.endpoint), entry.serial))
    }

    /// The probe of this ejection ended without a verdict: the next request may try.
    pub(super) fn free_probe(&mut self, target: &T, serial: u64) {
        if let Some(entry) = self.entries.get_mut(target)
            && entry.serial == serial
            && entry.probing
        {
            entry.probing = false;
            self.due.insert((entry.until, serial), target.clone());
        }
    }

    pub(super) fn get(&self, target: &T) -> Option<&Entry<T>> {
        self.entries.get(target)
    }

    /// Halves what the nearest `most` have still to wait.
    pub(super) fn hasten(&mut self, now: Timestamp, most: usize) {
        let waiting: Vec<_> = self
            .due
            .range((now, 0)..)
            .take(most)
            .map(|(key, target)| (*key, target.clone()))
            .collect();
        for ((until, serial), target) in waiting {
            let sooner = now + until.since(now) / 2;
            if let Some(entry) = self.entries.get_mut(&target) {
                self.due.remove(&(until, serial));
                entry.until = sooner;
                self.due.insert((sooner, serial), target);
            }
        }
    }
}
