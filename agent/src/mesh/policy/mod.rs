//! What traffic to a Service, or over a route, gets: the policy in force.

mod attached;
mod connections;
mod hash;
mod locality;
pub mod spec;
mod status;

pub use attached::{Layer, Policies, ServiceLayers};
pub use connections::{ConnectionLimits, StreamTimeouts};
pub use hash::HashKey;
pub use locality::{Locality, Nearness};
pub use status::{AncestorStatus, PolicyId, PolicyKind, PolicyStatus};

use std::time::Duration;

use http::request::Parts;

use super::route::HeaderMatch;
use super::{MeshConfig, ObjectName};
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
    /// How long a connection to an endpoint may take.
    #[must_use]
    pub fn connect_limit(&self, config: &MeshConfig) -> Duration {
        self.streams.connect.unwrap_or(config.connect_timeout)
    }

    /// The same to an endpoint after which no other is tried: the mesh gives it more time, a policy
    /// that says how long says so of every endpoint.
    #[must_use]
    pub fn last_connect_limit(&self, config: &MeshConfig) -> Duration {
        let own = self.streams.connect;
        own.unwrap_or_else(|| config.last_connect_limit())
    }

    /// Whether this request may get a fault.
    #[must_use]
    pub fn faults_apply_to(&self, head: &Parts) -> bool {
        self.fault_match.iter().all(|one| one.matches(head))
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
