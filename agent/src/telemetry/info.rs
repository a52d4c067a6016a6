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
///
/// Who is there is shared with the model, names and all: of the 10,000 connections of a busy node most are between the
/// same few pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Party {
    who: Who,
    /// Address and port of this end.
    pub address: SocketAddr,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Who {
    Pod(Arc<Workload>),
    /// By its certificate.
    Proven(Arc<SpiffeId>),
    Unknown,
}

impl Party {
    /// A pod that the mesh knows. It has an identity here only if it is in the mesh: nothing proves
    /// that of another.
    #[must_use]
    pub fn of(workload: &Arc<Workload>, address: SocketAddr) -> Self {
        Self {
            who: Who::Pod(workload.clone()),
            address,
        }
    }

    /// A peer of whom the certificate is known and the pod is not.
    #[must_use]
    pub fn of_identity(identity: &SpiffeId, address: SocketAddr) -> Self {
        Self {
            who: Who::Proven(Arc::new(identity.clone())),
            address,
        }
    }

    /// A peer of whom the address is all that is known.
    #[must_use]
    pub fn unknown(address: SocketAddr) -> Self {
        Self {
            who: Who::Unknown,
            address,
        }
    }

    /// The owner that metrics speak of (Deployment, …).
    #[must_use]
    pub fn workload(&self) -> Option<&Arc<str>> {
        Some(&self.known()?.workload)
    }

    /// Version of the workload.
    #[must_use]
    pub fn version(&self) -> Option<&Arc<str>> {
        self.known()?.version.as_ref()
    }

    /// The pod.
    #[must_use]
    pub fn pod(&self) -> Option<&ObjectName> {
        Some(&self.known()?.name)
    }

    /// Namespace of the workload.
    #[must_use]
    pub fn namespace(&self) -> Option<&Arc<str>> {
        match &self.who {
            Who::Pod(workload) => Some(&workload.name.namespace),
            Who::Proven(identity) => Some(identity.shared_names().0),
            Who::Unknown => None,
        }
    }

    /// Its service account.
    #[must_use]
    pub fn service_account(&self) -> Option<&Arc<str>> {
        match &self.who {
            Who::Pod(workload) => Some(workload.identity.shared_names().1),
            Who::Proven(identity) => Some(identity.shared_names().1),
            Who::Unknown => None,
        }
    }

    /// Its identity, and only where it is proven or demanded: by a certificate, or by the network
    /// namespace that the socket is in. Never from an address.
    #[must_use]
    pub fn identity(&self) -> Option<&SpiffeId> {
        match &self.who {
            Who::Pod(workload) => workload.is_meshed().then_some(&workload.identity),
            Who::Proven(identity) => Some(identity),
            Who::Unknown => None,
        }
    }

    fn known(&self) -> Option<&Workload> {
        match &self.who {
            Who::Pod(workload) => Some(workload),
            Who::Proven(_) | Who::Unknown => None,
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
