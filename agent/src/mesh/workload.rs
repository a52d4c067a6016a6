//! Pods as the mesh sees them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use super::{Mode, PortSet, Readiness, SpiffeId};

/// A pod's UID (`metadata.uid`), or `namespace/name` where a manifest gives none.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct WorkloadUid(pub Arc<str>);

impl fmt::Display for WorkloadUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Namespace and name of a Kubernetes object.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName {
    /// `metadata.namespace`.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
}

impl ObjectName {
    /// Both parts.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Serialize for ObjectName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Whether a pod belongs to the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Membership {
    /// Not asked for.
    Outside,
    /// Speaks HBONE, through the agent of its node.
    Meshed(Mode),
    /// Asked for, but cannot be: host network, no IP, a sidecar of another mesh, …
    Refused(String),
}

/// Where a pod of this node lives in its kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sandbox {
    /// Path of the network namespace (annotation `undermesh.io/netns`).
    pub netns: PathBuf,
    /// Path of the pod's cgroup2 directory (annotation `undermesh.io/cgroup`).
    pub cgroup: Option<PathBuf>,
}

/// A pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// UID: never reused, as addresses and names are.
    pub uid: WorkloadUid,
    /// Namespace and name of the pod.
    pub name: ObjectName,
    /// Name of the owner that metrics speak of (Deployment, …), else the pod's name.
    pub workload: Arc<str>,
    /// `app.kubernetes.io/version` or `version` label.
    pub version: Option<Arc<str>>,
    /// `spec.nodeName`.
    pub node: Arc<str>,
    /// Identity from namespace and service account.
    pub identity: SpiffeId,
    /// `status.podIPs`, in their order; at most one of each family.
    pub addresses: Vec<IpAddr>,
    /// Labels, for selectors.
    pub labels: Arc<BTreeMap<String, String>>,
    /// Named container ports (TCP).
    pub named_ports: BTreeMap<String, u16>,
    /// Ports that the kubelet probes, or calls as lifecycle handlers, over TCP.
    pub probe_ports: BTreeSet<u16>,
    /// Ports whose connections are not looked into (annotation `undermesh.io/opaque-ports`).
    pub opaque_ports: PortSet,
    /// Whether and how it belongs to the mesh.
    pub membership: Membership,
    /// Condition `Ready` (a pod without a status counts as ready), and whether it is ending.
    pub readiness: Readiness,
    /// Only for pods whose manifest says so: those of this node.
    pub sandbox: Option<Sandbox>,
}

impl Workload {
    /// The mode, if the pod is in the mesh.
    #[must_use]
    pub fn mode(&self) -> Option<Mode> {
        match self.membership {
            Membership::Meshed(mode) => Some(mode),
            Membership::Outside | Membership::Refused(_) => None,
        }
    }

    /// The name of its port with this number; empty if it has none.
    #[must_use]
    pub fn port_name(&self, number: u16) -> &str {
        let mut named = self.named_ports.iter();
        named
            .find(|(_, port)| **port == number)
            .map_or("", |(name, _)| name)
    }

    /// Whether it has an address of the same family, and so can reach this one.
    #[must_use]
    pub fn has_family(&self, address: SocketAddr) -> bool {
        self.addresses
            .iter()
            .any(|own| own.is_ipv4() == address.is_ipv4())
    }

    /// Whether it speaks HBONE.
    #[must_use]
    pub fn is_meshed(&self) -> bool {
        self.mode().is_some()
    }
}
