//! What a run has shown.

use std::time::Duration;

use serde::Serialize;

use crate::resilience::Timestamp;
use crate::scenario::Scenario;

/// Recovery is judged on slices of this length.
const SLICE: Duration = Duration::from_millis(250);
/// A slice in which this share is answered is as good as before.
const WELL: f64 = 0.99;
/// Amplification is that of the worst stretch of this many seconds.
const STRETCH: usize = 10;

/// What happened, by slices of time.
#[derive(Clone, Debug)]
pub struct Trace {
    slices: Vec<Slice>,
    latencies: Vec<Duration>,
    /// Ejections of endpoints that nothing ailed.
    pub false_ejections: u64,
}

/// A quarter of a second.
#[derive(Clone, Copy, Debug, Default)]
pub struct Slice {
    /// Requests that began in it.
    pub sent: u32,
    /// Those of them that were not answered well.
    pub lost: u32,
    /// Attempts that left a proxy in it.
    pub attempts: u32,
}

/// One row of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The scenario.
    pub name: String,
    /// The policy.
    pub policy: String,
    /// Requests of clients.
    pub sent: u64,
    /// Requests without a good answer.
    pub lost: u64,
    /// Attempts per request in the worst ten seconds.
    pub amplification: f64,
    /// Of good answers.
    pub p99_ms: f64,
    /// Until 99 % are answered well and it stays so; `None` if that never happens.
    pub recover_ms: Option<u64>,
    /// Ejections of endpoints that nothing ailed.
    pub false_ejections: u64,
}

impl Trace {
    pub(crate) fn new(length: Duration) -> Self {
        let count = length.as_millis().div_ceil(SLICE.as_millis()) as usize;
        Self {
            slices: vec![Slice::default(); count],
            latencies: Vec::new(),
            false_ejections: 0,
        }
    }

    /// The slices, in order.
    pub fn slices(&self) -> &[Slice] {
        &self.slices
    }

    pub(crate) fn attempt(&mut self, at: Timestamp, counts: bool) {
        if counts && let Some(slice) = self.slice(at) {
            slice.attempts += 1;
        }
    }

    pub(crate) fn answered(&mut self, began: Timestamp, now: Timestamp, well: bool) {
        if let Some(slice) = self.slice(began) {
            slice.sent += 1;
            slice.lost += u32::from(!well);
        }
        if well {
            self.latencies.push(now.since(began));
        }
    }

    fn slice(&mut self, at: Timestamp) -> Option<&mut Slice> {
        let index = at.since(Timestamp::ZERO).as_nanos() / SLICE.as_nanos();
        self.slices.get_mut(index as usize)
    }

    /// The row of this run.
    pub fn row(mut self, scenario: &Scenario, policy: &str) -> Row {
        self.latencies.sort_unstable();
        let rank = (self.latencies.len() * 99).div_ceil(100).saturating_sub(1);
        let p99 = self.latencies.get(rank).copied().unwrap_or_default();
        Row {
            name: scenario.name.to_owned(),
            policy: policy.to_owned(),
            sent: self.slices.iter().map(|slice| u64::from(slice.sent)).sum(),
            lost: self.slices.iter().map(|slice| u64::from(slice.lost)).sum(),
            amplification: (self.amplification() * 1000.0).round() / 1000.0,
            p99_ms: (p99.as_secs_f64() * 10_000.0).round() / 10.0,
            recover_ms: self
                .recovery(scenario.recover_from)
                .map(|time| time.as_millis() as u64),
            false_ejections: self.false_ejections,
        }
    }

    fn amplification(&self) -> f64 {
        let stretch = STRETCH * (Duration::from_secs(1).as_millis() / SLICE.as_millis()) as usize;
        let ratio = |slices: &[Slice]| {
            let sent: u32 = slices.iter().map(|slice| slice.sent).sum();
            let attempts: u32 = slices.iter().map(|slice| slice.attempts).sum();
            f64::from(attempts) / f64::from(sent.max(1))
        };
        self.slices.windows(stretch).map(ratio).fold(0.0, f64::max)
    }

    fn recovery(&self, from: Duration) -> Option<Duration> {
        let is_well =
            |slice: &Slice| f64::from(slice.sent - slice.lost) >= WELL * f64::from(slice.sent);
        let start = (from.as_millis() / SLICE.as_millis()) as usize;
        match self.slices.iter().rposition(|slice| !is_well(slice)) {
            Some(last) if last + 8 >= self.slices.len() => None,
            Some(last) if last >= start => Some(SLICE * (last + 1 - start) as u32),
            _ => Some(Duration::ZERO),
        }
    }
}
