//! When a breaker opens, for how long, and what closes it.

use std::time::Duration;

use super::super::backoff::Backoff;
use super::super::validate::{Faults, Validate, join};
use super::word::COUNT_MAX;

/// Thresholds and times of a circuit breaker.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BreakerSettings {
    /// Opens when this share of the window's requests failed. Range 0.01 to 1, default 0.9: below
    /// it some requests still succeed, which an open breaker would lose.
    pub failure_ratio: f64,
    /// The ratio is not judged on fewer requests than this. Range 1 to 1,000,000, default 20.
    pub minimum_requests: u32,
    /// Opens when this many requests in a row failed. Range 1 to 1,000,000, default none.
    pub consecutive: Option<u32>,
    /// The window of the ratio, in tenths. Range 1 s to 10 min, default 2 s.
    pub window: Duration,
    /// How long it stays open; doubles with every probe that fails. Default 100 ms to 250 ms, of
    /// which half is left to chance: a probe is one request, and each moment that a breaker stays
    /// open after the destination came back loses requests.
    pub open_time: Backoff,
    /// How many probes may be under way. Range 1 to 1,000, default 3.
    pub probes: u32,
    /// How many probes must succeed. Range 1 to 1,000, default 1.
    pub successes_to_close: u32,
}

impl Default for BreakerSettings {
    fn default() -> Self {
        Self {
            failure_ratio: 0.9,
            minimum_requests: 20,
            consecutive: None,
            window: Duration::from_secs(2),
            open_time: Backoff {
                base: Duration::from_millis(100),
                cap: Duration::from_millis(250),
                jitter: 0.5,
            },
            probes: 3,
            successes_to_close: 1,
        }
    }
}

impl Validate for BreakerSettings {
    fn check(&self, at: &str, faults: &mut Faults) {
        faults.range(self.failure_ratio, 0.01, 1.0, at, "failureRatio");
        faults.range(self.minimum_requests, 1, 1_000_000, at, "minimumRequests");
        faults.range(
            self.consecutive.unwrap_or(1),
            1,
            1_000_000,
            at,
            "consecutive",
        );
        faults.duration(
            self.window,
            Duration::from_secs(1),
            Duration::from_secs(600),
            at,
            "window",
        );
        faults.range(self.probes, 1, 1_000.min(COUNT_MAX), at, "probes");
        faults.range(
            self.successes_to_close,
            1,
            1_000.min(COUNT_MAX),
            at,
            "successesToClose",
        );
        self.open_time.check(&join(at, "openTime"), faults);
    }
}
