//! What an original destination stands for: one pod, or the endpoints of a Service's port.

use std::net::SocketAddr;
use std::sync::Arc;

use super::destinations::EndpointId;
use super::http::Frontend;
use crate::http::{Hint, hint};
use crate::mesh::{Destination, ObjectName, Service, ServicePort, Snapshot, Workload};
use crate::tunnel::HBONE_PORT;

/// Where a connection may go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    /// To an endpoint of a Service's port.
    Service {
        /// The Service whose address the client used.
        service: Arc<Service>,
        /// The port that it dialled.
        port: ServicePort,
    },
    /// To this pod, ready or not: whoever dials a pod's address means that pod.
    Pod(EndpointId),
}

impl Target {
    /// The Service whose address the client used.
    pub(super) fn service(&self) -> Option<&ObjectName> {
        match self {
            Self::Service { service, .. } => Some(&service.name),
            Self::Pod(_) => None,
        }
    }

    /// What the port says is spoken there.
    pub(super) fn hint(&self, snapshot: &Snapshot) -> Hint {
        match self {
            Self::Service { port, .. } => {
                hint(port.app_protocol.as_deref(), &port.name, port.opaque)
            }
            Self::Pod(endpoint) => {
                let pod = pod_of(snapshot, endpoint);
                pod.map_or(Hint::None, |pod| {
                    // Who dials the tunnels' port itself gets no HTTP of ours for an answer.
                    let opaque = endpoint.address.port() == HBONE_PORT
                        || snapshot.is_opaque(pod, endpoint.address);
                    hint(None, pod.port_name(endpoint.address.port()), opaque)
                })
            }
        }
    }
}

impl From<Target> for Frontend {
    fn from(target: Target) -> Self {
        match target {
            Target::Service { service, port } => Self::Service {
                service: service.name.clone(),
                port: port.port,
            },
            Target::Pod(endpoint) => Self::Pod(endpoint),
        }
    }
}

/// Resolves the destination of a captured connection. None if the mesh no longer knows it: the
/// kernel learns of a removal a moment after the snapshot.
pub(super) fn target(snapshot: &Snapshot, destination: SocketAddr) -> Option<Target> {
    match snapshot.resolve(destination) {
        Destination::Service { service, port } => Some(Target::Service { service, port }),
        Destination::Workload(workload) => Some(Target::Pod(EndpointId {
            address: destination,
            workload: Some(workload.uid.clone()),
        })),
        Destination::Unknown => None,
    }
}

/// The pod behind an endpoint: the one that it names if that has this address, else the one that
/// has it. Never a pod by name alone: what is authorized must be what is dialled.
pub(super) fn pod_of<'a>(
    snapshot: &'a Snapshot,
    endpoint: &EndpointId,
) -> Option<&'a Arc<Workload>> {
    let address = endpoint.address.ip();
    let named = endpoint.workload.as_ref();
    named
        .and_then(|uid| snapshot.workload(uid))
        .filter(|workload| workload.addresses.contains(&address))
        .or_else(|| snapshot.workload_at(address))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::{Endpoint, WorkloadUid};
    use crate::telemetry::testing::workload;

    fn mesh() -> Snapshot {
        let mut snapshot = Snapshot::default();
        snapshot.insert_workload(workload("web", "10.0.0.1"));
        snapshot.insert_workload(workload("cart", "10.0.0.2"));
        snapshot
    }

    fn endpoint(address: &str, uid: Option<&str>) -> EndpointId {
        EndpointId {
            address: address.parse().unwrap(),
            workload: uid.map(|uid| WorkloadUid(uid.into())),
        }
    }

    #[test]
    fn an_endpoint_is_the_pod_that_has_its_address_whatever_name_it_gives() {
        let snapshot = mesh();
        for (uid, name) in [
            (None, "cart"),
            (Some("uid-cart"), "cart"),
            (Some("uid-web"), "cart"),
            (Some("uid-of-nobody"), "cart"),
        ] {
            let pod = pod_of(&snapshot, &endpoint("10.0.0.2:80", uid)).unwrap();
            assert_eq!(&*pod.workload, name, "{uid:?}");
        }
        let stranger = endpoint("10.0.0.9:80", Some("uid-web"));
        assert!(pod_of(&snapshot, &stranger).is_none());
    }

    #[test]
    fn who_dials_a_pod_gets_that_pod_even_while_it_is_not_ready() {
        let target = target(&mesh(), "10.0.0.1:9000".parse().unwrap()).unwrap();
        assert_eq!(
            target,
            Target::Pod(endpoint("10.0.0.1:9000", Some("uid-web")))
        );
    }

    #[test]
    fn an_opaque_port_is_one_by_the_services_address_and_by_the_pods() {
        let mut snapshot = Snapshot::default();
        let mut cart = (*workload("cart", "10.0.0.2")).clone();
        cart.opaque_ports = "9000".parse().unwrap();
        snapshot.insert_workload(Arc::new(cart));
        let port = |port, opaque, target: &str| ServicePort {
            name: format!("http-{port}").into(),
            port,
            app_protocol: None,
            opaque,
            endpoints: Arc::new([Endpoint {
                address: target.parse().unwrap(),
                readiness: crate::mesh::Readiness::Ready,
                workload: Some(WorkloadUid("uid-cart".into())),
            }]),
        };
        snapshot.insert_service(Arc::new(Service {
            name: ObjectName::new("shop", "cart"),
            vips: vec!["10.96.0.1".parse().unwrap()],
            ports: vec![
                port(80, true, "10.0.0.2:8080"),
                port(81, false, "10.0.0.2:8081"),
            ],
        }));
        for (dialled, expected) in [
            ("10.96.0.1:80", Hint::Opaque),
            ("10.96.0.1:81", Hint::Http),
            ("10.0.0.2:8080", Hint::Opaque),
            ("10.0.0.2:8081", Hint::None),
            ("10.0.0.2:9000", Hint::Opaque),
        ] {
            let target = target(&snapshot, dialled.parse().unwrap()).unwrap();
            assert_eq!(target.hint(&snapshot), expected, "{dialled}");
        }
    }

    #[test]
    fn what_the_mesh_does_not_know_has_no_target() {
        assert!(target(&mesh(), "10.0.0.9:80".parse().unwrap()).is_none());
    }
}
