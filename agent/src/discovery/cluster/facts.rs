//! What is known of an object of any kind.

use std::sync::Arc;

use super::super::object::{Fault, Object};
use super::super::translate::{
    GrantFacts, NamespaceFacts, PodFacts, PolicyFacts, RouteFacts, ServiceFacts, SliceFacts,
    check_name, node,
};
use super::claims::Claim;
use crate::mesh::{MeshConfig, Node};

/// What is known of an object of any kind.
#[derive(Debug, PartialEq)]
pub(super) enum Facts {
    MeshConfig(MeshConfig),
    Namespace(NamespaceFacts),
    Node(Arc<Node>),
    Pod(Box<PodFacts>),
    Slice(SliceFacts),
    Service(Box<ServiceFacts>),
    Route(Box<RouteFacts>),
    Grant(GrantFacts),
    Policy(Box<PolicyFacts>),
    /// An object that is in order, but of no concern to a mesh.
    Nothing,
}

impl Facts {
    /// Checks an object.
    pub(super) fn of(object: &Object) -> Result<Self, Fault> {
        let metadata = object.metadata();
        check_name(
            "metadata.name",
            metadata.name.as_deref().unwrap_or_default(),
        )?;
        if let Some(namespace) = &metadata.namespace {
            check_name("metadata.namespace", namespace)?;
        }
        Ok(match object {
            Object::MeshConfig(config) => Self::MeshConfig(config.spec.settings()?),
            Object::Namespace(namespace) => Self::Namespace(NamespaceFacts::of(namespace)?),
            Object::Node(given) => Self::Node(Arc::new(node(given)?)),
            Object::Pod(pod) => Self::Pod(Box::new(PodFacts::of(pod)?)),
            Object::EndpointSlice(slice) => {
                SliceFacts::of(slice)?.map_or(Self::Nothing, Self::Slice)
            }
            Object::Service(service) => ServiceFacts::of(service)?
                .map_or(Self::Nothing, |facts| Self::Service(facts.into())),
            Object::GrpcRoute(route) => Self::Route(RouteFacts::of_grpc(route)?.into()),
            Object::HttpRoute(route) => Self::Route(RouteFacts::of_http(route)?.into()),
            Object::TlsRoute(route) => Self::Route(RouteFacts::of_tls(route)?.into()),
            Object::TcpRoute(route) => Self::Route(RouteFacts::of_tcp(route)?.into()),
            Object::ReferenceGrant(grant) => Self::Grant(GrantFacts::of(grant)?),
            Object::TrafficPolicy(policy) => {
                Self::Policy(PolicyFacts::of_traffic_policy(policy)?.into())
            }
            Object::XBackendTrafficPolicy(policy) => {
                Self::Policy(PolicyFacts::of_backend_traffic_policy(policy)?.into())
            }
        })
    }

    /// What only this object may have, each with the field that asks for it.
    pub(super) fn claims(&self) -> Vec<(Claim, String)> {
        match self {
            Self::MeshConfig(_) => vec![(Claim::MeshConfig, "kind".to_owned())],
            Self::Pod(pod) => {
                let uid = (Claim::Uid(pod.uid().clone()), "metadata.uid".to_owned());
                let addresses = pod.addresses().iter().enumerate().map(|(index, address)| {
                    (
                        Claim::Address(*address),
                        format!("status.podIPs[{index}].ip"),
                    )
                });
                std::iter::once(uid).chain(addresses).collect()
            }
            Self::Service(service) => service
                .vips
                .iter()
                .flat_map(|(vip, field)| {
                    service
                        .ports
                        .iter()
                        .map(|port| (Claim::Vip(*vip, port.port), field.clone()))
                })
                .collect(),
            Self::Namespace(_)
            | Self::Node(_)
            | Self::Slice(_)
            | Self::Route(_)
            | Self::Grant(_)
            | Self::Policy(_)
            | Self::Nothing => Vec::new(),
        }
    }

    pub(super) fn mesh_config(&self) -> Option<&MeshConfig> {
        match self {
            Self::MeshConfig(config) => Some(config),
            _ => None,
        }
    }

    pub(super) fn namespace(&self) -> Option<&NamespaceFacts> {
        match self {
            Self::Namespace(facts) => Some(facts),
            _ => None,
        }
    }

    pub(super) fn node(&self) -> Option<&Arc<Node>> {
        match self {
            Self::Node(node) => Some(node),
            _ => None,
        }
    }

    pub(super) fn pod(&self) -> Option<&PodFacts> {
        match self {
            Self::Pod(facts) => Some(facts),
            _ => None,
        }
    }

    pub(super) fn slice(&self) -> Option<&SliceFacts> {
        match self {
            Self::Slice(facts) => Some(facts),
            _ => None,
        }
    }

    pub(super) fn service(&self) -> Option<&ServiceFacts> {
        match self {
            Self::Service(facts) => Some(facts),
            _ => None,
        }
    }

    pub(super) fn route(&self) -> Option<&RouteFacts> {
        match self {
            Self::Route(facts) => Some(facts),
            _ => None,
        }
    }

    pub(super) fn grant(&self) -> Option<&GrantFacts> {
        match self {
            Self::Grant(facts) => Some(facts),
            _ => None,
        }
    }

    pub(super) fn policy(&self) -> Option<&PolicyFacts> {
        match self {
            Self::Policy(facts) => Some(facts),
            _ => None,
        }
    }
}
