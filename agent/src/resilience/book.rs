//! What is shown of destinations, and what an operator may do to their breakers.
//!
//! Who keeps the destinations implements [`BreakerBook`]; status, metrics and the command line read
//! it.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use super::breaker::{BreakerState, Forced};

/// The destinations of this node and their breakers.
pub trait BreakerBook: Send + Sync + fmt::Debug {
    /// All destinations, each once, as they are now. Called several times for each scrape; must not
    /// block for long.
    fn list(&self) -> Vec<DestinationView>;

    /// Holds the breakers of a destination open or closed, or releases them (none): those of all
    /// routes that it has now, or of the one. Gives how many.
    ///
    /// # Errors
    /// [`NoSuchBreaker`] if this node knows no such destination, or no breaker of that route.
    fn force(
        &self,
        destination: &str,
        route: Option<&str>,
        forced: Option<Forced>,
    ) -> Result<usize, NoSuchBreaker>;
}

/// A destination: a Service's port, as the requests of this node see it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DestinationView {
    /// `namespace/service:port`: the label `destination`.
    pub destination: Arc<str>,
    /// Its breakers, one for each route that requests came by.
    pub breakers: Vec<BreakerView>,
    /// Its endpoints.
    pub endpoints: Vec<EndpointView>,
    /// Endpoints that would have been ejected, had not too many been already.
    pub ejections_withheld: u64,
    /// Retries that its budget granted since the start.
    pub retries_granted: u64,
    /// Retries that its budget refused since the start.
    pub retries_refused: u64,
    /// Its connections, where a policy limits them.
    pub connections: Option<ConnectionsView>,
}

/// The upstream connections to a destination, for requests and opaque ones, where they are limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ConnectionsView {
    /// Connections now.
    pub open: u32,
    /// Requests and opaque connections that wait for one now.
    pub waiting: usize,
    /// Those that got none, since they waited in vain or nobody may wait, since the start.
    pub in_vain: u64,
    /// Those that could not wait, since as many as may did, since the start.
    pub refused: u64,
}

/// The breaker of one route to a destination.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BreakerView {
    /// Its own name, which [`super::breaker::Transition::breaker`] bears.
    #[serde(skip)]
    pub name: Arc<str>,
    /// The route: the label `route`; `none` without one.
    pub route: Arc<str>,
    /// Its state.
    pub state: BreakerState,
    /// What an operator imposed.
    pub forced: Option<Forced>,
    /// Failures seen since the start.
    pub failures: u64,
    /// Requests rejected since the start.
    pub rejections: u64,
}

/// One endpoint of a destination.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EndpointView {
    /// Its address.
    pub endpoint: String,
    /// Whether it gets requests.
    pub standing: Standing,
    /// Requests or connections under way.
    pub in_flight: u32,
    /// Its share of traffic, relative to the others.
    pub weight: u32,
}

impl EndpointView {
    /// Whether it gets no requests.
    #[must_use]
    pub fn is_ejected(&self) -> bool {
        self.standing == Standing::Ejected
    }
}

/// Whether an endpoint gets requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// It does.
    Serving,
    /// It is ejected, for all sources of this node.
    Ejected,
}

/// There is nothing to force.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoSuchBreaker {
    /// The destination is not known.
    #[error("this node has sent nothing to a destination {0:?}")]
    Destination(String),
    /// It is, and has no breaker for this route.
    #[error("{destination} has no breaker for a route {route:?}")]
    Route {
        /// The destination.
        destination: String,
        /// The route that was named.
        route: String,
    },
}
