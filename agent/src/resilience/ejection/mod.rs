//! Endpoint ejection (outlier detection), fed by single attempts.
//!
//! An endpoint is ejected for the source that saw it fail at once, and for everybody when the case
//! stands without the source that contributed most, or when there is only one source. It returns
//! through one real request: a good one brings it back, a bad one doubles the time.
//!
//! The bound on how many are ejected is counted after the ejection, and asked for again whenever
//! endpoints come or go: then the one that is nearest to its return goes back first.
//!
//! All of this is off the path of a request that succeeds: the book is locked only to eject, to
//! return and to probe.

use std::sync::Arc;

use serde::Serialize;

use super::endpoint::{Endpoint, Target};
use super::event::{Event, EventSink};
use super::outcome::Verdict;
use super::sync::{AtomicU32, AtomicU64, Mutex, Ordering};
use super::time::Timestamp;
use book::Book;
pub use settings::{EjectionSettings, FailureRatio, SuccessRate};
use shelf::Shelf;
pub use source::{SourceId, SourceState};

mod book;
pub(super) mod health;
mod peers;
mod settings;
mod shelf;
mod source;
#[cfg(test)]
#[cfg(not(loom))]
mod tests;

/// How many others a good probe brings nearer to their return.
const HASTENED: usize = 32;

/// For whom an endpoint is ejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// For all sources of this node.
    Everyone,
    /// For the one that saw it fail.
    Source(SourceId),
}

/// Why an endpoint was ejected.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// That many attempts in a row failed.
    ConsecutiveFailures(u32),
    /// Too large a share of attempts failed.
    FailureRatio {
        /// Failed attempts in the window.
        failed: u64,
        /// Attempts in the window.
        total: u64,
    },
    /// It succeeds less often than its peers.
    SuccessRate {
        /// Its share of successes.
        rate: f64,
        /// The least that its peers made acceptable.
        threshold: f64,
    },
    /// It failed the request that was to bring it back.
    ProbeFailed,
}

/// Why an endpoint came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Return {
    /// A real request succeeded.
    ProbeSucceeded,
    /// Too few others were left.
    Floor,
}

/// An endpoint was ejected or came back.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Movement {
    /// The destination that it belongs to.
    pub destination: Arc<str>,
    /// Which endpoint.
    pub endpoint: String,
    /// When.
    pub at: Timestamp,
    /// For whom.
    pub scope: Scope,
    /// What happened.
    pub change: Change,
}

/// Which way an endpoint moved.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// Out.
    Ejected {
        /// Why.
        cause: Cause,
        /// Until when at least.
        until: Timestamp,
        /// For the how-manieth time in a row.
        times: u32,
    },
    /// Back.
    Returned(Return),
}

/// The place of one probe, given back whatever happens to the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Probe {
    scope: Scope,
    serial: u64,
}

/// Decides who is ejected from one destination.
#[derive(Debug)]
pub struct Ejector<T> {
    name: Arc<str>,
    settings: EjectionSettings,
    seed: u64,
    book: Mutex<Book<T>>,
    /// When the next endpoint may be probed by anybody; read on every pick.
    next_return: AtomicU64,
    ejected: AtomicU32,
    total: AtomicU32,
    held_by_bound: AtomicU64,
    sink: Arc<dyn EventSink>,
}

impl<T: Target> Ejector<T> {
    pub(super) fn new(
        name: Arc<str>,
        settings: EjectionSettings,
        seed: u64,
        sink: Arc<dyn EventSink>,
    ) -> Self {
        Self {
            name,
            settings,
            seed,
            book: Mutex::new(Book::default()),
            next_return: AtomicU64::new(Timestamp::NEVER.as_nanos()),
            ejected: AtomicU32::new(0),
            total: AtomicU32::new(0),
            held_by_bound: AtomicU64::new(0),
            sink,
        }
    }

    pub(super) const fn settings(&self) -> &EjectionSettings {
        &self.settings
    }

    /// Endpoints ejected for everybody now.
    pub fn ejected(&self) -> usize {
        self.ejected.load(Ordering::Relaxed) as usize
    }

    /// Ejections that did not happen because too few would have been left.
    pub fn held_by_bound(&self) -> u64 {
        self.held_by_bound.load(Ordering::Relaxed)
    }

    /// Whether so few stand that ejection is ignored.
    pub(super) fn panics(&self) -> bool {
        let (ejected, total) = (self.ejected(), self.total.load(Ordering::Relaxed) as usize);
        ejected > 0
            && ((total - ejected.min(total)) as f64) < self.settings.panic_threshold * total as f64
    }

    /// One attempt of `source` at `endpoint` ended.
    pub(super) fn judge(
        &self,
        endpoint: &Arc<Endpoint<T>>,
        source: &Arc<SourceState<T>>,
        verdict: Verdict,
        alone: impl FnOnce() -> bool,
        now: Timestamp,
    ) {
        if endpoint.is_ejected() || source.ejects(endpoint.target()) {
            return;
        }
        match verdict {
            Verdict::Good => endpoint.health.good(source.id(), now),
            Verdict::Bad => {
                if let Some((scope, cause)) =
                    endpoint.health.bad(source.id(), &self.settings, alone, now)
                {
                    self.eject(endpoint, scope, Some(source), cause, now);
                }
            }
        }
    }

    /// An endpoint whose time has passed and that this request may probe.
    pub(super) fn due(
        &self,
        source: &SourceState<T>,
        now: Timestamp,
        wanted: impl Fn(&T) -> bool,
    ) -> Option<(Arc<Endpoint<T>>, Probe)> {
        let everyone_due = self.next_return.load(Ordering::Relaxed) <= now.as_nanos();
        let source_due = source.next_return() <= now;
        if !everyone_due && !source_due {
            return None;
        }
        let mut book = self.book.lock();
        let found = self.start_probe(&mut book, source, now, wanted);
        self.publish(&mut book);
        found
    }

    fn start_probe(
        &self,
        book: &mut Book<T>,
        source: &SourceState<T>,
        now: Timestamp,
        wanted: impl Fn(&T) -> bool,
    ) -> Option<(Arc<Endpoint<T>>, Probe)> {
        if let Some((endpoint, serial)) = book.everyone.start_probe(now, &wanted) {
            let scope = Scope::Everyone;
            return Some((endpoint, Probe { scope, serial }));
        }
        let everyone = &book.everyone;
        let (_, shelf) = book.by_source.get_mut(&source.id())?;
        let (endpoint, serial) =
            shelf.start_probe(now, |target| wanted(target) && !everyone.contains(target))?;
        let scope = Scope::Source(source.id());
        Some((endpoint, Probe { scope, serial }))
    }

    /// The request that was to bring an endpoint back has ended, or was dropped (`None`).
    pub(super) fn probed(
        &self,
        endpoint: &Arc<Endpoint<T>>,
        probe: Probe,
        verdict: Option<(Verdict, Timestamp)>,
    ) {
        let mut events = Vec::new();
        let mut book = self.book.lock();
        let target = endpoint.target();
        let Some(shelf) = book.shelf(probe.scope) else {
            return;
        };
        let Some(entry) = shelf
            .get(target)
            .filter(|entry| entry.serial == probe.serial)
        else {
            return;
        };
        let times = entry.times;
        match verdict {
            None => shelf.free_probe(target, probe.serial),
            Some((Verdict::Good, now)) => {
                self.release(
                    &mut book,
                    probe.scope,
                    target,
                    Return::ProbeSucceeded,
                    now,
                    &mut events,
                );
                // What ailed this one may have ailed the others: they are asked sooner.
                if let Some(shelf) = book.shelf(probe.scope) {
                    shelf.hasten(now, HASTENED);
                }
            }
            Some((Verdict::Bad, now)) => {
                let event = self.shelve(
                    &mut book,
                    endpoint,
                    probe.scope,
                    Cause::ProbeFailed,
                    times.saturating_add(1),
                    now,
                );
                events.extend(event);
            }
        }
        self.publish(&mut book);
        drop(book);
        self.tell(events);
    }

    /// Ejects, within the bounds.
    pub(super) fn eject(
        &self,
        endpoint: &Arc<Endpoint<T>>,
        scope: Scope,
        source: Option<&Arc<SourceState<T>>>,
        cause: Cause,
        now: Timestamp,
    ) {
        let mut events = Vec::new();
        let mut book = self.book.lock();
        if let (Scope::Source(id), Some(source)) = (scope, source) {
            book.by_source
                .entry(id)
                .or_insert_with(|| (Arc::clone(source), Shelf::default()));
        }
        let total = self.total.load(Ordering::Relaxed) as usize;
        let target = endpoint.target();
        if book.is_out(scope, target) {
            return;
        }
        if book.out_after(scope) > self.settings.ejectable(total) {
            self.held_by_bound.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let times = book
            .times_before(target, self.settings.ejection_time.cap, now)
            .saturating_add(1);
        events.extend(self.shelve(&mut book, endpoint, scope, cause, times, now));
        self.hold_bounds(&mut book, now, &mut events);
        self.publish(&mut book);
        drop(book);
        self.tell(events);
    }

    /// The set has changed: forgets those that are gone and holds the bounds for those that stay.
    /// `gone` are the removed ones, `total` is how many there are now.
    pub(super) fn members_changed(&self, gone: &[T], total: usize, now: Timestamp) {
        let mut events = Vec::new();
        let mut book = self.book.lock();
        self.total
            .store(u32::try_from(total).unwrap_or(u32::MAX), Ordering::Relaxed);
        for target in gone {
            // An ejected endpoint that discovery takes away and brings back is as sick as before,
            // which its past remembers.
            if let Some(entry) = book.everyone.take(target) {
                entry.endpoint.set_ejected(false);
                book.remember(target.clone(), entry.times, now);
            }
            for (_, shelf) in book.by_source.values_mut() {
                shelf.take(target);
            }
        }
        self.hold_bounds(&mut book, now, &mut events);
        self.publish(&mut book);
        drop(book);
        self.tell(events);
    }

    /// A source is gone, and what was ejected for it alone.
    pub(super) fn forget_source(&self, id: SourceId) {
        let mut book = self.book.lock();
        if let Some((state, _)) = book.by_source.remove(&id) {
            state.publish(&Shelf::default());
        }
    }

    fn shelve(
        &self,
        book: &mut Book<T>,
        endpoint: &Arc<Endpoint<T>>,
        scope: Scope,
        cause: Cause,
        times: u32,
        now: Timestamp,
    ) -> Option<Movement> {
        book.serial += 1;
        let serial = book.serial;
        let until = now
            + self
                .settings
                .ejection_time
                .wait_seeded(times.saturating_sub(1), self.seed ^ serial);
        book.shelf(scope)?
            .put(Arc::clone(endpoint), until, times, serial);
        if scope == Scope::Everyone {
            endpoint.set_ejected(true);
            // What is out for all needs no entry for one.
            for (_, shelf) in book.by_source.values_mut() {
                shelf.take(endpoint.target());
            }
        }
        Some(self.movement(
            endpoint.target(),
            scope,
            Change::Ejected {
                cause,
                until,
                times,
            },
            now,
        ))
    }

    fn release(
        &self,
        book: &mut Book<T>,
        scope: Scope,
        target: &T,
        why: Return,
        now: Timestamp,
        events: &mut Vec<Movement>,
    ) {
        let Some(entry) = book.shelf(scope).and_then(|shelf| shelf.take(target)) else {
            return;
        };
        if scope == Scope::Everyone {
            entry.endpoint.set_ejected(false);
        }
        entry.endpoint.judge_from(now);
        if why == Return::ProbeSucceeded {
            entry.endpoint.load.forget(now);
        }
        book.remember(target.clone(), entry.times, now);
        events.push(self.movement(target, scope, Change::Returned(why), now));
    }

    /// Brings endpoints back until the bounds hold, for all and for each source.
    fn hold_bounds(&self, book: &mut Book<T>, now: Timestamp, events: &mut Vec<Movement>) {
        let allowed = self
            .settings
            .ejectable(self.total.load(Ordering::Relaxed) as usize);
        while book.everyone.len() > allowed {
            let Some(target) = book.everyone.earliest() else {
                break;
            };
            self.release(book, Scope::Everyone, &target, Return::Floor, now, events);
        }
        let sources: Vec<SourceId> = book.by_source.keys().copied().collect();
        for id in sources {
            let everyone = book.everyone.len();
            while let Some(shelf) = book.shelf(Scope::Source(id))
                && everyone + shelf.len() > allowed
                && let Some(target) = shelf.earliest()
            {
                self.release(book, Scope::Source(id), &target, Return::Floor, now, events);
            }
        }
    }

    /// Makes the book's state visible to picks, which do not lock it.
    fn publish(&self, book: &mut Book<T>) {
        self.ejected.store(
            u32::try_from(book.everyone.len()).unwrap_or(u32::MAX),
            Ordering::Relaxed,
        );
        self.next_return
            .store(book.everyone.next_return().as_nanos(), Ordering::Relaxed);
        for (state, shelf) in book.by_source.values() {
            state.publish(shelf);
        }
        book.by_source.retain(|_, (_, shelf)| shelf.len() > 0);
    }

    fn movement(&self, target: &T, scope: Scope, change: Change, at: Timestamp) -> Movement {
        Movement {
            destination: Arc::clone(&self.name),
            endpoint: format!("{target:?}"),
            at,
            scope,
            change,
        }
    }

    fn tell(&self, movements: Vec<Movement>) {
        for movement in movements {
            self.sink.event(Event::Ejection(movement));
        }
    }
}
