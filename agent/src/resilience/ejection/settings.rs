//! When an endpoint is ejected, for how long, and how many may be.

use std::time::Duration;

use super::super::backoff::Backoff;
use super::super::validate::{Faults, Validate, join};

/// Thresholds, times and bounds of ejection. Runs at the source: each node judges for itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EjectionSettings {
    /// Ejects after this many failures in a row. Range 1 to 1,000, default 5; none switches it off.
    pub consecutive_failures: Option<u32>,
    /// Ejects at a share of failures. None switches it off.
    pub failure_ratio: Option<FailureRatio>,
    /// Ejects what is worse than its peers. None switches it off.
    pub success_rate: Option<SuccessRate>,
    /// The window of ratio and rate. Range 1 s to 10 min, default 10 s.
    pub window: Duration,
    /// How long an endpoint stays ejected; doubles each time. Default 1 s to 30 s, half by chance.
    pub ejection_time: Backoff,
    /// At most this share of the endpoints is ejected, counted after the ejection. Range 0 to 1,
    /// default 0.5. At the limit no more are ejected, which is counted.
    pub max_ejected: f64,
    /// At least this many endpoints are never ejected, whatever the share. Range 1 to 100,000,
    /// default 1.
    pub floor: u32,
    /// Below this share of endpoints that stand, ejection is ignored: too many are gone for the
    /// rest to carry. Range 0 to 1, default 0.3.
    pub panic_threshold: f64,
}

/// The failure-ratio trigger.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FailureRatio {
    /// Ejects at this share of failures. Range 0.01 to 1, default 0.5.
    pub ratio: f64,
    /// Not judged on fewer requests in the window. Range 1 to 1,000,000, default 10.
    pub minimum_requests: u32,
}

/// The peers trigger: below `mean − factor × standard deviation` of the peers' success rates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SuccessRate {
    /// Range 0.1 to 10, default 1.9 (Envoy's).
    pub deviations: f64,
    /// Not judged with fewer endpoints that have enough requests. Range 2 to 100,000, default 5.
    pub minimum_endpoints: u32,
    /// Requests in the window for an endpoint to be judged. Range 1 to 1,000,000, default 100.
    pub minimum_requests: u32,
    /// An endpoint is not ejected while its failures are within this of the mean, as among
    /// equals the deviation is next to nothing. Range 0 to 1, default 0.05.
    pub tolerance: f64,
}

impl Default for EjectionSettings {
    fn default() -> Self {
        Self {
            consecutive_failures: Some(5),
            failure_ratio: Some(FailureRatio {
                ratio: 0.5,
                minimum_requests: 10,
            }),
            success_rate: Some(SuccessRate {
                deviations: 1.9,
                minimum_endpoints: 5,
                minimum_requests: 100,
                tolerance: 0.05,
            }),
            window: Duration::from_secs(10),
            ejection_time: Backoff {
                base: Duration::from_secs(1),
                cap: Duration::from_secs(30),
                jitter: 0.5,
            },
            max_ejected: 0.5,
            floor: 1,
            panic_threshold: 0.3,
        }
    }
}

impl EjectionSettings {
    /// How many of `total` endpoints may be ejected.
    pub fn ejectable(&self, total: usize) -> usize {
        let by_share = (self.max_ejected * total as f64) as usize;
        by_share.min(total.saturating_sub(self.floor.max(1) as usize))
    }
}

impl Validate for EjectionSettings {
    fn check(&self, at: &str, faults: &mut Faults) {
        faults.range(
            self.consecutive_failures.unwrap_or(1),
            1,
            1_000,
            at,
            "consecutiveFailures",
        );
        if let Some(trigger) = &self.failure_ratio {
            let at = join(at, "failureRatio");
            faults.range(trigger.ratio, 0.01, 1.0, &at, "ratio");
            faults.range(
                trigger.minimum_requests,
                1,
                1_000_000,
                &at,
                "minimumRequests",
            );
        }
        if let Some(trigger) = &self.success_rate {
            let at = join(at, "successRate");
            faults.range(trigger.deviations, 0.1, 10.0, &at, "deviations");
            faults.range(
                trigger.minimum_endpoints,
                2,
                100_000,
                &at,
                "minimumEndpoints",
            );
            faults.range(
                trigger.minimum_requests,
                1,
                1_000_000,
                &at,
                "minimumRequests",
            );
            faults.share(trigger.tolerance, &at, "tolerance");
        }
        faults.duration(
            self.window,
            Duration::from_secs(1),
            Duration::from_secs(600),
            at,
            "window",
        );
        self.ejection_time.check(&join(at, "ejectionTime"), faults);
        faults.share(self.max_ejected, at, "maxEjected");
        faults.range(self.floor, 1, 100_000, at, "floor");
        faults.share(self.panic_threshold, at, "panicThreshold");
    }
}
