//! What is known about a connection: who talks to whom, for what, and how it is protected.

use std::net::SocketAddr;
use std::sync::Arc;

use serde::Serialize;

use crate::mesh::{ObjectName, SpiffeId, Workload};

/// On which side of the connection this agent stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// From a pod of this node; the agent is the client's. Istio's `reporter="source"`.
    Outbound,
    /// To a pod of this node; the agent is the server's. Istio's `reporter="destination"`.
    Inbound,
}

impl Direction {
    /// Value of the label `direction`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }

    /// Value of the label `reporter`, as Istio has it.
    #[must_use]
    pub fn reporter(self) -> &'static str {
        match self {
            Self::Outbound => "source",
            Self::Inbound => "destination",
        }
    }
}

/// How a connection is protected between the two pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Security {
    /// Mutual TLS; both identities are proven by certificates.
    MutualTls,
    /// Both pods are on this node: both identities are proven by the network namespaces that the
    /// sockets are in, and the bytes are not encrypted.
    SameNode,
    /// Neither encrypted nor authenticated.
    Plaintext,
    /// Not decided yet, or the connection ended before it was.
    Unknown,
}

impl Security {
    /// Value of the label `connection_security_policy`. `mutual_tls` and `unknown` are Istio's.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::SameNode => "same_node",
            Self::Plaintext => "plaintext",
            Self::Unknown => "unknown",
        }
    }
}

/// One end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Party {
    /// The owner that metrics speak of (Deployment, …).
    pub workload: Option<Arc<str>>,
    /// Version of the workload.
    pub version: Option<Arc<str>>,
    /// The pod.
    pub pod: Option<ObjectName>,
    /// Namespace of the workload.
    pub namespace: Option<Arc<str>>,
    /// Its service account.
    pub service_account: Option<Arc<str>>,
    /// Its identity, and only where it is proven or demanded: by a certificate, or by the network
    /// namespace that the socket is in. Never from an address.
    pub identity: Option<SpiffeId>,
    /// Address and port of this end.
    pub address: SocketAddr,
}

impl Party {
    /// A pod that the mesh knows. It has an identity here only if it is in the mesh: nothing proves
    /// that of another.
    #[must_use]
    pub fn of(workload: &Workload, address: SocketAddr) -> Self {
        let (_, service_account) = workload.identity.shared_names();
        Self {
            workload: Some(workload.workload.clone()),
            version: workload.version.clone(),
            pod: Some(workload.name.clone()),
            namespace: Some(workload.name.namespace.clone()),
            service_account: Some(service_account),
            identity: workload.is_meshed().then(|| workload.identity.clone()),
            address,
        }
    }

    /// A pod that is taken for this one because of its address: names without an identity, which
    /// is right for a peer that came in plaintext.
    #[must_use]
    pub fn by_address(workload: &Workload, address: SocketAddr) -> Self {
        Self {
            identity: None,
            service_account: None,
            ..Self::of(workload, address)
        }
    }

    /// A peer of whom the certificate is known and the pod is not.
    #[must_use]
    pub fn of_identity(identity: &SpiffeId, address: SocketAddr) -> Self {
        let (namespace, service_account) = identity.shared_names();
        Self {
            namespace: Some(namespace),
            service_account: Some(service_account),
            identity: Some(identity.clone()),
            ..Self::unknown(address)
        }
    }

    /// A peer of whom the address is all that is known.
    #[must_use]
    pub fn unknown(address: SocketAddr) -> Self {
        Self {
            workload: None,
            version: None,
            pod: None,
            namespace: None,
            service_account: None,
            identity: None,
            address,
        }
    }
}

/// What is known about a connection. It may be told in steps: see
/// [`Connection::update`](super::Connection::update).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionInfo {
    /// On which side the agent stands.
    pub direction: Direction,
    /// The client.
    pub source: Party,
    /// The server; before an endpoint is chosen, the address that the client asked for.
    pub destination: Party,
    /// The Service that the client asked for, if it was one.
    pub service: Option<ObjectName>,
    /// How the connection is protected.
    pub security: Security,
    /// The address that the client connected to.
    pub original_destination: SocketAddr,
}
