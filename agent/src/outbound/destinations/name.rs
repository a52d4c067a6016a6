//! What destinations, endpoints and routes are called.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::mesh::{Endpoint, ObjectName, WorkloadUid};

/// What a destination is asked for. Both may be sent to one port; they are balanced and judged by
/// themselves, since a connection's duration is no latency.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Traffic {
    /// HTTP requests.
    Requests,
    /// Connections whose bytes mean nothing to the agent.
    Connections,
}

/// A port of a Service, and what it is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DestinationId {
    /// The Service.
    pub service: ObjectName,
    /// Its port, as clients call it.
    pub port: u16,
    /// What is sent there.
    pub traffic: Traffic,
}

impl DestinationId {
    /// The same port, asked for the other kind of traffic.
    pub(super) fn for_other_traffic(&self) -> Self {
        Self {
            traffic: match self.traffic {
                Traffic::Requests => Traffic::Connections,
                Traffic::Connections => Traffic::Requests,
            },
            ..self.clone()
        }
    }
}

impl fmt::Display for DestinationId {
    /// The label `destination`: `namespace/name:port`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.service, self.port)
    }
}

/// Which breaker and which limits of a destination a request has.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RouteKey {
    /// Requests that no route was attached for.
    Http,
    /// Connections that no route was attached for.
    Tcp,
    /// What matched this rule.
    Rule(Arc<str>),
    /// What is beyond the bound of routes, all together.
    Others,
}

impl fmt::Display for RouteKey {
    /// The label `route`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Http => "none",
            Self::Tcp => "tcp",
            Self::Rule(name) => name,
            Self::Others => "*",
        })
    }
}

/// An endpoint as it is balanced: a pod that got the address of another is another.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct EndpointId {
    /// Address and target port.
    pub address: SocketAddr,
    /// The pod behind it, where one is known.
    pub workload: Option<WorkloadUid>,
}

impl From<&Endpoint> for EndpointId {
    fn from(endpoint: &Endpoint) -> Self {
        Self {
            address: endpoint.address,
            workload: endpoint.workload.clone(),
        }
    }
}

impl fmt::Debug for EndpointId {
    /// As events and status name it: by its address.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(f)
    }
}
