//! What is a failure, and what it leads to.

use std::ops::RangeInclusive;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::retrying::BackoffSpec;
use super::units::{Span, Switch};
use super::{Apply, set};
use crate::mesh::policy::TrafficPolicy;
use crate::resilience::ejection::{FailureRatio, SuccessRate};
use crate::resilience::validate::Faults;
use crate::resilience::{BreakerSettings, EjectionSettings};

/// Which answers are failures of the server: they count for the breaker and for ejection.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(inline)]
pub struct Failures {
    /// HTTP statuses, each as `503` or `500-599`. At most 16; default 500-599.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 16),
        inner(regex(pattern = r"^[1-5][0-9]{2}(-[1-5][0-9]{2})?$"))
    )]
    pub http_statuses: Option<Vec<String>>,
    /// gRPC statuses. Each 1 to 16; default UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE,
    /// DATA_LOSS.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), inner(range(min = 1, max = 16)))]
    pub grpc_statuses: Option<Vec<u8>>,
}

/// The circuit breaker of a destination and route. Runs at the source: each node judges for itself,
/// by what its own pods see. Open, it answers at once: 503, or gRPC UNAVAILABLE, with
/// `x-undermesh-reason: circuit_open` and `retry-after`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(inline)]
pub struct Breaker {
    /// Disabled: it never opens by itself. Default Enabled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<Switch>,
    /// Opens when this share of the window's requests failed. Range 0.01 to 1, default 0.9.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.01, max = 1.0))]
    pub failure_ratio: Option<f64>,
    /// The ratio is not judged on fewer requests of this node than this. Range 1 to 1000000,
    /// default 20.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub minimum_requests: Option<u32>,
    /// Opens when this many requests of this node in a row failed. Range 1 to 1000000; 0, the
    /// default: not by that.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub consecutive_failures: Option<u32>,
    /// The window of the ratio. Range 1s to 10m, default 2s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<Span>,
    /// How long it stays open; doubles with every probe that fails. Default 100ms to 250ms, half of
    /// it left to chance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub open_time: Option<BackoffSpec>,
    /// How many probes, which are requests, may be under way when it is half-open. Range 1 to 1000,
    /// default 3.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000))]
    pub probes: Option<u32>,
    /// How many probes must succeed to close it. Range 1 to 1000, default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000))]
    pub successes_to_close: Option<u32>,
}

/// When an endpoint gets no requests for a while. Runs at the source: each node judges for itself,
/// for all of its pods and for each.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(inline)]
pub struct OutlierEjection {
    /// Disabled: no endpoint is ejected. Default Enabled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<Switch>,
    /// Ejects after this many failures in a row. Range 1 to 1000, default 5; 0: not by that.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000))]
    pub consecutive_failures: Option<u32>,
    /// Ejects at a share of failures.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure_ratio: Option<FailureRatioSpec>,
    /// Ejects what succeeds less often than its peers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub success_rate: Option<SuccessRateSpec>,
    /// The window of ratio and rate. Range 1s to 10m, default 10s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<Span>,
    /// How long an endpoint stays ejected; doubles each time. Default 1s to 30s, half of it left to
    /// chance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ejection_time: Option<BackoffSpec>,
    /// At most this share of the endpoints is ejected. Range 0 to 1, default 0.5. At the limit no
    /// more are, which is counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub max_ejected: Option<f64>,
    /// At least this many endpoints are never ejected. Range 1 to 100000, default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000))]
    pub floor: Option<u32>,
    /// Below this share of endpoints that stand, ejection is ignored. Range 0 to 1, default 0.3.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub panic_threshold: Option<f64>,
}

/// Ejects at a share of failures.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(inline)]
pub struct FailureRatioSpec {
    /// Disabled: not by that. Default Enabled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<Switch>,
    /// The share. Range 0.01 to 1, default 0.5.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.01, max = 1.0))]
    pub ratio: Option<f64>,
    /// Not judged on fewer requests in the window. Range 1 to 1000000, default 10.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub minimum_requests: Option<u32>,
}

/// Ejects what is below the mean of its peers' success rates by so many standard deviations.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(inline)]
pub struct SuccessRateSpec {
    /// Disabled: not by that. Default Enabled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<Switch>,
    /// Range 0.1 to 10, default 1.9.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.1, max = 10.0))]
    pub deviations: Option<f64>,
    /// Not judged with fewer endpoints that have enough requests. Range 2 to 100000, default 5.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 2, max = 100_000))]
    pub minimum_endpoints: Option<u32>,
    /// Requests in the window for an endpoint to be judged. Range 1 to 1000000, default 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub minimum_requests: Option<u32>,
    /// An endpoint stays while its failures are within this of the mean. Range 0 to 1, default 0.05.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub tolerance: Option<f64>,
}

impl Apply for Failures {
    fn apply(&self, to: &mut TrafficPolicy) {
        let Self {
            http_statuses,
            grpc_statuses,
        } = self;
        let ranges = |texts: &Vec<String>| texts.iter().filter_map(|text| statuses(text)).collect();
        let http = http_statuses.as_ref().map(ranges);
        set(&mut to.settings.http.failures, http);
        set(&mut to.settings.grpc.failures, grpc_statuses.clone());
    }

    fn check(&self, at: &str, faults: &mut Faults) {
        let lists = [
            (
                "httpStatuses",
                self.http_statuses.as_ref().map_or(0, Vec::len),
            ),
            (
                "grpcStatuses",
                self.grpc_statuses.as_ref().map_or(0, Vec::len),
            ),
        ];
        for (field, length) in lists {
            let reason = format_args!("must be at most 16, are {length}");
            faults.require(length <= 16, at, field, reason);
        }
        let texts = self.http_statuses.as_deref().unwrap_or_default();
        for (index, text) in texts.iter().enumerate() {
            let reason = format_args!("must be like 503 or 500-599, is {text:?}");
            let field = format!("httpStatuses[{index}]");
            faults.require(statuses(text).is_some(), at, &field, reason);
        }
    }
}

/// `503` or `500-599`, within 100 to 599.
fn statuses(text: &str) -> Option<RangeInclusive<u16>> {
    let one = |text: &str| {
        let digits = text.len() == 3 && text.bytes().all(|c| c.is_ascii_digit());
        let code: u16 = digits.then(|| text.parse().ok()).flatten()?;
        (100..=599).contains(&code).then_some(code)
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (one(first)?, one(last)?);
    (first <= last).then_some(first..=last)
}

impl Apply for Breaker {
    fn apply(&self, to: &mut TrafficPolicy) {
        let Self {
            mode,
            failure_ratio,
            minimum_requests,
            consecutive_failures,
            window,
            open_time,
            probes,
            successes_to_close,
        } = self;
        let breaker = &mut to.settings.breaker;
        if *mode == Some(Switch::Enabled) && is_off(breaker) {
            *breaker = BreakerSettings::default();
        }
        set(&mut breaker.failure_ratio, *failure_ratio);
        set(&mut breaker.minimum_requests, *minimum_requests);
        let consecutive = consecutive_failures.map(|most| (most > 0).then_some(most));
        set(&mut breaker.consecutive, consecutive);
        set(&mut breaker.window, window.map(|window| window.0));
        if let Some(open_time) = open_time {
            open_time.apply_to(&mut breaker.open_time);
        }
        set(&mut breaker.probes, *probes);
        set(&mut breaker.successes_to_close, *successes_to_close);
        if *mode == Some(Switch::Disabled) {
            // More requests than a window can hold.
            breaker.minimum_requests = NEVER;
            breaker.consecutive = None;
        }
    }

    fn check(&self, at: &str, faults: &mut Faults) {
        if let Some(open_time) = &self.open_time {
            open_time.check(&format!("{at}.openTime"), faults);
        }
    }
}

/// As many requests as do not come within the longest window.
pub(super) const NEVER: u32 = u32::MAX;

fn is_off(breaker: &BreakerSettings) -> bool {
    breaker.minimum_requests == NEVER
}

impl Apply for OutlierEjection {
    fn apply(&self, to: &mut TrafficPolicy) {
        let Self {
            mode,
            consecutive_failures,
            failure_ratio,
            success_rate,
            window,
            ejection_time,
            max_ejected,
            floor,
            panic_threshold,
        } = self;
        let ejection = &mut to.settings.ejection;
        let off = ejection.consecutive_failures.is_none()
            && ejection.failure_ratio.is_none()
            && ejection.success_rate.is_none();
        if *mode == Some(Switch::Enabled) && off {
            *ejection = EjectionSettings::default();
        }
        let consecutive = consecutive_failures.map(|most| (most > 0).then_some(most));
        set(&mut ejection.consecutive_failures, consecutive);
        if let Some(spec) = failure_ratio {
            spec.apply_to(&mut ejection.failure_ratio);
        }
        if let Some(spec) = success_rate {
            spec.apply_to(&mut ejection.success_rate);
        }
        set(&mut ejection.window, window.map(|window| window.0));
        if let Some(time) = ejection_time {
            time.apply_to(&mut ejection.ejection_time);
        }
        set(&mut ejection.max_ejected, *max_ejected);
        set(&mut ejection.floor, *floor);
        set(&mut ejection.panic_threshold, *panic_threshold);
        if *mode == Some(Switch::Disabled) {
            ejection.consecutive_failures = None;
            ejection.failure_ratio = None;
            ejection.success_rate = None;
        }
    }

    fn check(&self, at: &str, faults: &mut Faults) {
        if let Some(time) = &self.ejection_time {
            time.check(&format!("{at}.ejectionTime"), faults);
        }
    }
}

impl FailureRatioSpec {
    fn apply_to(&self, to: &mut Option<FailureRatio>) {
        let Self {
            mode,
            ratio,
            minimum_requests,
        } = self;
        let Some(default) = EjectionSettings::default().failure_ratio else {
            return;
        };
        let trigger = to.get_or_insert(default);
        set(&mut trigger.ratio, *ratio);
        set(&mut trigger.minimum_requests, *minimum_requests);
        if *mode == Some(Switch::Disabled) {
            *to = None;
        }
    }
}

impl SuccessRateSpec {
    fn apply_to(&self, to: &mut Option<SuccessRate>) {
        let Self {
            mode,
            deviations,
            minimum_endpoints,
            minimum_requests,
            tolerance,
        } = self;
        let Some(default) = EjectionSettings::default().success_rate else {
            return;
        };
        let trigger = to.get_or_insert(default);
        set(&mut trigger.deviations, *deviations);
        set(&mut trigger.minimum_endpoints, *minimum_endpoints);
        set(&mut trigger.minimum_requests, *minimum_requests);
        set(&mut trigger.tolerance, *tolerance);
        if *mode == Some(Switch::Disabled) {
            *to = None;
        }
    }
}
