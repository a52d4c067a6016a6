//! The model: what the mesh should be, as one immutable [`Snapshot`].
//!
//! Nothing here does I/O. Discovery builds snapshots, everything else reads them through
//! [`SharedSnapshot`]; a connection reads one snapshot from its start to its end.

mod authorize;
mod claims;
mod config;
mod duration;
mod node;
pub mod policy;
mod ports;
pub mod route;
mod service;
mod snapshot;
mod spiffe;
mod targets;
mod workload;

pub use authorize::{Denied, authorize};
pub use config::{MeshConfig, Mode, ModeError};
pub use duration::parse_duration;
pub use node::Node;
pub use policy::{
    ConnectionLimits, FallbackBackend, HashKey, Locality, Nearness, StreamTimeouts, TrafficPolicy,
};
pub use ports::{PortSet, PortSetError};
pub use service::{Endpoint, Readiness, Service, ServicePort};
pub use snapshot::{Destination, SharedSnapshot, Snapshot};
pub use spiffe::{NAME_MAX, SpiffeId, SpiffeIdError, TrustDomain, is_kubernetes_name};
pub use targets::{CaptureTarget, TargetChanges};
pub use workload::{Membership, ObjectName, Sandbox, Workload, WorkloadUid};
