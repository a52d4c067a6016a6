//! The book of ejections: who is out, for whom, and how often before.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::super::endpoint::Target;
use super::super::time::Timestamp;
use super::shelf::Shelf;
use super::{Scope, SourceId, SourceState};

/// Guarded by the ejector's lock.
#[derive(Debug)]
pub(super) struct Book<T> {
    pub(super) everyone: Shelf<T>,
    pub(super) by_source: HashMap<SourceId, (Arc<SourceState<T>>, Shelf<T>)>,
    /// How often an endpoint that came back had been ejected, and when it came back.
    past: HashMap<T, (u32, Timestamp)>,
    pub(super) serial: u64,
}

/// The most endpoints whose past ejections are remembered; beyond it the past is forgotten at once,
/// which only makes the next ejection shorter.
const PAST_MAX: usize = 4096;

impl<T> Default for Book<T> {
    fn default() -> Self {
        Self {
            everyone: Shelf::default(),
            by_source: HashMap::new(),
            past: HashMap::new(),
            serial: 0,
        }
    }
}

impl<T: Target> Book<T> {
    pub(super) fn shelf(&mut self, scope: Scope) -> Option<&mut Shelf<T>> {
        match scope {
            Scope::Everyone => Some(&mut self.everyone),
            Scope::Source(id) => self.by_source.get_mut(&id).map(|(_, shelf)| shelf),
        }
    }

    pub(super) fn is_out(&self, scope: Scope, target: &T) -> bool {
        let for_source = |id| {
            self.by_source
                .get(&id)
                .is_some_and(|(_, shelf)| shelf.contains(target))
        };
        self.everyone.contains(target) || matches!(scope, Scope::Source(id) if for_source(id))
    }

    /// How many would be out in this scope with one more.
    pub(super) fn out_after(&self, scope: Scope) -> usize {
        let own = match scope {
            Scope::Everyone => 0,
            Scope::Source(id) => self.by_source.get(&id).map_or(0, |(_, shelf)| shelf.len()),
        };
        self.everyone.len() + own + 1
    }

    /// How often the endpoint was ejected lately: one less for each `cap` that it held out since.
    pub(super) fn times_before(&mut self, target: &T, cap: Duration, now: Timestamp) -> u32 {
        let Some((times, returned)) = self.past.remove(target) else {
            return 0;
        };
        let healed = (now.since(returned).as_secs_f64() / cap.as_secs_f64().max(0.001)) as u32;
        times.saturating_sub(healed)
    }

    pub(super) fn remember(&mut self, target: T, times: u32, now: Timestamp) {
        if self.past.len() >= PAST_MAX {
            self.past.clear();
        }
        self.past.insert(target, (times, now));
    }
}
