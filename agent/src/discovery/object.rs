//! Objects as they were given, whatever they came from.

use std::fmt;

use gateway_api::experimental::grpcroutes::GrpcRoute;
use gateway_api::experimental::httproutes::HttpRoute;
use gateway_api::experimental::referencegrants::ReferenceGrant;
use gateway_api::experimental::tcproutes::TcpRoute;
use gateway_api::experimental::tlsroutes::TlsRoute;
use gateway_api::experimental::xbackendtrafficpolicies::XBackendTrafficPolicy;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Serialize, Serializer};
use thiserror::Error;

use super::translate::{MeshConfigManifest, TrafficPolicyManifest};
use crate::mesh::ObjectName;
use crate::mesh::policy::{PolicyId, PolicyKind};
use crate::mesh::route::{RouteId, RouteKind};

/// The kinds that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum Kind {
    /// `undermesh.io/v1alpha1`.
    MeshConfig,
    /// `v1`.
    Namespace,
    /// `v1`.
    Node,
    /// `v1`.
    Pod,
    /// `discovery.k8s.io/v1`.
    EndpointSlice,
    /// `v1`.
    Service,
    /// `gateway.networking.k8s.io/v1`.
    #[serde(rename = "GRPCRoute")]
    GrpcRoute,
    /// `gateway.networking.k8s.io/v1`.
    #[serde(rename = "HTTPRoute")]
    HttpRoute,
    /// `gateway.networking.k8s.io/v1`.
    #[serde(rename = "TLSRoute")]
    TlsRoute,
    /// `gateway.networking.k8s.io/v1`.
    #[serde(rename = "TCPRoute")]
    TcpRoute,
    /// `gateway.networking.k8s.io/v1`.
    ReferenceGrant,
    /// `undermesh.io/v1alpha1`.
    TrafficPolicy,
    /// `gateway.networking.x-k8s.io/v1alpha1`.
    XBackendTrafficPolicy,
}

impl Kind {
    /// Whether its objects live in a namespace.
    #[must_use]
    pub fn scope(self) -> Scope {
        match self {
            Self::MeshConfig | Self::Namespace | Self::Node => Scope::Cluster,
            Self::Pod
            | Self::EndpointSlice
            | Self::Service
            | Self::GrpcRoute
            | Self::HttpRoute
            | Self::TlsRoute
            | Self::TcpRoute
            | Self::ReferenceGrant
            | Self::TrafficPolicy
            | Self::XBackendTrafficPolicy => Scope::Namespace,
        }
    }

    /// Which kind of route it is, if it is one.
    #[must_use]
    pub fn route(self) -> Option<RouteKind> {
        match self {
            Self::GrpcRoute => Some(RouteKind::Grpc),
            Self::HttpRoute => Some(RouteKind::Http),
            Self::TlsRoute => Some(RouteKind::Tls),
            Self::TcpRoute => Some(RouteKind::Tcp),
            Self::MeshConfig
            | Self::Namespace
            | Self::Node
            | Self::Pod
            | Self::EndpointSlice
            | Self::Service
            | Self::ReferenceGrant
            | Self::TrafficPolicy
            | Self::XBackendTrafficPolicy => None,
        }
    }
}

/// Where a kind's names are unique.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// In the whole cluster.
    Cluster,
    /// In one namespace.
    Namespace,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.route() {
            Some(route) => route.fmt(f),
            None => fmt::Debug::fmt(self, f),
        }
    }
}

impl From<RouteKind> for Kind {
    fn from(kind: RouteKind) -> Self {
        match kind {
            RouteKind::Grpc => Self::GrpcRoute,
            RouteKind::Http => Self::HttpRoute,
            RouteKind::Tls => Self::TlsRoute,
            RouteKind::Tcp => Self::TcpRoute,
        }
    }
}

/// What tells one object from all others.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// Its kind.
    pub kind: Kind,
    /// Its name; the namespace is empty for kinds of the whole cluster.
    pub name: ObjectName,
}

impl ObjectKey {
    /// The object of this kind, namespace (not looked at for kinds of the whole cluster; `default`
    /// where none is given) and name.
    #[must_use]
    pub fn new(kind: Kind, namespace: Option<&str>, name: &str) -> Self {
        let namespace = match kind.scope() {
            Scope::Cluster => "",
            Scope::Namespace => namespace.unwrap_or("default"),
        };
        Self {
            kind,
            name: ObjectName::new(namespace, name),
        }
    }

    /// The policy that it is, if it is one.
    #[must_use]
    pub fn policy(&self) -> Option<PolicyId> {
        let kind = match self.kind {
            Kind::TrafficPolicy => PolicyKind::TrafficPolicy,
            Kind::XBackendTrafficPolicy => PolicyKind::XBackendTrafficPolicy,
            _ => return None,
        };
        Some(PolicyId {
            kind,
            name: self.name.clone(),
        })
    }

    /// The route that it is, if it is one.
    #[must_use]
    pub fn route(&self) -> Option<RouteId> {
        Some(RouteId {
            kind: self.kind.route()?,
            name: self.name.clone(),
        })
    }
}

impl From<&RouteId> for ObjectKey {
    fn from(route: &RouteId) -> Self {
        Self {
            kind: route.kind.into(),
            name: route.name.clone(),
        }
    }
}

impl From<&PolicyId> for ObjectKey {
    fn from(policy: &PolicyId) -> Self {
        Self {
            kind: match policy.kind {
                PolicyKind::TrafficPolicy => Kind::TrafficPolicy,
                PolicyKind::XBackendTrafficPolicy => Kind::XBackendTrafficPolicy,
            },
            name: policy.name.clone(),
        }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind.scope() {
            Scope::Cluster => write!(f, "{} {}", self.kind, self.name.name),
            Scope::Namespace => write!(f, "{} {}", self.kind, self.name),
        }
    }
}

impl Serialize for ObjectKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Why an object is not taken.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize)]
#[error("{object}: {field}: {reason}")]
pub struct Rejection {
    /// The object.
    pub object: ObjectKey,
    /// Path of the field, like `spec.ports[0].port`.
    pub field: String,
    /// What is wrong with it.
    pub reason: String,
}

/// Where in an object something is wrong: a [`Rejection`] that does not know its object yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Path of the field.
    pub field: String,
    /// What is wrong with it.
    pub reason: String,
}

impl Fault {
    pub(super) fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            reason: reason.into(),
        }
    }

    pub(super) fn of(self, object: &ObjectKey) -> Rejection {
        Rejection {
            object: object.clone(),
            field: self.field,
            reason: self.reason,
        }
    }
}

/// An object of a kind that is read.
#[derive(Debug, Clone)]
pub enum Object {
    /// Settings of the mesh.
    MeshConfig(Box<MeshConfigManifest>),
    /// A namespace: its labels enrol its pods.
    Namespace(Box<Namespace>),
    /// A node.
    Node(Box<Node>),
    /// A pod.
    Pod(Box<Pod>),
    /// Endpoints of a Service.
    EndpointSlice(Box<EndpointSlice>),
    /// A Service.
    Service(Box<Service>),
    /// Where gRPC calls go.
    GrpcRoute(Box<GrpcRoute>),
    /// Where HTTP requests go.
    HttpRoute(Box<HttpRoute>),
    /// Where TLS connections go.
    TlsRoute(Box<TlsRoute>),
    /// Where TCP connections go.
    TcpRoute(Box<TcpRoute>),
    /// Which routes of other namespaces may send to its own.
    ReferenceGrant(Box<ReferenceGrant>),
    /// What traffic to a Service, or over a route, gets.
    TrafficPolicy(Box<TrafficPolicyManifest>),
    /// The retry budget of a Service.
    XBackendTrafficPolicy(Box<XBackendTrafficPolicy>),
}

impl Object {
    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::MeshConfig(_) => Kind::MeshConfig,
            Self::Namespace(_) => Kind::Namespace,
            Self::Node(_) => Kind::Node,
            Self::Pod(_) => Kind::Pod,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::Service(_) => Kind::Service,
            Self::GrpcRoute(_) => Kind::GrpcRoute,
            Self::HttpRoute(_) => Kind::HttpRoute,
            Self::TlsRoute(_) => Kind::TlsRoute,
            Self::TcpRoute(_) => Kind::TcpRoute,
            Self::ReferenceGrant(_) => Kind::ReferenceGrant,
            Self::TrafficPolicy(_) => Kind::TrafficPolicy,
            Self::XBackendTrafficPolicy(_) => Kind::XBackendTrafficPolicy,
        }
    }

    /// Its metadata.
    #[must_use]
    pub fn metadata(&self) -> &ObjectMeta {
        match self {
            Self::MeshConfig(object) => &object.metadata,
            Self::Namespace(object) => &object.metadata,
            Self::Node(object) => &object.metadata,
            Self::Pod(object) => &object.metadata,
            Self::EndpointSlice(object) => &object.metadata,
            Self::Service(object) => &object.metadata,
            Self::GrpcRoute(object) => &object.metadata,
            Self::HttpRoute(object) => &object.metadata,
            Self::TlsRoute(object) => &object.metadata,
            Self::TcpRoute(object) => &object.metadata,
            Self::ReferenceGrant(object) => &object.metadata,
            Self::TrafficPolicy(object) => &object.metadata,
            Self::XBackendTrafficPolicy(object) => &object.metadata,
        }
    }

    /// What tells it from all others; its name is empty if it has none.
    #[must_use]
    pub fn key(&self) -> ObjectKey {
        let metadata = self.metadata();
        ObjectKey::new(
            self.kind(),
            metadata.namespace.as_deref(),
            metadata.name.as_deref().unwrap_or_default(),
        )
    }
}
