//! Ways from one object to those that depend on it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use super::super::object::ObjectKey;
use super::super::translate::{PolicyFacts, Referent, RouteFacts};
use super::facts::Facts;
use super::policies::Attachment;
use crate::mesh::ObjectName;
use crate::mesh::policy::PolicyId;
use crate::mesh::route::RouteId;

/// A label of a namespace's pods: namespace, name, value.
type Label = (Arc<str>, String, String);

/// Ways from one object to those that depend on it. Everything in it is an object in force.
#[derive(Debug, Default)]
pub(super) struct Index {
    mesh_config: Option<ObjectKey>,
    pods_by_namespace: HashMap<Arc<str>, BTreeSet<ObjectName>>,
    pods_by_label: HashMap<Label, BTreeSet<ObjectName>>,
    /// By one label of their selector, which is enough to find them.
    services_by_label: HashMap<Label, BTreeSet<ObjectName>>,
    slices_by_service: HashMap<ObjectName, BTreeSet<ObjectName>>,
    slices_by_address: HashMap<IpAddr, BTreeSet<ObjectName>>,
    routes_by_parent: HashMap<ObjectName, BTreeSet<RouteId>>,
    /// By Services that they send to.
    routes_by_backend: HashMap<ObjectName, BTreeSet<RouteId>>,
    /// By other namespaces that they send to.
    routes_by_foreign: HashMap<Arc<str>, BTreeSet<RouteId>>,
    grants_by_namespace: HashMap<Arc<str>, BTreeSet<ObjectName>>,
    policies_by_target: HashMap<Attachment, BTreeSet<PolicyId>>,
    /// By Services that they fall back to.
    policies_by_fallback: HashMap<ObjectName, BTreeSet<PolicyId>>,
}

impl Index {
    pub(super) fn add(&mut self, key: &ObjectKey, facts: &Facts) {
        match facts {
            Facts::MeshConfig(_) => self.mesh_config = Some(key.clone()),
            Facts::Namespace(_) | Facts::Node(_) | Facts::Nothing => {}
            Facts::Pod(pod) => {
                let name = &key.name;
                put(&mut self.pods_by_namespace, name.namespace.clone(), name);
                for label in labels(name, pod.labels()) {
                    put(&mut self.pods_by_label, label, name);
                }
            }
            Facts::Slice(slice) => {
                put(
                    &mut self.slices_by_service,
                    slice.service.clone(),
                    &key.name,
                );
                for endpoint in &slice.endpoints {
                    put(&mut self.slices_by_address, endpoint.address, &key.name);
                }
            }
            Facts::Service(service) => {
                if let Some(label) = labels(&key.name, &service.selector).next() {
                    put(&mut self.services_by_label, label, &key.name);
                }
            }
            Facts::Route(route) => {
                for parent in &route.parents {
                    put(
                        &mut self.routes_by_parent,
                        parent.service.clone(),
                        &route.id,
                    );
                }
                for backend in backends(route) {
                    put(&mut self.routes_by_backend, backend.clone(), &route.id);
                    if backend.namespace != route.id.name.namespace {
                        let namespace = backend.namespace.clone();
                        put(&mut self.routes_by_foreign, namespace, &route.id);
                    }
                }
            }
            Facts::Grant(_) => {
                let namespace = key.name.namespace.clone();
                put(&mut self.grants_by_namespace, namespace, &key.name);
            }
            Facts::Policy(policy) => {
                for attachment in attachments(policy) {
                    put(&mut self.policies_by_target, attachment, &policy.id);
                }
                if let Some(service) = policy.fallback() {
                    put(&mut self.policies_by_fallback, service, &policy.id);
                }
            }
        }
    }

    pub(super) fn remove(&mut self, key: &ObjectKey, facts: &Facts) {
        match facts {
            Facts::MeshConfig(_) => self.mesh_config = None,
            Facts::Namespace(_) | Facts::Node(_) | Facts::Nothing => {}
            Facts::Pod(pod) => {
                let name = &key.name;
                drop_from(&mut self.pods_by_namespace, &name.namespace, name);
                for label in labels(name, pod.labels()) {
                    drop_from(&mut self.pods_by_label, &label, name);
                }
            }
            Facts::Slice(slice) => {
                drop_from(&mut self.slices_by_service, &slice.service, &key.name);
                for endpoint in &slice.endpoints {
                    drop_from(&mut self.slices_by_address, &endpoint.address, &key.name);
                }
            }
            Facts::Service(service) => {
                if let Some(label) = labels(&key.name, &service.selector).next() {
                    drop_from(&mut self.services_by_label, &label, &key.name);
                }
            }
            Facts::Route(route) => {
                for parent in &route.parents {
                    drop_from(&mut self.routes_by_parent, &parent.service, &route.id);
                }
                for backend in backends(route) {
                    drop_from(&mut self.routes_by_backend, backend, &route.id);
                    drop_from(&mut self.routes_by_foreign, &backend.namespace, &route.id);
                }
            }
            Facts::Grant(_) => {
                let namespace = &key.name.namespace;
                drop_from(&mut self.grants_by_namespace, namespace, &key.name);
            }
            Facts::Policy(policy) => {
                for attachment in attachments(policy) {
                    drop_from(&mut self.policies_by_target, &attachment, &policy.id);
                }
                if let Some(service) = policy.fallback() {
                    drop_from(&mut self.policies_by_fallback, &service, &policy.id);
                }
            }
        }
    }

    pub(super) fn mesh_config(&self) -> Option<&ObjectKey> {
        self.mesh_config.as_ref()
    }

    pub(super) fn pods(&self) -> impl Iterator<Item = ObjectName> {
        self.pods_by_namespace.values().flatten().cloned()
    }

    pub(super) fn pods_of_namespace(&self, namespace: &str) -> impl Iterator<Item = ObjectName> {
        let pods = self.pods_by_namespace.get(namespace);
        pods.into_iter().flatten().cloned()
    }

    pub(super) fn slices_of(&self, service: &ObjectName) -> impl Iterator<Item = &ObjectName> {
        self.slices_by_service.get(service).into_iter().flatten()
    }

    pub(super) fn slices_with(&self, address: IpAddr) -> impl Iterator<Item = &ObjectName> {
        self.slices_by_address.get(&address).into_iter().flatten()
    }

    pub(super) fn routes_of(&self, service: &ObjectName) -> impl Iterator<Item = &RouteId> {
        self.routes_by_parent.get(service).into_iter().flatten()
    }

    /// Routes that send to this Service.
    pub(super) fn routes_to(&self, service: &ObjectName) -> impl Iterator<Item = &RouteId> {
        self.routes_by_backend.get(service).into_iter().flatten()
    }

    /// Routes of other namespaces that send to this one.
    pub(super) fn routes_into(&self, namespace: &str) -> impl Iterator<Item = &RouteId> {
        self.routes_by_foreign.get(namespace).into_iter().flatten()
    }

    pub(super) fn grants_of(&self, namespace: &str) -> impl Iterator<Item = &ObjectName> {
        self.grants_by_namespace
            .get(namespace)
            .into_iter()
            .flatten()
    }

    /// Policies that have this as a target, or a port of it.
    pub(super) fn policies_on(&self, target: &Attachment) -> impl Iterator<Item = &PolicyId> {
        self.policies_by_target.get(target).into_iter().flatten()
    }

    /// Policies that fall back to this Service.
    pub(super) fn falling_back_to(&self, service: &ObjectName) -> impl Iterator<Item = &PolicyId> {
        self.policies_by_fallback.get(service).into_iter().flatten()
    }

    /// Policies that fall back to a Service.
    pub(super) fn falling_back(&self) -> impl Iterator<Item = &PolicyId> {
        self.policies_by_fallback.values().flatten()
    }

    /// Services that may select a pod with these labels.
    pub(super) fn candidates_for(
        &self,
        namespace: &Arc<str>,
        pod_labels: &BTreeMap<String, String>,
    ) -> impl Iterator<Item = &ObjectName> {
        pod_labels.iter().flat_map(move |(name, value)| {
            let label = (namespace.clone(), name.clone(), value.clone());
            self.services_by_label.get(&label).into_iter().flatten()
        })
    }

    /// Pods that this selector may select.
    pub(super) fn candidates_by(
        &self,
        namespace: &Arc<str>,
        selector: &BTreeMap<String, String>,
    ) -> impl Iterator<Item = &ObjectName> {
        let rarest = selector
            .iter()
            .map(|(name, value)| {
                let label = (namespace.clone(), name.clone(), value.clone());
                self.pods_by_label.get(&label)
            })
            .min_by_key(|pods| pods.map_or(0, BTreeSet::len));
        rarest.flatten().into_iter().flatten()
    }
}

fn labels<'a>(
    object: &ObjectName,
    labels: &'a BTreeMap<String, String>,
) -> impl Iterator<Item = Label> + use<'a> {
    let namespace = object.namespace.clone();
    labels
        .iter()
        .map(move |(name, value)| (namespace.clone(), name.clone(), value.clone()))
}

/// What a policy is attached to, each once.
fn attachments(policy: &PolicyFacts) -> BTreeSet<Attachment> {
    policy.targets.iter().map(Attachment::from).collect()
}

/// Services that a route sends to.
fn backends(route: &RouteFacts) -> impl Iterator<Item = &ObjectName> {
    route
        .references()
        .filter_map(|reference| match &reference.referent {
            Referent::Service { name, .. } => Some(name),
            Referent::Other(_) => None,
        })
}

fn put<K: Eq + Hash, V: Ord + Clone>(map: &mut HashMap<K, BTreeSet<V>>, key: K, value: &V) {
    map.entry(key).or_default().insert(value.clone());
}

fn drop_from<K: Eq + Hash, V: Ord>(map: &mut HashMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(values) = map.get_mut(key) {
        values.remove(value);
        if values.is_empty() {
            map.remove(key);
        }
    }
}
