//! Nodes of the cluster.

use std::net::IpAddr;
use std::sync::Arc;

/// A Node (core/v1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// `metadata.name`: what `spec.nodeName` of its pods says.
    pub name: Arc<str>,
    /// `status.addresses` of type `InternalIP`.
    pub addresses: Vec<IpAddr>,
    /// Label `topology.kubernetes.io/region`.
    pub region: Option<Arc<str>>,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
}
