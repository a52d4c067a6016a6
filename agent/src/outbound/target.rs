//! What an original destination stands for: one pod, or the endpoints of a Service's port.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::mesh::{Destination, Endpoint, ObjectName, Snapshot, Workload};

/// Where a connection may go.
#[derive(Debug, Clone)]
pub(super) struct Target {
    /// The Service whose address the client used.
    pub(super) service: Option<ObjectName>,
    /// Its endpoints, ready ones and others, or the one pod.
    pub(super) endpoints: Arc<[Endpoint]>,
}

/// Resolves the destination of a captured connection. None if the mesh no longer knows it: the
/// kernel learns of a removal a moment after the snapshot.
pub(super) fn target(snapshot: &Snapshot, destination: SocketAddr) -> Option<Target> {
    match snapshot.resolve(destination) {
        Destination::Service { service, port } => Some(Target {
            service: Some(service.name.clone()),
            endpoints: port.endpoints,
        }),
        Destination::Workload(workload) => Some(Target {
            service: None,
            // Whoever dials a pod's address means that pod, ready or not.
            endpoints: Arc::new([Endpoint {
                address: destination,
                ready: true,
                workload: Some(workload.uid.clone()),
            }]),
        }),
        Destination::Unknown => None,
    }
}

/// The pod behind an endpoint: by UID if the endpoint names one, else by its address.
pub(super) fn pod_of<'a>(snapshot: &'a Snapshot, endpoint: &Endpoint) -> Option<&'a Arc<Workload>> {
    match &endpoint.workload {
        Some(uid) => snapshot.workload(uid),
        None => snapshot.workload_at(endpoint.address.ip()),
    }
}
