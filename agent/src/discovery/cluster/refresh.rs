//! Nodes, pods and Services of the snapshot, worked out anew from the objects.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::dirty::Dirty;
use super::policies::Attachment;
use super::{Cluster, Outcome};
use crate::discovery::object::{Kind, ObjectKey};
use crate::discovery::translate::{
    PodContext, ServiceFacts, SliceFacts, derive_endpoints, slice_endpoints,
};
use crate::mesh::{Endpoint, MeshConfig, ObjectName, Service, ServicePort, Workload};

impl Cluster {
    pub(super) fn config(&self) -> MeshConfig {
        let key = self.index.mesh_config();
        let facts = key.and_then(|key| self.facts.get(key));
        facts
            .and_then(|facts| facts.mesh_config())
            .cloned()
            .unwrap_or_default()
    }

    pub(super) fn refresh_node(&mut self, name: &Arc<str>) {
        let key = ObjectKey::new(Kind::Node, None, name);
        match self.facts.get(&key).and_then(|facts| facts.node()) {
            Some(node) => self.snapshot.insert_node(node.clone()),
            None => self.snapshot.remove_node(name),
        }
    }

    pub(super) fn refresh_pods(
        &mut self,
        pods: &BTreeSet<ObjectName>,
        services: &mut BTreeSet<ObjectName>,
    ) -> Outcome {
        let mut new = Vec::new();
        let mut outcome = Outcome::Unchanged;
        // All old ones go first: one of the new may have another's UID.
        for name in pods {
            let uid = self.uids.get(name);
            let old = uid.and_then(|uid| self.snapshot.workload(uid)).cloned();
            let now = self.workload(name);
            if old.as_deref() == now.as_ref() {
                continue;
            }
            outcome = Outcome::Changed;
            if !same_endpoints(old.as_deref(), now.as_ref()) {
                for workload in old.as_deref().into_iter().chain(&now) {
                    services.extend(self.services_affected_by(workload));
                }
            }
            let keeps_uid = old.as_ref().map(|old| &old.uid) == now.as_ref().map(|now| &now.uid);
            if let Some(old) = old.filter(|_| !keeps_uid) {
                self.snapshot.remove_workload(&old.uid);
                self.uids.remove(name);
            }
            new.extend(now);
        }
        for workload in new {
            self.uids
                .insert(workload.name.clone(), workload.uid.clone());
            self.snapshot.insert_workload(Arc::new(workload));
        }
        outcome
    }

    fn workload(&self, name: &ObjectName) -> Option<Workload> {
        let namespace = ObjectKey::new(Kind::Namespace, None, &name.namespace);
        let namespace = self.facts.get(&namespace);
        self.pod(name)?.workload(PodContext {
            namespace: namespace.and_then(|facts| facts.namespace()),
            config: self.snapshot.config(),
            node: &self.node,
        })
    }

    fn services_affected_by(&self, workload: &Workload) -> BTreeSet<ObjectName> {
        let by_slice = workload
            .addresses
            .iter()
            .flat_map(|address| self.index.slices_with(*address))
            .filter_map(|slice| Some(self.slice(slice)?.service.clone()));
        let by_selector = self
            .index
            .candidates_for(&workload.name.namespace, &workload.labels)
            .filter(|name| {
                self.service(name)
                    .is_some_and(|service| service.selects(&workload.labels))
            })
            .cloned();
        by_slice.chain(by_selector).collect()
    }

    pub(super) fn refresh_service(&mut self, name: &ObjectName, dirty: &mut Dirty) -> Outcome {
        let now = self.service(name).map(|facts| self.assemble(facts));
        let old = self.snapshot.service(name);
        if old.map(|old| &**old) == now.as_ref() {
            return Outcome::Unchanged;
        }
        if !same_frontend(old.map(|old| &**old), now.as_ref()) {
            dirty.routes.extend(self.index.routes_to(name).cloned());
            dirty.attached.insert(name.clone());
            dirty.attachments.insert(Attachment::Service(name.clone()));
            dirty
                .policies
                .extend(self.index.falling_back_to(name).cloned());
        }
        match now {
            Some(service) => self.snapshot.insert_service(Arc::new(service)),
            None => self.snapshot.remove_service(name),
        }
        Outcome::Changed
    }

    /// A Service with its endpoints: from its slices, or from the pods that it selects where no
    /// controller makes slices for it.
    fn assemble(&self, facts: &ServiceFacts) -> Service {
        let slices: Vec<&SliceFacts> = self
            .index
            .slices_of(&facts.name)
            .filter_map(|slice| self.slice(slice))
            .collect();
        let selected: Vec<&Arc<Workload>> = if slices.is_empty() {
            self.index
                .candidates_by(&facts.name.namespace, &facts.selector)
                .filter_map(|pod| self.snapshot.workload(self.uids.get(pod)?))
                .filter(|workload| facts.selects(&workload.labels))
                .collect()
        } else {
            Vec::new()
        };
        let ports = facts.ports.iter().map(|port| {
            let endpoints: Vec<Endpoint> = if slices.is_empty() {
                derive_endpoints(facts, port, selected.iter().copied())
            } else {
                slice_endpoints(port, slices.iter().copied(), |address| {
                    self.snapshot.workload_at(address)
                })
            };
            ServicePort {
                name: port.name.clone(),
                port: port.port,
                app_protocol: port.app_protocol.clone(),
                opaque: port.opaque,
                endpoints: endpoints.into(),
            }
        });
        Service {
            name: facts.name.clone(),
            vips: facts.vips.iter().map(|(vip, _)| *vip).collect(),
            ports: ports.collect(),
        }
    }
}

/// Whether two states of a pod make the same endpoints.
fn same_endpoints(old: Option<&Workload>, new: Option<&Workload>) -> bool {
    let (Some(old), Some(new)) = (old, new) else {
        return false;
    };
    old.uid == new.uid
        && old.addresses == new.addresses
        && old.readiness == new.readiness
        && old.named_ports == new.named_ports
        && old.labels == new.labels
}

/// Whether two states of a Service are the same to routes, which do not ask for endpoints.
fn same_frontend(old: Option<&Service>, new: Option<&Service>) -> bool {
    let (Some(old), Some(new)) = (old, new) else {
        return false;
    };
    let ports = |service: &Service| -> Vec<(Arc<str>, u16)> {
        let ports = service.ports.iter();
        ports.map(|port| (port.name.clone(), port.port)).collect()
    };
    old.vips.is_empty() == new.vips.is_empty() && ports(old) == ports(new)
}
