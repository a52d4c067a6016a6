//! What one endpoint's attempts say about it, told apart by who made them.
//!
//! A proxy that serves many tenants must not let one poison an endpoint for all: a tenant whose
//! requests always fail would eject it. So failures are remembered by source, and an endpoint is
//! ejected for everybody only if the case stands without the source that contributed most. A success
//! costs one atomic as long as nobody has seen a failure.

use std::time::Duration;

use super::super::rolling::RollingCounter;
use super::super::sync::{AtomicU32, Mutex, Ordering};
use super::super::time::{Timestamp, nanos};
use super::{Cause, EjectionSettings, Scope, SourceId};

/// The most sources whose failures an endpoint tells apart. Beyond it the one that failed least
/// recently is folded into "others", who count as one source.
const RECORDS_MAX: usize = 8;

/// The health of one endpoint.
#[derive(Debug)]
pub struct Health {
    ok: RollingCounter<2>,
    failed: RollingCounter<2>,
    /// How many records there are: zero lets a success pass without the lock.
    suspicions: AtomicU32,
    window_nanos: u64,
    records: Mutex<Records>,
}

#[derive(Debug, Default)]
struct Records {
    by_source: Vec<Record>,
    /// Failures of the present run by sources that are no longer told apart.
    others: u32,
}

#[derive(Debug)]
struct Record {
    source: SourceId,
    /// Failures in a row, as this source saw it.
    streak: u32,
    /// This source's part of the run of failures that everybody saw.
    joint: u32,
    ok: Window,
    failed: Window,
    last_failure: Timestamp,
}

/// A count over the present and the previous window.
#[derive(Debug, Default)]
struct Window {
    epoch: u64,
    current: u32,
    previous: u32,
}

impl Health {
    pub(in super::super) fn new(window: Duration) -> Self {
        Self {
            // Two buckets of a window each: between one and two windows are remembered.
            ok: RollingCounter::new(window.saturating_mul(2)),
            failed: RollingCounter::new(window.saturating_mul(2)),
            suspicions: AtomicU32::new(0),
            window_nanos: nanos(window).max(1),
            records: Mutex::new(Records::default()),
        }
    }

    /// Requests that succeeded and failed in the last window or two.
    pub(in super::super) fn counts(&self, now: Timestamp) -> (u64, u64) {
        (self.ok.sum(now), self.failed.sum(now))
    }

    pub(in super::super) fn clear(&self) {
        self.ok.reset();
        self.failed.reset();
        let mut records = self.records.lock();
        *records = Records::default();
        self.suspicions.store(0, Ordering::Relaxed);
    }

    pub(in super::super) fn good(&self, source: SourceId, now: Timestamp) {
        self.ok.add(now);
        if self.suspicions.load(Ordering::Relaxed) == 0 {
            return;
        }
        let epoch = self.epoch(now);
        let mut records = self.records.lock();
        records.others = 0;
        for record in &mut records.by_source {
            record.joint = 0;
            if record.source == source {
                record.streak = 0;
                record.ok.add(epoch);
            }
        }
        records
            .by_source
            .retain(|record| record.streak > 0 || record.failed.sum(epoch) > 0);
        self.suspicions
            .store(records.by_source.len() as u32, Ordering::Relaxed);
    }

    /// Counts a failure and says whether it is one too many, and for whom. `alone` tells whether
    /// this source is the only one there is.
    pub(in super::super) fn bad(
        &self,
        source: SourceId,
        settings: &EjectionSettings,
        alone: impl FnOnce() -> bool,
        now: Timestamp,
    ) -> Option<(Scope, Cause)> {
        self.failed.add(now);
        let epoch = self.epoch(now);
        let mut records = self.records.lock();
        let place = records.place_of(source, epoch);
        let record = &mut records.by_source[place];
        record.streak = record.streak.saturating_add(1);
        record.joint = record.joint.saturating_add(1);
        record.failed.add(epoch);
        record.last_failure = now;
        self.suspicions
            .store(records.by_source.len() as u32, Ordering::Relaxed);

        let by_all = records
            .run_of_all(settings)
            .or_else(|| self.ratio_of_all(&records, settings, now));
        if let Some(cause) = by_all {
            return Some((Scope::Everyone, cause));
        }
        let cause = records.by_source[place].own(settings, epoch)?;
        Some((
            if alone() {
                Scope::Everyone
            } else {
                Scope::Source(source)
            },
            cause,
        ))
    }

    /// For whom an endpoint that is worse than its peers goes: everybody, unless its failures are
    /// one source's.
    pub(super) fn scope_of_failures(&self, now: Timestamp) -> Scope {
        let epoch = self.epoch(now);
        let records = self.records.lock();
        let failed = self.failed.sum(now);
        match records
            .by_source
            .iter()
            .max_by_key(|record| record.failed.sum(epoch))
        {
            Some(worst) if u64::from(worst.failed.sum(epoch)) * 10 >= failed * 9 => {
                Scope::Source(worst.source)
            }
            _ => Scope::Everyone,
        }
    }

    /// The ratio over all sources, if it holds without the one that failed most.
    fn ratio_of_all(
        &self,
        records: &Records,
        settings: &EjectionSettings,
        now: Timestamp,
    ) -> Option<Cause> {
        let trigger = settings.failure_ratio?;
        let (ok, failed) = self.counts(now);
        let total = ok + failed;
        let is_bad = |ok: u64, failed: u64| failed as f64 >= trigger.ratio * (ok + failed) as f64;
        if total < u64::from(trigger.minimum_requests) || !is_bad(ok, failed) {
            return None;
        }
        let epoch = self.epoch(now);
        let worst = records
            .by_source
            .iter()
            .max_by_key(|record| record.failed.sum(epoch))?;
        let others_ok = ok.saturating_sub(u64::from(worst.ok.sum(epoch)));
        let others_failed = failed.saturating_sub(u64::from(worst.failed.sum(epoch)));
        (others_failed >= 2 && is_bad(others_ok, others_failed))
            .then_some(Cause::FailureRatio { failed, total })
    }

    const fn epoch(&self, now: Timestamp) -> u64 {
        now.as_nanos() / self.window_nanos
    }
}

impl Records {
    fn place_of(&mut self, source: SourceId, epoch: u64) -> usize {
        if let Some(place) = self
            .by_source
            .iter()
            .position(|record| record.source == source)
        {
            return place;
        }
        if self.by_source.len() >= RECORDS_MAX {
            self.by_source
                .retain(|record| record.streak > 0 || record.failed.sum(epoch) > 0);
        }
        if self.by_source.len() >= RECORDS_MAX {
            let oldest =
                (0..self.by_source.len()).min_by_key(|place| self.by_source[*place].last_failure);
            if let Some(oldest) = oldest {
                self.others = self
                    .others
                    .saturating_add(self.by_source.swap_remove(oldest).joint);
            }
        }
        self.by_source.push(Record {
            source,
            streak: 0,
            joint: 0,
            ok: Window::default(),
            failed: Window::default(),
            last_failure: Timestamp::ZERO,
        });
        self.by_source.len() - 1
    }

    /// A run of failures seen by all together, long enough, and not one source's alone.
    fn run_of_all(&self, settings: &EjectionSettings) -> Option<Cause> {
        let limit = settings.consecutive_failures?;
        let run = self
            .by_source
            .iter()
            .map(|record| record.joint)
            .fold(self.others, u32::saturating_add);
        let most = self
            .by_source
            .iter()
            .map(|record| record.joint)
            .fold(self.others, u32::max);
        let without_the_worst = run - most;
        let enough = 2.min(limit - limit.min(1)).max(1);
        (run >= limit && without_the_worst >= enough).then_some(Cause::ConsecutiveFailures(run))
    }
}

impl Record {
    /// What this source alone has seen.
    fn own(&self, settings: &EjectionSettings, epoch: u64) -> Option<Cause> {
        if settings
            .consecutive_failures
            .is_some_and(|limit| self.streak >= limit)
        {
            return Some(Cause::ConsecutiveFailures(self.streak));
        }
        let trigger = settings.failure_ratio?;
        let (failed, ok) = (
            u64::from(self.failed.sum(epoch)),
            u64::from(self.ok.sum(epoch)),
        );
        let total = failed + ok;
        let bad = total >= u64::from(trigger.minimum_requests)
            && failed as f64 >= trigger.ratio * total as f64;
        bad.then_some(Cause::FailureRatio { failed, total })
    }
}

impl Window {
    fn add(&mut self, epoch: u64) {
        match epoch.saturating_sub(self.epoch) {
            0 => {}
            1 => {
                self.previous = self.current;
                self.current = 0;
            }
            _ => (self.previous, self.current) = (0, 0),
        }
        self.epoch = self.epoch.max(epoch);
        self.current = self.current.saturating_add(1);
    }

    fn sum(&self, epoch: u64) -> u32 {
        match epoch.saturating_sub(self.epoch) {
            0 => self.current.saturating_add(self.previous),
            1 => self.current,
            _ => 0,
        }
    }
}
