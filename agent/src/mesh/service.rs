//! Services and their endpoints.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::{ObjectName, WorkloadUid};

/// A Service (core/v1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Namespace and name.
    pub name: ObjectName,
    /// ClusterIPs and external IPs.
    pub vips: Vec<IpAddr>,
    /// TCP ports; others are not the mesh's.
    pub ports: Vec<ServicePort>,
}

impl Service {
    /// The port with this number.
    #[must_use]
    pub fn port(&self, port: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|candidate| candidate.port == port)
    }
}

/// A TCP port of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// `name`, empty if the Service has one port only.
    pub name: Arc<str>,
    /// `port`: what clients connect to.
    pub port: u16,
    /// `appProtocol`.
    pub app_protocol: Option<Arc<str>>,
    /// Whether annotation `undermesh.io/opaque-ports` of the Service names it: its connections are
    /// not looked into.
    pub opaque: bool,
    /// Where connections go, ready ones and others.
    pub endpoints: Arc<[Endpoint]>,
}

/// One address behind a Service's port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Address and target port.
    pub address: SocketAddr,
    /// Whether connections go there.
    pub readiness: Readiness,
    /// The pod behind it, where one is known.
    pub workload: Option<WorkloadUid>,
}

/// Whether an endpoint gets connections and requests, as Kubernetes says it (KEP-1669): the ready ones
/// do, and those that are leaving where nobody is ready. What is under way is never cut by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Readiness {
    /// It gets none.
    Unready,
    /// Its pod is ending and serves still.
    Leaving,
    /// It gets them.
    Ready,
}

impl Readiness {
    /// Of a pod that is ready, or not, and is ending, or not.
    #[must_use]
    pub fn of(is_serving: bool, is_terminating: bool) -> Self {
        match (is_serving, is_terminating) {
            (true, false) => Self::Ready,
            (true, true) => Self::Leaving,
            (false, _) => Self::Unready,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_found_by_what_clients_connect_to() {
        let port = |name: &str, port| ServicePort {
            name: name.into(),
            port,
            app_protocol: None,
            opaque: false,
            endpoints: Arc::new([]),
        };
        let service = Service {
            name: ObjectName::new("shop", "web"),
            vips: Vec::new(),
            ports: vec![port("http", 80), port("https", 443)],
        };
        assert_eq!(service.port(443).map(|port| &*port.name), Some("https"));
        assert!(service.port(8080).is_none());
    }
}
