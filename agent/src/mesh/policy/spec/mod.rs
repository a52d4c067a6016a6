//! A policy as it is written: `TrafficPolicy` of `undermesh.io/v1alpha1`.
//!
//! These types are the one schema: manifests are read into them, the CRD is made of them, and what
//! they say is laid over the defaults field by field. Their comments are the CRD's descriptions.

mod balancing;
mod breaking;
mod limits;
mod outcome;
mod retrying;
#[cfg(test)]
mod tests;
mod units;

pub use balancing::{
    Balancing, BalancingAlgorithm, HashOn, HashSource, LocalitySpec, Prefer, SlowStart,
};
pub use breaking::{Breaker, FailureRatioSpec, Failures, OutlierEjection, SuccessRateSpec};
pub use limits::{Adaptive, Limits, RateLimit, RateSpec};
pub use outcome::{
    BackendRef, FallbackSpec, Fault, FaultAbort, FaultDelay, FaultHeader, FaultHeaderMatch,
    ResponseSpec, TimeoutsSpec,
};
pub use retrying::{BackoffSpec, Retries, RetryBudget, RetryMethods, RetryOn};
pub use units::{Percentage, Span, Switch};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Layer, TrafficPolicy};
use crate::resilience::validate::{Faults, Invalid, Validate};

/// What traffic to a Service, or over a route, gets. What is left out has its default, or what a
/// weaker policy says: that of a route comes before that of the Service's port, that before the
/// Service's, that before an XBackendTrafficPolicy's.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(inline)]
pub struct TrafficPolicySpec {
    /// What it is attached to, of its own namespace. 1 to 16. Of two policies with one target the
    /// older one is in force, then the one whose name comes first.
    #[schemars(length(min = 1, max = 16))]
    pub target_refs: Vec<PolicyTargetRef>,
    /// How an endpoint is chosen. For Services only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balancing: Option<Balancing>,
    /// Which endpoints come first. For Services only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub locality: Option<LocalitySpec>,
    /// How an endpoint that is new, or came back, warms up. For Services only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slow_start: Option<SlowStart>,
    /// When a failed attempt is made again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retries: Option<Retries>,
    /// What pays for retries. For Services only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_budget: Option<RetryBudget>,
    /// Which answers are failures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failures: Option<Failures>,
    /// When requests are rejected at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub breaker: Option<Breaker>,
    /// When an endpoint gets no requests for a while. For Services only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outlier_ejection: Option<OutlierEjection>,
    /// How many at once. For routes `inFlight` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// How often. `total` is for Services only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit: Option<RateLimit>,
    /// Faults on purpose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<Fault>,
    /// How long things may take. `connect` and `idle` are for Services only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeouts: Option<TimeoutsSpec>,
    /// What is left when the destination cannot answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<FallbackSpec>,
}

/// What a policy is attached to (Gateway API `LocalPolicyTargetReferenceWithSectionName`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(inline)]
pub struct PolicyTargetRef {
    /// `""` for a Service, `gateway.networking.k8s.io` for a route.
    #[serde(default)]
    #[schemars(length(max = 253))]
    pub group: String,
    /// Service, HTTPRoute, GRPCRoute, TLSRoute or TCPRoute.
    #[schemars(length(min = 1, max = 63))]
    pub kind: String,
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// One port of a Service: its name, or its number where it has none. Default all ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub section_name: Option<String>,
}

/// What can be laid over a policy.
trait Apply {
    /// Puts in force what is given, and leaves the rest as it is.
    fn apply(&self, to: &mut TrafficPolicy);

    /// What is wrong with it that the settings it makes cannot tell.
    fn check(&self, _at: &str, _faults: &mut Faults) {}
}

/// Puts a value in force, if there is one.
fn set<T>(to: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *to = value;
    }
}

impl TrafficPolicy {
    /// What these layers make over the defaults, the strongest last.
    #[must_use]
    pub fn of(layers: &[Layer]) -> Self {
        let mut policy = Self::default();
        for layer in layers {
            layer.spec.apply(&mut policy, &layer.name.namespace);
        }
        policy.settle();
        policy.sources = layers
            .iter()
            .rev()
            .map(|layer| layer.name.clone())
            .collect();
        policy
    }

    /// Brings together what different layers say of things that depend on one another.
    fn settle(&mut self) {
        let settings = &mut self.settings;
        if let (Some(request), Some(attempt)) =
            (settings.timeouts.request, &mut settings.timeouts.attempt)
        {
            *attempt = request.min(*attempt);
        }
        for backoff in [
            &mut settings.retry.backoff,
            &mut settings.breaker.open_time,
            &mut settings.ejection.ejection_time,
        ] {
            backoff.cap = backoff.cap.max(backoff.base);
        }
        if let Some(adaptive) = &mut settings.limits.adaptive {
            adaptive.most = adaptive.most.max(adaptive.least);
            adaptive.initial = adaptive.initial.clamp(adaptive.least, adaptive.most);
        }
    }
}

impl TrafficPolicySpec {
    fn apply(&self, to: &mut TrafficPolicy, namespace: &str) {
        for (_, part) in self.parts() {
            part.apply(to);
        }
        if let Some(fallback) = &self.fallback {
            fallback.apply(to, namespace);
        }
    }

    /// All that is given but the fallback, each with its name.
    fn parts(&self) -> impl Iterator<Item = (&'static str, &dyn Apply)> {
        let Self {
            target_refs: _,
            balancing,
            locality,
            slow_start,
            retries,
            retry_budget,
            failures,
            breaker,
            outlier_ejection,
            limits,
            rate_limit,
            fault,
            timeouts,
            fallback: _,
        } = self;
        fn part<'a, A: Apply>(
            name: &'static str,
            part: &'a Option<A>,
        ) -> Option<(&'static str, &'a dyn Apply)> {
            part.as_ref().map(|part| (name, part as &dyn Apply))
        }
        [
            part("balancing", balancing),
            part("locality", locality),
            part("slowStart", slow_start),
            part("retries", retries),
            part("retryBudget", retry_budget),
            part("failures", failures),
            part("breaker", breaker),
            part("outlierEjection", outlier_ejection),
            part("limits", limits),
            part("rateLimit", rate_limit),
            part("fault", fault),
            part("timeouts", timeouts),
        ]
        .into_iter()
        .flatten()
    }

    /// What is wrong with the settings themselves: every field out of its range. What it is attached
    /// to is not looked at.
    #[must_use]
    pub fn faults(&self) -> Vec<Invalid> {
        let mut faults = Faults::default();
        for (name, part) in self.parts() {
            part.check(name, &mut faults);
        }
        if let Some(fallback) = &self.fallback {
            fallback.check("fallback", &mut faults);
        }
        let mut found = faults.into_vec();
        let mut policy = TrafficPolicy::default();
        // A breaker that is off has thresholds out of range, on purpose; what is written has not.
        let mut given = self.clone();
        if let Some(breaker) = &mut given.breaker {
            breaker.mode = None;
        }
        if let Some(adaptive) = given
            .limits
            .as_mut()
            .and_then(|limits| limits.adaptive.as_mut())
        {
            adaptive.mode = None;
        }
        given.apply(&mut policy, "");
        policy.settle();
        let mut faults = Faults::default();
        policy.settings.check("", &mut faults);
        policy.connections.check("limits", &mut faults);
        policy.streams.check("timeouts", &mut faults);
        let of_settings = faults.into_vec().into_iter().map(|fault| Invalid {
            field: written(&fault.field),
            reason: fault.reason,
        });
        for fault in of_settings {
            if found.iter().all(|known| known.field != fault.field) {
                found.push(fault);
            }
        }
        found
    }

    /// The fields that hold for a whole Service, so that a policy of a route cannot have them.
    #[must_use]
    pub fn service_only(&self) -> Vec<&'static str> {
        let limits = self.limits.as_ref();
        let timeouts = self.timeouts.as_ref();
        [
            ("balancing", self.balancing.is_some()),
            ("locality", self.locality.is_some()),
            ("slowStart", self.slow_start.is_some()),
            ("retryBudget", self.retry_budget.is_some()),
            ("outlierEjection", self.outlier_ejection.is_some()),
            (
                "limits.connections",
                limits.is_some_and(|limits| limits.connections.is_some()),
            ),
            (
                "limits.pending",
                limits.is_some_and(|limits| limits.pending.is_some()),
            ),
            (
                "limits.requestsPerConnection",
                limits.is_some_and(|limits| limits.requests_per_connection.is_some()),
            ),
            (
                "limits.adaptive",
                limits.is_some_and(|limits| limits.adaptive.is_some()),
            ),
            (
                "rateLimit.total",
                self.rate_limit
                    .as_ref()
                    .is_some_and(|rate| rate.total.is_some()),
            ),
            (
                "timeouts.connect",
                timeouts.is_some_and(|timeouts| timeouts.connect.is_some()),
            ),
            (
                "timeouts.idle",
                timeouts.is_some_and(|timeouts| timeouts.idle.is_some()),
            ),
        ]
        .into_iter()
        .filter_map(|(field, given)| given.then_some(field))
        .collect()
    }
}

/// Where the fields of [`crate::resilience::Policy`] are written. The first that fits is it.
const WRITTEN: [(&str, &str); 22] = [
    ("http.failures", "failures.httpStatuses"),
    ("grpc.failures", "failures.grpcStatuses"),
    ("timeouts.backendRequest", "timeouts.attempt"),
    ("retry.retries", "retries.attempts"),
    ("retry.codes", "retries.httpStatuses"),
    ("retry.", "retries."),
    ("budget.", "retryBudget."),
    ("breaker.consecutive", "breaker.consecutiveFailures"),
    ("ejection.", "outlierEjection."),
    ("balance.slowStartMinimum", "slowStart.minimum"),
    ("balance.slowStart", "slowStart.window"),
    ("balance.overprovisioning", "locality.overprovisioning"),
    ("balance.", "balancing."),
    (
        "limits.rates.source.perSecond",
        "rateLimit.perSource.requestsPerSecond",
    ),
    ("limits.rates.source", "rateLimit.perSource"),
    (
        "limits.rates.route.perSecond",
        "rateLimit.perRoute.requestsPerSecond",
    ),
    ("limits.rates.route", "rateLimit.perRoute"),
    (
        "limits.rates.total.perSecond",
        "rateLimit.total.requestsPerSecond",
    ),
    ("limits.rates.total", "rateLimit.total"),
    ("limits.concurrency", "limits.inFlight"),
    ("fallback.status", "fallback.response.status"),
    ("fallback.body", "fallback.response.body"),
];

fn written(field: &str) -> String {
    for (ours, theirs) in WRITTEN {
        if let Some(rest) = field.strip_prefix(ours) {
            return format!("{theirs}{rest}");
        }
    }
    field.to_owned()
}
