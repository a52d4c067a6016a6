//! The immutable state that every connection reads.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use arc_swap::ArcSwap;

use super::claims::ClaimMap;
use super::policy::{Layer, Policies, PolicyId, PolicyStatus, ServiceLayers, TrafficPolicy};
use super::route::{
    Attached, RouteId, RouteStatus, RouteTable, Routes, ServiceRoutes, StreamRoutes,
};
use super::targets::{CaptureTarget, TargetChanges, Targets};
use super::{Endpoint, MeshConfig, Node, ObjectName, Service, ServicePort, Workload, WorkloadUid};

/// The snapshot in force, swapped as a whole.
pub type SharedSnapshot = Arc<ArcSwap<Snapshot>>;

/// Desired state at one moment. Cloning shares structure, so one change costs one change.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    config: Arc<MeshConfig>,
    nodes: imbl::OrdMap<Arc<str>, Arc<Node>>,
    workloads: imbl::HashMap<WorkloadUid, Arc<Workload>>,
    by_address: ClaimMap<IpAddr, Workload>,
    by_node: imbl::HashMap<Arc<str>, imbl::OrdMap<WorkloadUid, Arc<Workload>>>,
    services: imbl::HashMap<ObjectName, Arc<Service>>,
    by_vip: ClaimMap<IpAddr, Service>,
    /// Which services a pod is an endpoint of: those whose targets change with its membership.
    by_endpoint: imbl::HashMap<WorkloadUid, imbl::OrdSet<ObjectName>>,
    targets: Targets,
    routes: Routes,
    policies: Policies,
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

    /// Adds a node or replaces the one of its name.
    pub fn insert_node(&mut self, node: Arc<Node>) {
        self.nodes.insert(node.name.clone(), node);
    }

    /// Forgets a node.
    pub fn remove_node(&mut self, name: &str) {
        self.nodes.remove(name);
    }

    /// The node of this name.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&Arc<Node>> {
        self.nodes.get(name)
    }

    /// All nodes, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.nodes.values()
    }

    /// Adds a pod or replaces the one with its UID. Of two pods with one address the later wins:
    /// addresses are reused.
    pub fn insert_workload(&mut self, workload: Arc<Workload>) {
        let uid = workload.uid.clone();
        if self.workloads.get(&uid) == Some(&workload) {
            return;
        }
        self.change_workload(&uid, Some(workload));
    }

    /// Forgets a pod.
    pub fn remove_workload(&mut self, uid: &WorkloadUid) {
        self.change_workload(uid, None);
    }

    fn change_workload(&mut self, uid: &WorkloadUid, new: Option<Arc<Workload>>) {
        let old = self.workloads.get(uid).cloned();
        let meshed = |workload: &Option<Arc<Workload>>| {
            workload
                .as_ref()
                .is_some_and(|workload| workload.is_meshed())
        };
        let services = if meshed(&old) == meshed(&new) {
            Vec::new()
        } else {
            self.services_of(uid)
        };
        for service in &services {
            self.release_targets(service);
        }
        if let Some(old) = old {
            self.unlink_workload(&old);
        }
        if let Some(new) = new {
            self.link_workload(new);
        }
        for service in &services {
            self.claim_targets(service);
        }
    }

    fn link_workload(&mut self, workload: Arc<Workload>) {
        for &address in &workload.addresses {
            self.by_address.add(address, workload.clone());
            if workload.is_meshed() {
                self.targets.add(CaptureTarget {
                    address,
                    port: None,
                });
            }
        }
        self.by_node
            .entry(workload.node.clone())
            .or_default()
            .insert(workload.uid.clone(), workload.clone());
        self.workloads.insert(workload.uid.clone(), workload);
    }

    fn unlink_workload(&mut self, workload: &Workload) {
        self.workloads.remove(&workload.uid);
        for &address in &workload.addresses {
            self.by_address
                .remove(&address, |claimant| claimant.uid == workload.uid);
            if workload.is_meshed() {
                self.targets.remove(CaptureTarget {
                    address,
                    port: None,
                });
            }
        }
        if let Some(neighbours) = self.by_node.get_mut(&workload.node) {
            neighbours.remove(&workload.uid);
            if neighbours.is_empty() {
                self.by_node.remove(&workload.node);
            }
        }
    }

    /// Adds a service or replaces the one of its name. Of two services with one address and port
    /// the later wins.
    pub fn insert_service(&mut self, service: Arc<Service>) {
        if self.services.get(&service.name) == Some(&service) {
            return;
        }
        self.remove_service(&service.name);
        for &vip in &service.vips {
            self.by_vip.add(vip, service.clone());
        }
        for uid in endpoint_uids(&service) {
            self.by_endpoint
                .entry(uid.clone())
                .or_default()
                .insert(service.name.clone());
        }
        self.claim_targets(&service);
        self.services.insert(service.name.clone(), service);
    }

    /// Forgets a service.
    pub fn remove_service(&mut self, name: &ObjectName) {
        let Some(old) = self.services.remove(name) else {
            return;
        };
        self.release_targets(&old);
        for vip in &old.vips {
            self.by_vip.remove(vip, |claimant| claimant.name == *name);
        }
        for uid in endpoint_uids(&old) {
            if let Some(services) = self.by_endpoint.get_mut(uid) {
                services.remove(name);
                if services.is_empty() {
                    self.by_endpoint.remove(uid);
                }
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
        self.by_address.get(&address)?.last()
    }

    /// All pods.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// Pods of one node.
    pub fn workloads_on<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a Arc<Workload>> {
        self.by_node
            .get(node)
            .into_iter()
            .flat_map(|workloads| workloads.values())
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

    /// The services that have this pod among their endpoints.
    #[must_use]
    pub fn services_of(&self, uid: &WorkloadUid) -> Vec<Arc<Service>> {
        self.by_endpoint
            .get(uid)
            .into_iter()
            .flatten()
            .filter_map(|name| self.services.get(name).cloned())
            .collect()
    }

    /// Whether connections to this address of a pod are not looked into: the pod says so, or a Service
    /// in front of it does. Where several are, nobody can tell by which of them a client came.
    #[must_use]
    pub fn is_opaque(&self, workload: &Workload, address: SocketAddr) -> bool {
        let leads_here = |port: &ServicePort| {
            port.opaque && port.endpoints.iter().any(|one| one.address == address)
        };
        workload.opaque_ports.contains(address.port())
            || self
                .services_of(&workload.uid)
                .iter()
                .any(|service| service.ports.iter().any(leads_here))
    }

    /// The HTTPRoutes or GRPCRoutes for requests of clients of this namespace to this port of a
    /// Service. None if there is none: such requests go to the Service itself.
    #[must_use]
    pub fn routes(
        &self,
        service: &ObjectName,
        port: u16,
        client_namespace: &str,
    ) -> Option<Arc<RouteTable>> {
        match self.routes.of(service)?.attached(port, client_namespace)? {
            Attached::Requests(table) => Some(table.clone()),
            Attached::Streams(_) => None,
        }
    }

    /// The TLSRoutes or TCPRoutes for connections of clients of this namespace to this port of a
    /// Service. None if there is none: such connections go to the Service itself.
    #[must_use]
    pub fn stream_routes(
        &self,
        service: &ObjectName,
        port: u16,
        client_namespace: &str,
    ) -> Option<Arc<StreamRoutes>> {
        match self.routes.of(service)?.attached(port, client_namespace)? {
            Attached::Streams(routes) => Some(routes.clone()),
            Attached::Requests(_) => None,
        }
    }

    /// All routes of a Service, whether it exists or not.
    #[must_use]
    pub fn routes_of(&self, service: &ObjectName) -> Option<&Arc<ServiceRoutes>> {
        self.routes.of(service)
    }

    /// Puts routes in force for a Service in place of those that were; none takes them away. Its
    /// ports with routes are captured even if no endpoint is meshed.
    pub fn set_routes(&mut self, service: &ObjectName, routes: Option<Arc<ServiceRoutes>>) {
        let affected = self.services.get(service).cloned();
        if let Some(service) = &affected {
            self.release_targets(service);
        }
        self.routes.set(service, routes);
        if let Some(service) = &affected {
            self.claim_targets(service);
        }
    }

    /// Status of a route.
    #[must_use]
    pub fn route_status(&self, route: &RouteId) -> Option<&Arc<RouteStatus>> {
        self.routes.status(route)
    }

    /// Statuses of all routes, by kind and name.
    pub fn route_statuses(&self) -> impl Iterator<Item = &Arc<RouteStatus>> {
        self.routes.statuses()
    }

    /// Replaces the status of a route; none takes it away.
    pub fn set_route_status(&mut self, route: &RouteId, status: Option<Arc<RouteStatus>>) {
        self.routes.set_status(route, status);
    }

    /// What a connection to this address is for. Services come before pods, as in kube-proxy.
    #[must_use]
    pub fn resolve(&self, destination: SocketAddr) -> Destination {
        if let Some(claims) = self.by_vip.get(&destination.ip()) {
            let claimant = claims.last_with(|service| service.port(destination.port()).is_some());
            return claimant
                .and_then(|service| {
                    Some(Destination::Service {
                        service: service.clone(),
                        port: service.port(destination.port())?.clone(),
                    })
                })
                .unwrap_or(Destination::Unknown);
        }
        match self.workload_at(destination.ip()) {
            Some(workload) => Destination::Workload(workload.clone()),
            None => Destination::Unknown,
        }
    }

    /// What traffic to this port of a Service gets, whatever the route. The very same as long as
    /// nothing about it changes, also in later snapshots, so that pointers can be compared.
    #[must_use]
    pub fn policy_of_service(&self, service: &ObjectName, port: u16) -> Arc<TrafficPolicy> {
        self.policies
            .of_service(service, self.port_name(service, port), port)
    }

    /// The same on a route: what the route's policy says, and the Service's where it says nothing.
    #[must_use]
    pub fn policy_of(
        &self,
        service: &ObjectName,
        port: u16,
        route: Option<&RouteId>,
    ) -> Arc<TrafficPolicy> {
        let port_name = self.port_name(service, port);
        match route {
            Some(route) => self.policies.on_route(service, port_name, port, route),
            None => self.policies.of_service(service, port_name, port),
        }
    }

    fn port_name(&self, service: &ObjectName, port: u16) -> &str {
        self.services
            .get(service)
            .and_then(|service| service.port(port))
            .map_or("", |port| &port.name)
    }

    /// What policies say of a Service, whether it exists or not.
    #[must_use]
    pub fn service_policies(&self, service: &ObjectName) -> Option<&ServiceLayers> {
        self.policies.layers_of(service)
    }

    /// What a policy says of a route.
    #[must_use]
    pub fn route_policy(&self, route: &RouteId) -> Option<&Layer> {
        self.policies.layer_of(route)
    }

    /// The status of one policy.
    #[must_use]
    pub fn policy_status(&self, policy: &PolicyId) -> Option<&Arc<PolicyStatus>> {
        self.policies.status(policy)
    }

    /// Puts the policies of a Service in force in place of those that were; none takes them away.
    /// Its ports are captured then, even if no endpoint is meshed.
    pub fn set_service_policies(&mut self, service: &ObjectName, layers: Option<ServiceLayers>) {
        let affected = self.services.get(service).cloned();
        if let Some(service) = &affected {
            self.release_targets(service);
        }
        self.policies.set_service(service, layers);
        if let Some(service) = &affected {
            self.claim_targets(service);
        }
    }

    /// Puts a route's policy in force in place of the one that was; none takes it away.
    pub fn set_route_policy(&mut self, route: &RouteId, layer: Option<Layer>) {
        self.policies.set_route(route, layer);
    }

    /// Statuses of all policies, by kind and name.
    pub fn policy_statuses(&self) -> impl Iterator<Item = &Arc<PolicyStatus>> {
        self.policies.statuses()
    }

    /// Replaces the status of a policy; none takes it away.
    pub fn set_policy_status(&mut self, policy: &PolicyId, status: Option<Arc<PolicyStatus>>) {
        self.policies.set_status(policy, status);
    }

    /// Every destination that is captured: meshed pods on all ports, and Services' ports with at
    /// least one meshed endpoint, a route or a policy.
    #[must_use]
    pub fn capture_targets(&self) -> BTreeSet<CaptureTarget> {
        self.targets.to_set()
    }

    /// Whether connections to this destination are captured.
    #[must_use]
    pub fn captures(&self, target: &CaptureTarget) -> bool {
        self.targets.contains(target)
    }

    /// How the destinations that are captured differ from those of an older snapshot. Between
    /// snapshots of one source this costs the size of the difference, not that of the mesh.
    #[must_use]
    pub fn target_changes_since(&self, older: &Self) -> TargetChanges {
        self.targets.changes_since(&older.targets)
    }

    fn claim_targets(&mut self, service: &Service) {
        for target in self.targets_of(service) {
            self.targets.add(target);
        }
    }

    fn release_targets(&mut self, service: &Service) {
        for target in self.targets_of(service) {
            self.targets.remove(target);
        }
    }

    fn targets_of(&self, service: &Service) -> Vec<CaptureTarget> {
        let routes = self.routes.of(&service.name);
        let wanted = |port: &&ServicePort| {
            self.policies
                .attach_to(&service.name, &port.name, port.port)
                || routes.is_some_and(|routes| routes.has_port(port.port))
                || port.endpoints.iter().any(|one| self.is_meshed(one))
        };
        service
            .ports
            .iter()
            .filter(wanted)
            .flat_map(|port| {
                service.vips.iter().map(|&address| CaptureTarget {
                    address,
                    port: Some(port.port),
                })
            })
            .collect()
    }

    fn is_meshed(&self, endpoint: &Endpoint) -> bool {
        endpoint
            .workload
            .as_ref()
            .and_then(|uid| self.workloads.get(uid))
            .is_some_and(|workload| workload.is_meshed())
    }
}

fn endpoint_uids(service: &Service) -> BTreeSet<&WorkloadUid> {
    service
        .ports
        .iter()
        .flat_map(|port| port.endpoints.iter())
        .filter_map(|endpoint| endpoint.workload.as_ref())
        .collect()
}

#[cfg(test)]
#[path = "snapshot_tests.rs"]
mod tests;
