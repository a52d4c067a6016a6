//! Which policies are attached to what, as a snapshot holds it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use parking_lot::Mutex;

use super::spec::TrafficPolicySpec;
use super::{PolicyId, PolicyStatus, TrafficPolicy};
use crate::mesh::ObjectName;
use crate::mesh::route::RouteId;

/// Services whose policy under a route's is remembered, for each route; at the bound all are
/// forgotten, and put together anew as they are asked for.
const REMEMBERED: usize = 256;

/// What one policy says of one target.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// The object.
    pub name: ObjectName,
    /// What it says.
    pub spec: Arc<TrafficPolicySpec>,
}

/// What is said of a Service: for all of its ports, and for some; the strongest last.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ServiceLayers {
    /// Without `sectionName`.
    pub whole: Vec<Layer>,
    /// By `sectionName`: a port's name, or its number where it has none.
    pub ports: BTreeMap<Arc<str>, Vec<Layer>>,
}

impl ServiceLayers {
    /// Whether nothing is said.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.whole.is_empty() && self.ports.is_empty()
    }
}

/// All policies of a mesh. Cloning shares structure.
#[derive(Debug, Clone, Default)]
pub struct Policies {
    default: Arc<TrafficPolicy>,
    services: imbl::HashMap<ObjectName, Arc<ServicePolicies>>,
    routes: imbl::HashMap<RouteId, Arc<RoutePolicy>>,
    statuses: imbl::OrdMap<PolicyId, Arc<PolicyStatus>>,
}

/// The policies of a Service, put together.
#[derive(Debug)]
struct ServicePolicies {
    layers: ServiceLayers,
    whole: Option<Arc<Stack>>,
    ports: BTreeMap<Arc<str>, Arc<Stack>>,
}

/// Layers, and what they make.
#[derive(Debug)]
struct Stack {
    layers: Vec<Layer>,
    policy: Arc<TrafficPolicy>,
}

/// The policy of a route, and what it makes over those of Services.
#[derive(Debug)]
struct RoutePolicy {
    layer: Layer,
    alone: Arc<TrafficPolicy>,
    /// By the address of the Service's stack, which is kept so that no other can have it. It only
    /// remembers what follows from the two, so that a request costs no merging, and a policy keeps
    /// its address.
    over: Mutex<HashMap<usize, Merged>>,
}

/// What a route's policy makes over a Service's.
#[derive(Debug)]
struct Merged {
    policy: Arc<TrafficPolicy>,
    _over: Arc<Stack>,
}

impl Policies {
    /// What traffic to this port of a Service gets.
    #[must_use]
    pub fn of_service(
        &self,
        service: &ObjectName,
        port_name: &str,
        port: u16,
    ) -> Arc<TrafficPolicy> {
        match self.stack(service, port_name, port) {
            Some(stack) => stack.policy.clone(),
            None => self.default.clone(),
        }
    }

    /// The same on a route.
    #[must_use]
    pub fn on_route(
        &self,
        service: &ObjectName,
        port_name: &str,
        port: u16,
        route: &RouteId,
    ) -> Arc<TrafficPolicy> {
        let stack = self.stack(service, port_name, port);
        match (self.routes.get(route), stack) {
            (Some(route), Some(stack)) => route.over(stack),
            (Some(route), None) => route.alone.clone(),
            (None, Some(stack)) => stack.policy.clone(),
            (None, None) => self.default.clone(),
        }
    }

    /// Whether a policy is attached to this port of a Service.
    #[must_use]
    pub fn attach_to(&self, service: &ObjectName, port_name: &str, port: u16) -> bool {
        self.stack(service, port_name, port).is_some()
    }

    /// Statuses of all policies.
    pub fn statuses(&self) -> impl Iterator<Item = &Arc<PolicyStatus>> {
        self.statuses.values()
    }

    /// What is said of a Service.
    #[must_use]
    pub fn layers_of(&self, service: &ObjectName) -> Option<&ServiceLayers> {
        Some(&self.services.get(service)?.layers)
    }

    /// What is said of a route.
    #[must_use]
    pub fn layer_of(&self, route: &RouteId) -> Option<&Layer> {
        Some(&self.routes.get(route)?.layer)
    }

    /// The status of one policy.
    #[must_use]
    pub fn status(&self, policy: &PolicyId) -> Option<&Arc<PolicyStatus>> {
        self.statuses.get(policy)
    }

    pub(in crate::mesh) fn set_service(
        &mut self,
        service: &ObjectName,
        layers: Option<ServiceLayers>,
    ) {
        match layers.filter(|layers| !layers.is_empty()) {
            Some(layers) => {
                let same = self.services.get(service);
                if same.is_none_or(|same| same.layers != layers) {
                    let policies = ServicePolicies::new(layers);
                    self.services.insert(service.clone(), Arc::new(policies));
                }
            }
            None => {
                self.services.remove(service);
            }
        }
    }

    pub(in crate::mesh) fn set_route(&mut self, route: &RouteId, layer: Option<Layer>) {
        match layer {
            Some(layer) => {
                let same = self.routes.get(route);
                if same.is_none_or(|same| same.layer != layer) {
                    let policy = RoutePolicy::new(layer);
                    self.routes.insert(route.clone(), Arc::new(policy));
                }
            }
            None => {
                self.routes.remove(route);
            }
        }
    }

    pub(in crate::mesh) fn set_status(
        &mut self,
        policy: &PolicyId,
        status: Option<Arc<PolicyStatus>>,
    ) {
        match status {
            Some(status) => {
                self.statuses.insert(policy.clone(), status);
            }
            None => {
                self.statuses.remove(policy);
            }
        }
    }

    fn stack(&self, service: &ObjectName, port_name: &str, port: u16) -> Option<&Arc<Stack>> {
        let policies = self.services.get(service)?;
        if policies.ports.is_empty() {
            return policies.whole.as_ref();
        }
        let by_name = policies.ports.get(port_name);
        by_name
            .or_else(|| policies.ports.get(port.to_string().as_str()))
            .or(policies.whole.as_ref())
    }
}

impl ServicePolicies {
    fn new(layers: ServiceLayers) -> Self {
        let stack = |layers: Vec<Layer>| (!layers.is_empty()).then(|| Arc::new(Stack::of(layers)));
        let ports = layers.ports.iter().filter_map(|(port, own)| {
            let all = layers.whole.iter().chain(own).cloned().collect();
            Some((port.clone(), stack(all)?))
        });
        Self {
            ports: ports.collect(),
            whole: stack(layers.whole.clone()),
            layers,
        }
    }
}

impl Stack {
    fn of(layers: Vec<Layer>) -> Self {
        Self {
            policy: Arc::new(TrafficPolicy::of(&layers)),
            layers,
        }
    }
}

impl RoutePolicy {
    fn new(layer: Layer) -> Self {
        Self {
            alone: Arc::new(TrafficPolicy::of(std::slice::from_ref(&layer))),
            over: Mutex::default(),
            layer,
        }
    }

    fn over(&self, stack: &Arc<Stack>) -> Arc<TrafficPolicy> {
        let mut over = self.over.lock();
        let key = Arc::as_ptr(stack) as usize;
        if let Some(merged) = over.get(&key) {
            return merged.policy.clone();
        }
        if over.len() >= REMEMBERED {
            over.clear();
        }
        let layers: Vec<Layer> = stack.layers.iter().chain([&self.layer]).cloned().collect();
        let policy = Arc::new(TrafficPolicy::of(&layers));
        let merged = Merged {
            policy: policy.clone(),
            _over: stack.clone(),
        };
        over.insert(key, merged);
        policy
    }
}
