//! One way that requests may go: to a destination, over a rule or none, under the policy in force.

use std::sync::Arc;
use std::time::Duration;

use crate::mesh::ObjectName;
use crate::mesh::TrafficPolicy;
use crate::mesh::route::{RouteRetry, Rule};
use crate::outbound::destinations::{Destination, EndpointId, Reachable, Route};
use crate::resilience::retry::Condition;
use crate::resilience::timeout::Timeouts;
use crate::resilience::{Backoff, Code, RetryBudget, RetryPolicy};

/// What requests over one rule to one destination have in common.
pub(super) struct Leg {
    /// The Service that is asked.
    pub(super) service: Option<ObjectName>,
    /// The rule that leads there.
    pub(super) rule: Option<Arc<Rule>>,
    /// The policy in force, without what the rule says.
    pub(super) policy: Arc<TrafficPolicy>,
    /// Its time limits, and the rule's over them.
    pub(super) timeouts: Timeouts,
    /// Its retries, and the rule's over them.
    pub(super) retry: RetryPolicy,
    /// Where to.
    pub(super) to: To,
}

/// Where requests go.
pub(super) enum To {
    /// To an endpoint of a Service's port.
    Service(ToService),
    /// To the pod whose address the client dialled. Nothing is balanced or broken there, and what
    /// was never sent is paid from a budget that all such requests of the node share.
    Pod(EndpointId, Arc<RetryBudget>),
    /// The mesh has no such port any more.
    Nowhere,
}

/// A destination as this pod's requests over this rule see it.
pub(super) struct ToService {
    pub(super) destination: Arc<Destination>,
    pub(super) route: Arc<Route>,
    pub(super) endpoints: Reachable,
}

impl Leg {
    /// The rule's name, if one leads here.
    pub(super) fn rule_name(&self) -> Option<&Arc<str>> {
        self.rule.as_ref().map(|rule| &rule.name)
    }
}

/// `timeouts` of a rule over those of the policy.
pub(super) fn timeouts(policy: &Timeouts, rule: Option<&Rule>) -> Timeouts {
    let mut timeouts = *policy;
    if let Some(own) = rule.and_then(|rule| rule.timeouts) {
        timeouts.request = own.request.unwrap_or(timeouts.request);
        timeouts.attempt = own.backend_request.unwrap_or(timeouts.attempt);
    }
    timeouts
}

/// `retry` of a rule over that of the policy. A rule that asks for retries gets them for broken
/// connections and attempts that took too long too (GEP-1731).
pub(super) fn retry(policy: &RetryPolicy, rule: Option<&Rule>) -> RetryPolicy {
    let mut retry = policy.clone();
    let Some(own) = rule.and_then(|rule| rule.retry.as_ref()) else {
        return retry;
    };
    let RouteRetry {
        codes,
        attempts,
        backoff,
    } = own;
    retry.retries = attempts.unwrap_or(retry.retries);
    if !codes.is_empty() {
        let codes = codes.iter().map(|code| Condition::Code(Code::Http(*code)));
        retry.conditions = codes
            .chain([Condition::Reset, Condition::Timeout])
            .collect();
    } else if retry.conditions.is_empty() {
        retry.conditions = Condition::usual();
    }
    if let Some(base) = *backoff {
        retry.backoff = at_least(base);
    }
    retry
}

/// A wait of at least so much, which still does not come from all at the same time: half of it is
/// added by chance, and it doubles up to ten times.
fn at_least(base: Duration) -> Backoff {
    Backoff {
        base: base.saturating_mul(2),
        cap: base.saturating_mul(10),
        jitter: 0.5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::route::{Filters, RouteId, RouteKind, RouteTimeouts};
    use crate::resilience::Validate;

    const SECOND: Duration = Duration::from_secs(1);

    fn rule(timeouts: Option<RouteTimeouts>, retry: Option<RouteRetry>) -> Rule {
        Rule {
            name: "HTTPRoute/shop/cart/0".into(),
            route: RouteId {
                kind: RouteKind::Http,
                name: ObjectName::new("shop", "cart"),
            },
            matches: Vec::new(),
            filters: Filters::default(),
            backends: Vec::new(),
            timeouts,
            retry,
            session: None,
        }
    }

    #[test]
    fn a_rules_timeouts_stand_above_the_policys_and_zero_is_no_limit() {
        let policy = Timeouts {
            request: Some(10 * SECOND),
            attempt: Some(2 * SECOND),
            ..Timeouts::default()
        };
        let own = |request, backend_request| {
            let rule = rule(
                Some(RouteTimeouts {
                    request,
                    backend_request,
                }),
                None,
            );
            let merged = timeouts(&policy, Some(&rule));
            (merged.request, merged.attempt)
        };
        assert_eq!(own(None, None), (Some(10 * SECOND), Some(2 * SECOND)));
        assert_eq!(own(Some(None), None), (None, Some(2 * SECOND)));
        assert_eq!(own(Some(Some(SECOND)), Some(None)), (Some(SECOND), None));
        assert_eq!(timeouts(&policy, None), policy);
    }

    #[test]
    fn a_rule_that_asks_for_retries_without_codes_gets_the_usual_ones() {
        let number = RouteRetry {
            attempts: Some(4),
            ..RouteRetry::default()
        };
        let merged = retry(&RetryPolicy::default(), Some(&rule(None, Some(number))));
        assert_eq!(merged.retries, 4);
        assert_eq!(merged.conditions, Condition::usual());
        let codes = RouteRetry {
            codes: vec![418],
            backoff: Some(SECOND),
            ..RouteRetry::default()
        };
        let merged = retry(&RetryPolicy::default(), Some(&rule(None, Some(codes))));
        let teapot = Condition::Code(Code::Http(418));
        assert_eq!(
            merged.conditions,
            [teapot, Condition::Reset, Condition::Timeout]
        );
        let mut rng = rand::rng();
        for round in 0..10 {
            assert!(merged.backoff.wait(round, &mut rng) >= SECOND);
        }
        assert!(merged.validate().is_ok());
        let silent = retry(&RetryPolicy::default(), Some(&rule(None, None)));
        assert_eq!(silent, RetryPolicy::default());
    }
}
