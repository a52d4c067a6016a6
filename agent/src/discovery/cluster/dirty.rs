//! What has to be worked out anew.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::super::object::{Kind, ObjectKey};
use super::facts::Facts;
use super::policies::Attachment;
use crate::mesh::ObjectName;
use crate::mesh::policy::PolicyId;
use crate::mesh::route::RouteId;

/// What has to be worked out anew.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    pub(super) config: bool,
    pub(super) namespaces: BTreeSet<Arc<str>>,
    pub(super) nodes: BTreeSet<Arc<str>>,
    pub(super) pods: BTreeSet<ObjectName>,
    pub(super) services: BTreeSet<ObjectName>,
    /// Namespaces whose grants changed.
    pub(super) grants: BTreeSet<Arc<str>>,
    pub(super) routes: BTreeSet<RouteId>,
    /// Services whose routes are to be put together.
    pub(super) attached: BTreeSet<ObjectName>,
    pub(super) statuses: BTreeSet<RouteId>,
    pub(super) policies: BTreeSet<PolicyId>,
    /// What policies are to be attached to anew.
    pub(super) attachments: BTreeSet<Attachment>,
}

impl Dirty {
    pub(super) fn mark(&mut self, key: &ObjectKey, facts: &Facts) {
        match key.kind {
            Kind::MeshConfig => self.config = true,
            Kind::Namespace => {
                self.namespaces.insert(key.name.name.clone());
            }
            Kind::Node => {
                self.nodes.insert(key.name.name.clone());
            }
            Kind::Pod => {
                self.pods.insert(key.name.clone());
            }
            Kind::Service => {
                self.services.insert(key.name.clone());
            }
            Kind::EndpointSlice => {
                self.services
                    .extend(facts.slice().map(|slice| slice.service.clone()));
            }
            Kind::ReferenceGrant => {
                self.grants.insert(key.name.namespace.clone());
            }
            Kind::TrafficPolicy | Kind::XBackendTrafficPolicy => {
                self.policies.extend(key.policy());
                let targets = facts
                    .policy()
                    .into_iter()
                    .flat_map(|policy| &policy.targets);
                self.attachments.extend(targets.map(Attachment::from));
            }
            Kind::GrpcRoute | Kind::HttpRoute | Kind::TlsRoute | Kind::TcpRoute => {
                self.routes.extend(key.route());
                self.attachments.extend(key.route().map(Attachment::Route));
                let parents = facts.route().into_iter().flat_map(|route| &route.parents);
                self.attached
                    .extend(parents.map(|parent| parent.service.clone()));
            }
        }
    }
}
