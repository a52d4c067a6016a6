//! What traffic to a Service, or over a route, gets: the policy in force.

mod connections;
mod hash;
mod locality;

pub use super::route::{RouteId, RouteKind};
pub use connections::{ConnectionLimits, StreamTimeouts};
pub use hash::HashKey;
pub use locality::{Locality, Nearness};

use http::{HeaderMap, HeaderName, HeaderValue};

use super::ObjectName;
use crate::resilience::Policy;

/// What traffic to a Service's port gets, on one route or on none: all policies that attach to it,
/// laid over one another field by field, and the defaults where none says anything.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TrafficPolicy {
    /// The objects that it was put together from, the strongest first; none: all is default.
    pub sources: Vec<ObjectName>,
    /// Retries, budget, breaker, ejection, balancing, limits, faults, fallback. Requests in flight
    /// are limited by [`crate::resilience::limit::LimitSettings::concurrency`].
    pub settings: Policy<FallbackBackend>,
    /// What an endpoint is chosen by where `settings.balance` hashes: the first of these that a
    /// request has. None of them: any endpoint.
    pub hash: Vec<HashKey>,
    /// Which endpoints come first.
    pub locality: Locality,
    /// Limits of connections.
    pub connections: ConnectionLimits,
    /// How long connections and streams may be silent, and last.
    pub streams: StreamTimeouts,
    /// Only requests with all of these headers get the faults of `settings.fault`.
    pub fault_match: Vec<HeaderMatch>,
}

impl TrafficPolicy {
    /// Whether a request with these headers may get a fault.
    #[must_use]
    pub fn faults_apply_to(&self, headers: &HeaderMap) -> bool {
        self.fault_match.iter().all(|one| one.matches(headers))
    }
}

/// The Service that answers when the one that was asked cannot: always of the policy's own
/// namespace, so that nobody sends traffic where he was not let.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FallbackBackend {
    /// The Service.
    pub service: ObjectName,
    /// Its port.
    pub port: u16,
}

/// A header that a request must have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderMatch {
    /// Its name.
    pub name: HeaderName,
    /// Its value; none: any.
    pub value: Option<HeaderValue>,
}

impl HeaderMatch {
    /// Whether it has it: of several values, one must match.
    #[must_use]
    pub fn matches(&self, headers: &HeaderMap) -> bool {
        match &self.value {
            Some(wanted) => headers.get_all(&self.name).iter().any(|one| one == wanted),
            None => headers.contains_key(&self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_apply_to_requests_that_have_every_header() {
        let mut policy = TrafficPolicy::default();
        let mut headers = HeaderMap::new();
        assert!(policy.faults_apply_to(&headers));
        policy.fault_match = vec![
            HeaderMatch {
                name: HeaderName::from_static("x-test"),
                value: Some(HeaderValue::from_static("chaos")),
            },
            HeaderMatch {
                name: HeaderName::from_static("x-user"),
                value: None,
            },
        ];
        assert!(!policy.faults_apply_to(&headers));
        headers.append("x-test", HeaderValue::from_static("calm"));
        headers.append("x-user", HeaderValue::from_static("jane"));
        assert!(!policy.faults_apply_to(&headers));
        headers.append("x-test", HeaderValue::from_static("chaos"));
        assert!(policy.faults_apply_to(&headers));
    }
}
