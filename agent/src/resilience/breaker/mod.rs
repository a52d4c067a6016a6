//! The circuit breaker of one (destination, route), fed by the final outcomes of requests.
//!
//! CLOSED lets everything through and watches. OPEN rejects at once and says when the next try is.
//! HALF-OPEN lets a bounded number of probes through: good ones close it, a bad one opens it again,
//! for twice as long. An operator can hold it open or closed.
//!
//! The state, the generation and the places taken by probes share one atomic word, so admission is
//! one load while CLOSED. Every transition starts a new generation; a permit of an older generation
//! is a straggler, whose outcome is no verdict.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::event::{Event, EventSink};
use super::outcome::{Outcome, Verdict};
use super::rolling::RollingCounter;
use super::sync::{AtomicU32, AtomicU64, Ordering};
use super::time::Timestamp;
use word::Word;

#[cfg(test)]
#[cfg(loom)]
mod model;
mod settings;
#[cfg(test)]
#[cfg(not(loom))]
mod tests;
mod word;

pub use settings::BreakerSettings;

const BUCKETS: usize = 10;

/// The state as it is exported: 0 closed, 1 open, 2 half-open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BreakerState {
    /// Requests pass.
    Closed = 0,
    /// Requests are rejected.
    Open = 1,
    /// Probes pass.
    HalfOpen = 2,
}

/// What an operator may impose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Forced {
    /// Rejects everything until released.
    Open,
    /// Passes everything until released; outcomes are not judged.
    Closed,
}

/// Why a breaker moved.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// Too large a share of the window's requests failed.
    FailureRatio {
        /// Failed requests in the window.
        failed: u64,
        /// Requests in the window.
        total: u64,
    },
    /// Too many requests in a row failed.
    ConsecutiveFailures(u32),
    /// The open time has passed.
    OpenTimePassed,
    /// Enough probes succeeded.
    ProbesSucceeded(u32),
    /// A probe failed.
    ProbeFailed,
    /// An operator said so.
    Operator,
}

/// One move of a breaker.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Transition {
    /// Whose breaker, as it was named at its making.
    pub breaker: Arc<str>,
    /// When.
    pub at: Timestamp,
    /// From which state.
    pub from: BreakerState,
    /// To which state.
    pub to: BreakerState,
    /// Why.
    pub cause: Cause,
}

/// A request is not let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the circuit breaker is open")]
pub struct Rejected {
    /// How long until the next try makes sense; `None` while an operator holds the breaker open.
    pub retry_after: Option<Duration>,
}

/// One breaker. Shared by all workers; takes no lock.
#[derive(Debug)]
pub struct Breaker {
    name: Arc<str>,
    settings: BreakerSettings,
    seed: u64,
    word: AtomicU64,
    open_until: AtomicU64,
    reopened: AtomicU32,
    consecutive: AtomicU32,
    total: RollingCounter<BUCKETS>,
    failed: RollingCounter<BUCKETS>,
    rejections: AtomicU64,
    failures: AtomicU64,
    stragglers: AtomicU64,
    sink: Arc<dyn EventSink>,
}

impl Breaker {
    /// A closed breaker. `seed` decides its jitter: two breakers should not have the same.
    pub fn new(
        name: Arc<str>,
        settings: BreakerSettings,
        seed: u64,
        sink: Arc<dyn EventSink>,
    ) -> Arc<Self> {
        Arc::new(Self {
            name,
            seed,
            word: AtomicU64::new(Word::default().0),
            open_until: AtomicU64::new(0),
            reopened: AtomicU32::new(0),
            consecutive: AtomicU32::new(0),
            total: RollingCounter::new(settings.window),
            failed: RollingCounter::new(settings.window),
            rejections: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            stragglers: AtomicU64::new(0),
            settings,
            sink,
        })
    }

    /// Asks to let a request through. The permit may outlive the caller.
    ///
    /// # Errors
    /// [`Rejected`], with the time until the next try.
    pub fn admit(self: &Arc<Self>, now: Timestamp) -> Result<Permit, Rejected> {
        let (generation, kind) = self.let_in(now)?;
        Ok(Permit::new(Arc::clone(self), generation, kind))
    }

    /// As [`Self::admit`], for a caller that sees the request end itself: the permit borrows the
    /// breaker, so that no reference is counted in a cache line that all workers share.
    ///
    /// # Errors
    /// [`Rejected`], with the time until the next try.
    pub fn admit_scoped(&self, now: Timestamp) -> Result<Permit<&Self>, Rejected> {
        let (generation, kind) = self.let_in(now)?;
        Ok(Permit::new(self, generation, kind))
    }

    fn let_in(&self, now: Timestamp) -> Result<(u32, Kind), Rejected> {
        let mut seen = self.load();
        loop {
            let next = match (seen.forced(), seen.state()) {
                (Some(Forced::Closed), _) | (None, BreakerState::Closed) => {
                    return Ok((seen.generation(), Kind::Request));
                }
                (Some(Forced::Open), _) => return Err(self.reject(None)),
                (None, BreakerState::Open) => {
                    let until = Timestamp::from_nanos(self.open_until.load(Ordering::Acquire));
                    if now < until {
                        return Err(self.reject(Some(until.since(now))));
                    }
                    seen.moved(BreakerState::HalfOpen).with_probe_taken()
                }
                (None, BreakerState::HalfOpen) => {
                    if seen.taken() >= self.settings.probes {
                        return Err(self.reject(Some(self.settings.open_time.base)));
                    }
                    seen.with_probe_taken()
                }
            };
            match self.swap(seen, next) {
                Ok(()) => {
                    if seen.state() == BreakerState::Open {
                        self.tell(now, seen, next, Cause::OpenTimePassed);
                    }
                    return Ok((next.generation(), Kind::Probe));
                }
                Err(there) => seen = there,
            }
        }
    }

    /// Holds the breaker open or closed, or releases it (`None`), closed and with nothing remembered.
    pub fn force(&self, forced: Option<Forced>, now: Timestamp) {
        let mut seen = self.load();
        loop {
            let state = if forced == Some(Forced::Open) {
                BreakerState::Open
            } else {
                BreakerState::Closed
            };
            let next = seen.moved(state).with_forced(forced);
            match self.swap(seen, next) {
                Ok(()) => {
                    self.forget();
                    return self.tell(now, seen, next, Cause::Operator);
                }
                Err(there) => seen = there,
            }
        }
    }

    /// The state now. An open breaker whose time has passed is still open until someone asks.
    pub fn state(&self) -> BreakerState {
        self.load().state()
    }

    /// What an operator imposed.
    pub fn forced(&self) -> Option<Forced> {
        self.load().forced()
    }

    /// Whose breaker this is.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Requests rejected since the start.
    pub fn rejections(&self) -> u64 {
        self.rejections.load(Ordering::Relaxed)
    }

    /// Failures seen since the start.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Outcomes that came too late to be verdicts, since the start.
    pub fn stragglers(&self) -> u64 {
        self.stragglers.load(Ordering::Relaxed)
    }

    /// Probes under way.
    pub fn probes(&self) -> u32 {
        self.load().taken()
    }

    fn settle(&self, generation: u32, kind: Kind, verdict: Option<Verdict>, now: Timestamp) {
        if verdict == Some(Verdict::Bad) {
            self.failures.fetch_add(1, Ordering::Relaxed);
        }
        let current = self.load();
        if current.generation() != generation {
            if verdict.is_some() {
                self.stragglers.fetch_add(1, Ordering::Relaxed);
            }
            return;
        }
        match (kind, verdict) {
            (Kind::Request, _) if current.forced().is_some() => {}
            (Kind::Request, Some(verdict)) => self.watch(current, verdict, now),
            (Kind::Request, None) => {}
            (Kind::Probe, verdict) => self.judge_probe(generation, verdict, now),
        }
    }

    /// CLOSED: counts, and opens at a threshold.
    fn watch(&self, seen: Word, verdict: Verdict, now: Timestamp) {
        self.total.add(now);
        if verdict == Verdict::Good {
            // A shared cache line is written only when that changes something.
            if self.consecutive.load(Ordering::Relaxed) != 0 {
                self.consecutive.store(0, Ordering::Relaxed);
            }
            return;
        }
        self.failed.add(now);
        let in_a_row = self
            .consecutive
            .fetch_add(1, Ordering::Relaxed)
            .saturating_add(1);
        if let Some(cause) = self.reason_to_open(in_a_row, now) {
            self.open(seen, cause, now);
        }
    }

    fn reason_to_open(&self, in_a_row: u32, now: Timestamp) -> Option<Cause> {
        if self
            .settings
            .consecutive
            .is_some_and(|limit| in_a_row >= limit)
        {
            return Some(Cause::ConsecutiveFailures(in_a_row));
        }
        let (failed, total) = (self.failed.sum(now), self.total.sum(now));
        let enough = total >= u64::from(self.settings.minimum_requests);
        (enough && failed as f64 >= self.settings.failure_ratio * total as f64)
            .then_some(Cause::FailureRatio { failed, total })
    }

    /// HALF-OPEN: gives the place back and acts on the verdict.
    fn judge_probe(&self, generation: u32, verdict: Option<Verdict>, now: Timestamp) {
        let mut seen = self.load();
        while seen.generation() == generation {
            let freed = seen.with_probe_freed();
            let (next, cause) = match verdict {
                None => (freed, None),
                Some(Verdict::Bad) => return self.open(seen, Cause::ProbeFailed, now),
                Some(Verdict::Good)
                    if freed.successes() + 1 >= self.settings.successes_to_close =>
                {
                    let successes = freed.successes() + 1;
                    (
                        seen.moved(BreakerState::Closed),
                        Some(Cause::ProbesSucceeded(successes)),
                    )
                }
                Some(Verdict::Good) => (freed.with_success(), None),
            };
            if cause.is_some() {
                self.forget();
            }
            match self.swap(seen, next) {
                Ok(()) => {
                    if let Some(cause) = cause {
                        self.reopened.store(0, Ordering::Relaxed);
                        self.tell(now, seen, next, cause);
                    }
                    return;
                }
                Err(there) => seen = there,
            }
        }
    }

    /// Opens from the generation of `seen`; of several that try, one does.
    fn open(&self, mut seen: Word, cause: Cause, now: Timestamp) {
        let generation = seen.generation();
        let round = self.reopened.load(Ordering::Relaxed);
        let wait = self
            .settings
            .open_time
            .wait_seeded(round, self.seed ^ u64::from(generation));
        // Before the word: whoever sees OPEN must see until when. Only writers of the same
        // generation come here, and they all write about the same moment.
        self.open_until
            .store((now + wait).as_nanos(), Ordering::Release);
        while seen.generation() == generation {
            let next = seen.moved(BreakerState::Open);
            match self.swap(seen, next) {
                Ok(()) => {
                    self.reopened
                        .store(round.saturating_add(1), Ordering::Relaxed);
                    return self.tell(now, seen, next, cause);
                }
                Err(there) => seen = there,
            }
        }
    }

    fn forget(&self) {
        self.total.reset();
        self.failed.reset();
        self.consecutive.store(0, Ordering::Relaxed);
    }

    fn reject(&self, retry_after: Option<Duration>) -> Rejected {
        self.rejections.fetch_add(1, Ordering::Relaxed);
        Rejected { retry_after }
    }

    fn tell(&self, at: Timestamp, from: Word, to: Word, cause: Cause) {
        self.sink.event(Event::Breaker(Transition {
            breaker: Arc::clone(&self.name),
            at,
            from: from.state(),
            to: to.state(),
            cause,
        }));
    }

    fn load(&self) -> Word {
        Word(self.word.load(Ordering::Acquire))
    }

    fn swap(&self, seen: Word, next: Word) -> Result<(), Word> {
        self.word
            .compare_exchange(seen.0, next.0, Ordering::AcqRel, Ordering::Acquire)
            .map(drop)
            .map_err(Word)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Request,
    Probe,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Settled {
    NotYet,
    Done,
}

/// Leave to send one request. A probe's permit holds a place, which it gives back whatever happens:
/// dropped without an outcome (a client that cancels, a shed, a panic) it frees it without a verdict.
///
/// Whoever holds it owns a share of the breaker, or borrows it (`B`).
#[derive(Debug)]
#[must_use]
pub struct Permit<B: Deref<Target = Breaker> = Arc<Breaker>> {
    breaker: B,
    generation: u32,
    kind: Kind,
    settled: Settled,
}

impl<B: Deref<Target = Breaker>> Permit<B> {
    const fn new(breaker: B, generation: u32, kind: Kind) -> Self {
        Self {
            breaker,
            generation,
            kind,
            settled: Settled::NotYet,
        }
    }

    /// Tells how the request ended.
    pub fn finish(mut self, outcome: Outcome, now: Timestamp) {
        self.settled = Settled::Done;
        self.settle(outcome.of_destination(), now);
    }

    /// Whether this request decides over a half-open breaker.
    pub fn is_probe(&self) -> bool {
        self.kind == Kind::Probe
    }

    fn settle(&self, verdict: Option<Verdict>, now: Timestamp) {
        self.breaker
            .settle(self.generation, self.kind, verdict, now);
    }
}

impl<B: Deref<Target = Breaker>> Drop for Permit<B> {
    fn drop(&mut self) {
        if self.settled == Settled::NotYet {
            // Without a verdict, time plays no part.
            self.settle(None, Timestamp::ZERO);
        }
    }
}
