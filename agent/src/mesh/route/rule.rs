//! What becomes of a request that a route's rule is for.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use serde::Serialize;

use super::session::fingerprint;
use super::{Filters, RequestMatch, RouteId, Session, SessionPersistence};
use crate::mesh::ObjectName;

/// One rule of an HTTPRoute or a GRPCRoute.
#[derive(Debug, Clone, PartialEq)]
pub struct Rule {
    /// Which rule it is, for labels and logs: `HTTPRoute/shop/web/<name or index>`.
    pub name: Arc<str>,
    /// The route that it is of.
    pub route: RouteId,
    /// The requests that it is for: any of these.
    pub matches: Vec<RequestMatch>,
    /// What is done to them.
    pub filters: Filters,
    /// Where they go. None at all is a rule that answers itself, else 500.
    pub backends: Vec<Backend>,
    /// `timeouts`: those that the rule sets.
    pub timeouts: Option<RouteTimeouts>,
    /// `retry`.
    pub retry: Option<RouteRetry>,
    /// `sessionPersistence`.
    pub session: Option<SessionPersistence>,
}

impl Rule {
    /// Where this request goes: to its session's backend, whatever the weight of that is now
    /// (GEP-1619, "Traffic Splitting"), else by weight. None if there is no backend or every weight
    /// is 0: the answer is 500.
    pub fn choose(
        &self,
        session: Option<&Session>,
        rng: &mut (impl Rng + ?Sized),
    ) -> Option<&Backend> {
        session
            .and_then(|session| self.backends.iter().find(|backend| backend.is_of(session)))
            .or_else(|| choose(&self.backends, rng))
    }
}

/// One of these, by weight.
pub(super) fn choose<'a>(
    backends: &'a [Backend],
    rng: &mut (impl Rng + ?Sized),
) -> Option<&'a Backend> {
    let total: u64 = backends.iter().map(|one| u64::from(one.weight)).sum();
    if total == 0 {
        return None;
    }
    let mut at = rng.random_range(0..total);
    backends.iter().find(|backend| {
        let weight = u64::from(backend.weight);
        let here = at < weight;
        at = at.saturating_sub(weight);
        here
    })
}

/// A place where requests go (`HTTPBackendRef`, `GRPCBackendRef`, `BackendRef`).
#[derive(Debug, Clone, PartialEq)]
pub struct Backend {
    /// The place.
    pub target: BackendTarget,
    /// Its share of the rule's requests, of the sum of all weights. Range 0 to 1,000,000, default 1.
    pub weight: u32,
    /// What is done to its requests, after the rule's filters.
    pub filters: Filters,
    fingerprint: u64,
}

impl Backend {
    /// A place with its weight and filters.
    #[must_use]
    pub fn new(target: BackendTarget, weight: u32, filters: Filters) -> Self {
        let fingerprint = fingerprint(&target.to_string());
        Self {
            target,
            weight,
            filters,
            fingerprint,
        }
    }

    /// What stands for it in a session.
    pub(super) fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    fn is_of(&self, session: &Session) -> bool {
        self.fingerprint == session.backend && matches!(self.target, BackendTarget::Service { .. })
    }
}

/// What a backend is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BackendTarget {
    /// A port of a Service.
    Service {
        /// The Service.
        name: ObjectName,
        /// Its port, one that it has.
        port: u16,
    },
    /// Nothing that requests can be sent to: its share of them is answered with 500, in gRPC with
    /// `UNAVAILABLE`.
    Invalid {
        /// What is wrong.
        reason: InvalidBackend,
    },
}

impl fmt::Display for BackendTarget {
    /// `shop/web:80`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service { name, port } => write!(f, "{name}:{port}"),
            Self::Invalid { reason } => write!(f, "invalid: {reason}"),
        }
    }
}

impl Serialize for BackendTarget {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Why a backend is invalid: the reason of condition `ResolvedRefs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum InvalidBackend {
    /// It is of a kind that is no Service.
    InvalidKind,
    /// There is no such Service, or it has no such port.
    BackendNotFound,
    /// It is in another namespace, which has no ReferenceGrant for it.
    RefNotPermitted,
}

impl fmt::Display for InvalidBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// How long a request may take (`HTTPRouteTimeouts`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RouteTimeouts {
    /// `request`: the whole of it, with all its attempts. `Some(None)` is no limit (`0s`), `None`
    /// leaves it to the policy.
    pub request: Option<Option<Duration>>,
    /// `backendRequest`: one attempt, in the same way. At most `request`.
    pub backend_request: Option<Option<Duration>>,
}

/// When a request is tried again (`HTTPRouteRetry`). What is not set is left to the policy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RouteRetry {
    /// `codes`: status codes of 400 to 599.
    pub codes: Vec<u16>,
    /// `attempts`: tries beyond the first. Range 0 to 10.
    pub attempts: Option<u32>,
    /// `backoff`: the least time before the next.
    pub backoff: Option<Duration>,
}

#[cfg(test)]
#[path = "rule_tests.rs"]
mod tests;
