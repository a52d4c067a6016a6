//! The immutable state that every connection reads.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use arc_swap::ArcSwap;

use super::{MeshConfig, ObjectName, Service, ServicePort, Workload, WorkloadUid};

/// The snapshot in force, swapped as a whole.
pub type SharedSnapshot = Arc<ArcSwap<Snapshot>>;

/// Desired state at one moment. Cloning shares structure, so one change costs one change.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    config: Arc<MeshConfig>,
    workloads: imbl::HashMap<WorkloadUid, Arc<Workload>>,
    by_address: imbl::HashMap<IpAddr, Arc<Workload>>,
    services: imbl::HashMap<ObjectName, Arc<Service>>,
    by_vip: imbl::HashMap<IpAddr, Arc<Service>>,
}

/// What an original destination address means.
#[derive(Debug, Clone)]
pub enum Destination {
    /// A Service's address and one of its ports.
    Service {
        /// The service.
        service: Arc<Service>,
        /// The port, one of the service's.
        port: ServicePort,
    },
    /// A pod's own address.
    Workload(Arc<Workload>),
    /// Nothing that the mesh knows.
    Unknown,
}

/// A destination whose connections the kernel hands to the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CaptureTarget {
    /// Service address or pod address.
    pub address: IpAddr,
    /// The port, or none for every port.
    pub port: Option<u16>,
}

impl Snapshot {
    /// An empty mesh with these settings.
    #[must_use]
    pub fn new(config: MeshConfig) -> Self {
        Self {
            config: Arc::new(config),
            ..Self::default()
        }
    }

    /// Settings of the mesh.
    #[must_use]
    pub fn config(&self) -> &Arc<MeshConfig> {
        &self.config
    }

    /// Replaces the settings.
    pub fn set_config(&mut self, config: MeshConfig) {
        self.config = Arc::new(config);
    }

    /// Adds a pod or replaces the one with its UID. Of two pods with one address the later wins:
    /// addresses are reused.
    pub fn insert_workload(&mut self, workload: Arc<Workload>) {
        self.remove_workload(&workload.uid);
        for address in &workload.addresses {
            self.by_address.insert(*address, workload.clone());
        }
        self.workloads.insert(workload.uid.clone(), workload);
    }

    /// Forgets a pod.
    pub fn remove_workload(&mut self, uid: &WorkloadUid) {
        let Some(old) = self.workloads.remove(uid) else {
            return;
        };
        for address in &old.addresses {
            if self
                .by_address
                .get(address)
                .is_some_and(|now| now.uid == *uid)
            {
                self.by_address.remove(address);
            }
        }
    }

    /// Adds a service or replaces the one of its name.
    pub fn insert_service(&mut self, service: Arc<Service>) {
        self.remove_service(&service.name);
        for vip in &service.vips {
            self.by_vip.insert(*vip, service.clone());
        }
        self.services.insert(service.name.clone(), service);
    }

    /// Forgets a service.
    pub fn remove_service(&mut self, name: &ObjectName) {
        let Some(old) = self.services.remove(name) else {
            return;
        };
        for vip in &old.vips {
            if self.by_vip.get(vip).is_some_and(|now| now.name == *name) {
                self.by_vip.remove(vip);
            }
        }
    }

    /// The pod with this UID.
    #[must_use]
    pub fn workload(&self, uid: &WorkloadUid) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The pod that has this address now.
    #[must_use]
    pub fn workload_at(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(&address)
    }

    /// All pods.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// Pods of one node.
    pub fn workloads_on<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a Arc<Workload>> {
        self.workloads
            .values()
            .filter(move |workload| &*workload.node == node)
    }

    /// The service of this name.
    #[must_use]
    pub fn service(&self, name: &ObjectName) -> Option<&Arc<Service>> {
        self.services.get(name)
    }

    /// All services.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// What a connection to this address is for. Services come before pods, as in kube-proxy.
    #[must_use]
    pub fn resolve(&self, destination: SocketAddr) -> Destination {
        if let Some(service) = self.by_vip.get(&destination.ip()) {
            return match service.port(destination.port()) {
                Some(port) => Destination::Service {
                    service: service.clone(),
                    port: port.clone(),
                },
                None => Destination::Unknown,
            };
        }
        match self.by_address.get(&destination.ip()) {
            Some(workload) => Destination::Workload(workload.clone()),
            None => Destination::Unknown,
        }
    }

    /// Every destination that is captured: meshed pods on all ports, and Services' ports with at
    /// least one meshed endpoint.
    #[must_use]
    pub fn capture_targets(&self) -> std::collections::BTreeSet<CaptureTarget> {
        let pods = self
            .workloads
            .values()
            .filter(|workload| workload.is_meshed())
            .flat_map(|workload| workload.addresses.iter())
            .map(|&address| CaptureTarget {
                address,
                port: None,
            });
        let services = self.services.values().flat_map(|service| {
            service
                .ports
                .iter()
                .filter(|port| {
                    port.endpoints
                        .iter()
                        .any(|endpoint| self.is_meshed(endpoint))
                })
                .flat_map(|port| {
                    service.vips.iter().map(|&address| CaptureTarget {
                        address,
                        port: Some(port.port),
                    })
                })
        });
        pods.chain(services).collect()
    }

    fn is_meshed(&self, endpoint: &super::Endpoint) -> bool {
        endpoint
            .workload
            .as_ref()
            .and_then(|uid| self.workloads.get(uid))
            .is_some_and(|workload| workload.is_meshed())
    }
}
