//! `XBackendTrafficPolicy` (GEP-3388): its `retryConstraint` is a retry budget.

use std::time::Duration;

use gateway_api::experimental::xbackendtrafficpolicies::{
    XBackendTrafficPolicy, XBackendTrafficPolicyRetryConstraint,
};

use super::super::object::Fault;
use super::PolicyFacts;
use crate::mesh::parse_duration;
use crate::mesh::policy::PolicyKind;
use crate::mesh::policy::spec::{PolicyTargetRef, RetryBudget, Span, TrafficPolicySpec};

/// `apiVersion` of an XBackendTrafficPolicy.
pub const BACKEND_TRAFFIC_POLICY_API_VERSION: &str = "gateway.networking.x-k8s.io/v1alpha1";

impl PolicyFacts {
    /// Checks an `XBackendTrafficPolicy`.
    pub fn of_backend_traffic_policy(policy: &XBackendTrafficPolicy) -> Result<Self, Fault> {
        let spec = &policy.spec;
        if spec.session_persistence.is_some() {
            return Err(Fault::new(
                "spec.sessionPersistence",
                "is taken from a route's rule only",
            ));
        }
        let target = |target: &gateway_api::experimental::xbackendtrafficpolicies::XBackendTrafficPolicyTargetRefs| {
            PolicyTargetRef {
                group: target.group.clone(),
                kind: target.kind.clone(),
                name: target.name.clone(),
                section_name: None,
            }
        };
        let retry_budget = spec.retry_constraint.as_ref().map(budget).transpose()?;
        let spec = TrafficPolicySpec {
            target_refs: spec.target_refs.iter().map(target).collect(),
            retry_budget,
            ..TrafficPolicySpec::default()
        };
        Self::new(PolicyKind::XBackendTrafficPolicy, &policy.metadata, &spec)
    }
}

/// With the API's defaults: 20 % over 10 s, and at least 10 retries per second.
fn budget(constraint: &XBackendTrafficPolicyRetryConstraint) -> Result<RetryBudget, Fault> {
    let field = |name: &str| format!("spec.retryConstraint.{name}");
    let budget = constraint.budget.as_ref();
    let percent = budget.and_then(|budget| budget.percent).unwrap_or(20);
    if !(0..=100).contains(&percent) {
        let reason = format!("{percent} is not a percentage: must be from 0 to 100");
        return Err(Fault::new(field("budget.percent"), reason));
    }
    let window = budget.and_then(|budget| budget.interval.as_deref());
    let window = interval(&field("budget.interval"), window.unwrap_or("10s"))?;
    let least = Duration::from_secs(1);
    if window < least || window > Duration::from_secs(3600) {
        let reason = format!("must be from 1s to 1h, is {}", Span(window));
        return Err(Fault::new(field("budget.interval"), reason));
    }
    let minimum = constraint.min_retry_rate.as_ref();
    let count = minimum.and_then(|minimum| minimum.count).unwrap_or(10);
    let over = minimum.and_then(|minimum| minimum.interval.as_deref());
    let over = interval(&field("minRetryRate.interval"), over.unwrap_or("1s"))?;
    let rate = count as f64 / over.as_secs_f64();
    if !(0.0..=10_000.0).contains(&rate) {
        let reason = format!("must be from 0 to 10000 per second, is {rate}");
        return Err(Fault::new(field("minRetryRate.count"), reason));
    }
    Ok(RetryBudget {
        ratio: Some(percent as f64 / 100.0),
        minimum_rate: Some(rate),
        window: Some(Span(window)),
    })
}

fn interval(field: &str, text: &str) -> Result<Duration, Fault> {
    parse_duration(text)
        .filter(|interval| !interval.is_zero())
        .ok_or_else(|| {
            Fault::new(
                field,
                format!("{text:?} is not a duration above 0, like \"10s\""),
            )
        })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn facts(constraint: Value) -> Result<RetryBudget, String> {
        let policy = json!({
            "apiVersion": BACKEND_TRAFFIC_POLICY_API_VERSION, "kind": "XBackendTrafficPolicy",
            "metadata": { "name": "cart", "namespace": "shop" },
            "spec": { "targetRefs": [{ "group": "", "kind": "Service", "name": "cart" }],
                      "retryConstraint": constraint }
        });
        let policy: XBackendTrafficPolicy = serde_json::from_value(policy).unwrap();
        PolicyFacts::of_backend_traffic_policy(&policy)
            .map(|facts| facts.spec.retry_budget.clone().unwrap())
            .map_err(|fault| format!("{}: {}", fault.field, fault.reason))
    }

    #[test]
    fn a_retry_constraint_is_a_retry_budget() {
        let constraint = json!({
            "budget": { "percent": 30, "interval": "20s" },
            "minRetryRate": { "count": 5, "interval": "2s" }
        });
        let expected = RetryBudget {
            ratio: Some(0.3),
            minimum_rate: Some(2.5),
            window: Some(Span(Duration::from_secs(20))),
        };
        assert_eq!(facts(constraint), Ok(expected));
    }

    #[test]
    fn what_is_left_out_has_the_default_of_the_api() {
        let expected = RetryBudget {
            ratio: Some(0.2),
            minimum_rate: Some(10.0),
            window: Some(Span(Duration::from_secs(10))),
        };
        assert_eq!(facts(json!({})), Ok(expected));
    }

    #[test]
    fn what_is_out_of_range_is_refused_by_its_own_field() {
        for (constraint, expected) in [
            (
                json!({ "budget": { "percent": 200 } }),
                "spec.retryConstraint.budget.percent: 200 is not a percentage",
            ),
            (
                json!({ "budget": { "interval": "10" } }),
                "spec.retryConstraint.budget.interval: \"10\" is not a duration",
            ),
            (
                json!({ "budget": { "interval": "2h" } }),
                "spec.retryConstraint.budget.interval: must be from 1s to 1h, is 2h",
            ),
            (
                json!({ "minRetryRate": { "count": -1 } }),
                "spec.retryConstraint.minRetryRate.count: must be from 0 to 10000 per second",
            ),
            (
                json!({ "minRetryRate": { "interval": "0s" } }),
                "spec.retryConstraint.minRetryRate.interval: \"0s\" is not a duration above 0",
            ),
        ] {
            let error = facts(constraint).unwrap_err();
            assert!(error.starts_with(expected), "{error} is not {expected}");
        }
    }

    #[test]
    fn a_session_is_asked_for_on_a_route() {
        let policy = json!({
            "metadata": { "name": "cart" },
            "spec": { "targetRefs": [{ "group": "", "kind": "Service", "name": "cart" }],
                      "sessionPersistence": {} }
        });
        let mut policy = policy;
        policy["apiVersion"] = json!(BACKEND_TRAFFIC_POLICY_API_VERSION);
        policy["kind"] = json!("XBackendTrafficPolicy");
        let policy: XBackendTrafficPolicy = serde_json::from_value(policy).unwrap();
        let fault = PolicyFacts::of_backend_traffic_policy(&policy).unwrap_err();
        assert_eq!(fault.field, "spec.sessionPersistence");
    }
}
