//! What routes of all kinds have in common.
//!
//! The crate `gateway-api` has, for every place at which the API has one schema, a type of its own:
//! four for a filter, five for a parent. So what it has read is read once more, as the types here,
//! of which there is one of each.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::super::object::{Fault, Object};
use super::route_filter::{FilterFacts, FilterManifest};
use super::{check_name, check_port};
use crate::mesh::ObjectName;
use crate::mesh::route::{
    Backend, BackendTarget, RequestMatch, RouteId, RouteKind, RouteRetry, RouteTimeouts, Rule,
    SessionPersistence, StreamRule,
};

/// Group of routes and grants.
pub const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";

/// The most that a list of a route may hold, as the API has it.
pub(super) const RULES_MAX: usize = 16;
const PARENTS_MAX: usize = 32;
const BACKENDS_MAX: usize = 16;

/// The most that all rules of a route may hold together: of matches as the API has it, of regular
/// expressions because each takes memory.
const ALL_MATCHES_MAX: usize = 128;
const ALL_PATTERNS_MAX: usize = 128;

/// The greatest weight.
const WEIGHT_MAX: u32 = 1_000_000;

/// What the mesh needs to know of a route.
#[derive(Debug, Clone, PartialEq)]
pub struct RouteFacts {
    /// Kind and name.
    pub id: RouteId,
    /// `metadata.generation`.
    pub generation: Option<i64>,
    /// `metadata.creationTimestamp`, in seconds since 1970. A manifest has none.
    pub created: Option<i64>,
    /// The Services that it is attached to. Other parents are not the mesh's.
    pub parents: Vec<ParentFacts>,
    /// Its rules.
    pub rules: RouteRules,
    /// What it says to no effect.
    pub notes: Vec<Arc<str>>,
}

/// A Service that a route is attached to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ParentFacts {
    /// The Service.
    pub service: ObjectName,
    /// `port`: this port only.
    pub port: Option<u16>,
    /// `sectionName`: the port of this name only.
    pub section: Option<Arc<str>>,
}

impl std::fmt::Display for ParentFacts {
    /// `shop/web:80#http`
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.service)?;
        if let Some(port) = self.port {
            write!(f, ":{port}")?;
        }
        if let Some(section) = &self.section {
            write!(f, "#{section}")?;
        }
        Ok(())
    }
}

/// Rules of a route.
#[derive(Debug, Clone, PartialEq)]
pub enum RouteRules {
    /// Of an HTTPRoute or a GRPCRoute.
    Requests(Vec<RuleFacts>),
    /// Of a TLSRoute or a TCPRoute.
    Streams(Vec<StreamRuleFacts>),
}

impl RouteFacts {
    /// Everything that the route refers to, mirrors included.
    pub fn references(&self) -> impl Iterator<Item = &BackendRef> {
        let (requests, streams) = match &self.rules {
            RouteRules::Requests(rules) => (rules.as_slice(), [].as_slice()),
            RouteRules::Streams(rules) => ([].as_slice(), rules.as_slice()),
        };
        let of_requests = requests.iter().flat_map(|rule| {
            let of_backends = rule.backends.iter().flat_map(|backend| {
                std::iter::once(&backend.reference).chain(backend.filters.references())
            });
            rule.filters.references().chain(of_backends)
        });
        let of_streams = streams
            .iter()
            .flat_map(|rule| rule.backends.iter().map(|backend| &backend.reference));
        of_requests.chain(of_streams)
    }

    /// Whether it changes nothing but what its own namespace's clients see: none of the Services
    /// that it is attached to is of its namespace.
    #[must_use]
    pub fn is_consumer(&self) -> bool {
        self.parents
            .iter()
            .all(|parent| parent.service.namespace != self.id.name.namespace)
    }
}

/// A rule of an HTTPRoute or a GRPCRoute, before its backends are looked up.
#[derive(Debug, Clone, PartialEq)]
pub struct RuleFacts {
    /// See [`Rule::name`].
    pub name: Arc<str>,
    /// See [`Rule::matches`].
    pub matches: Vec<RequestMatch>,
    /// See [`Rule::filters`].
    pub filters: FilterFacts,
    /// See [`Rule::backends`].
    pub backends: Vec<BackendFacts>,
    /// See [`Rule::timeouts`].
    pub timeouts: Option<RouteTimeouts>,
    /// See [`Rule::retry`].
    pub retry: Option<RouteRetry>,
    /// See [`Rule::session`].
    pub session: Option<SessionPersistence>,
}

impl RuleFacts {
    /// The rule, of this route, with what its references turn out to be.
    pub fn resolve(
        &self,
        route: &RouteId,
        resolve: &mut impl FnMut(&BackendRef) -> BackendTarget,
    ) -> Rule {
        Rule {
            name: self.name.clone(),
            route: route.clone(),
            matches: self.matches.clone(),
            filters: self.filters.resolve(resolve),
            backends: self
                .backends
                .iter()
                .map(|backend| backend.resolve(resolve))
                .collect(),
            timeouts: self.timeouts,
            retry: self.retry.clone(),
            session: self.session.clone(),
        }
    }
}

/// A rule of a TLSRoute or a TCPRoute, before its backends are looked up.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamRuleFacts {
    /// See [`StreamRule::name`].
    pub name: Arc<str>,
    /// See [`StreamRule::hostnames`].
    pub hostnames: Vec<Box<str>>,
    /// See [`StreamRule::backends`].
    pub backends: Vec<BackendFacts>,
}

impl StreamRuleFacts {
    /// The rule, of this route, with what its references turn out to be.
    pub fn resolve(
        &self,
        route: &RouteId,
        resolve: &mut impl FnMut(&BackendRef) -> BackendTarget,
    ) -> StreamRule {
        StreamRule {
            name: self.name.clone(),
            route: route.clone(),
            hostnames: self.hostnames.clone(),
            backends: self
                .backends
                .iter()
                .map(|backend| backend.resolve(resolve))
                .collect(),
        }
    }
}

/// A backend, before it is looked up.
#[derive(Debug, Clone, PartialEq)]
pub struct BackendFacts {
    /// What it is.
    pub reference: BackendRef,
    /// See [`Backend::weight`].
    pub weight: u32,
    /// See [`Backend::filters`].
    pub filters: FilterFacts,
}

impl BackendFacts {
    fn resolve(&self, resolve: &mut impl FnMut(&BackendRef) -> BackendTarget) -> Backend {
        Backend::new(
            resolve(&self.reference),
            self.weight,
            self.filters.resolve(resolve),
        )
    }
}

/// What a route refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendRef {
    /// Path of the field that refers.
    pub field: String,
    /// What it refers to.
    pub referent: Referent,
}

/// What a route can refer to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Referent {
    /// A port of a Service, which may not exist.
    Service {
        /// The Service.
        name: ObjectName,
        /// Its port.
        port: u16,
    },
    /// Something else: its group and kind.
    Other(String),
}

/// `ParentReference`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ParentManifest {
    group: Option<String>,
    kind: Option<String>,
    name: String,
    namespace: Option<String>,
    port: Option<i32>,
    section_name: Option<String>,
}

/// `HTTPBackendRef`, `GRPCBackendRef`, `BackendRef` and `BackendObjectReference`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct BackendManifest {
    group: Option<String>,
    kind: Option<String>,
    name: String,
    namespace: Option<String>,
    port: Option<i32>,
    weight: Option<i64>,
    #[serde(default)]
    pub(super) filters: Vec<FilterManifest>,
}

/// Reads what the crate `gateway-api` has read as a type of ours with the same fields.
pub(super) fn reread<T: DeserializeOwned>(given: &impl Serialize, field: &str) -> Result<T, Fault> {
    serde_json::to_value(given)
        .and_then(serde_json::from_value)
        .map_err(|error| Fault::new(field, error.to_string()))
}

/// Kind and name of a route.
pub(super) fn identify(kind: RouteKind, metadata: &ObjectMeta) -> RouteId {
    RouteId {
        kind,
        name: ObjectName::new(
            metadata.namespace.as_deref().unwrap_or("default"),
            metadata.name.as_deref().unwrap_or_default(),
        ),
    }
}

/// When it was made, in seconds since 1970.
pub(super) fn created(metadata: &ObjectMeta) -> Option<i64> {
    let time = metadata.creation_timestamp.as_ref()?;
    Some(time.0.as_second())
}

/// The Services among these parents.
pub(super) fn parents(id: &RouteId, given: &impl Serialize) -> Result<Vec<ParentFacts>, Fault> {
    const FIELD: &str = "spec.parentRefs";
    let given: Option<Vec<ParentManifest>> = reread(given, FIELD)?;
    let given = given.unwrap_or_default();
    at_most(FIELD, &given, PARENTS_MAX)?;
    let mut parents = BTreeSet::new();
    for (index, parent) in given.into_iter().enumerate() {
        let field = |leaf: &str| format!("{FIELD}[{index}].{leaf}");
        // Left out they mean a Gateway.
        let is_service =
            parent.group.as_deref() == Some("") && parent.kind.as_deref() == Some("Service");
        if !is_service {
            continue;
        }
        let namespace = parent.namespace.as_deref().unwrap_or(&id.name.namespace);
        check_name(&field("name"), &parent.name)?;
        check_name(&field("namespace"), namespace)?;
        parents.insert(ParentFacts {
            service: ObjectName::new(namespace, &parent.name),
            port: parent
                .port
                .map(|port| check_port(field("port"), port))
                .transpose()?,
            section: parent.section_name.map(Arc::from),
        });
    }
    Ok(parents.into_iter().collect())
}

/// The Services that an object would be attached to, if it is a route, whatever else is wrong with
/// it.
#[must_use]
pub fn route_parents(object: &Object) -> Vec<ParentFacts> {
    let id = |kind| identify(kind, object.metadata());
    let parents = match object {
        Object::GrpcRoute(route) => parents(&id(RouteKind::Grpc), &route.spec.parent_refs),
        Object::HttpRoute(route) => parents(&id(RouteKind::Http), &route.spec.parent_refs),
        Object::TlsRoute(route) => parents(&id(RouteKind::Tls), &route.spec.parent_refs),
        Object::TcpRoute(route) => parents(&id(RouteKind::Tcp), &route.spec.parent_refs),
        _ => Ok(Vec::new()),
    };
    parents.unwrap_or_default()
}

/// Which rules a name is for: names are unique within a route.
#[derive(Debug, Default)]
pub(super) struct RuleNames(BTreeSet<String>);

impl RuleNames {
    /// The name of the rule at this index, for labels and logs.
    pub(super) fn take(
        &mut self,
        id: &RouteId,
        index: usize,
        name: Option<&str>,
    ) -> Result<Arc<str>, Fault> {
        let Some(name) = name else {
            return Ok(format!("{id}/{index}").into());
        };
        let field = format!("spec.rules[{index}].name");
        check_name(&field, name)?;
        if !self.0.insert(name.to_owned()) {
            return Err(Fault::new(field, format!("another rule is named {name}")));
        }
        Ok(format!("{id}/{name}").into())
    }
}

/// Refuses rules that are too many or too large together.
pub(super) fn check_rules(rules: &[RuleFacts]) -> Result<(), Fault> {
    let matches = || rules.iter().flat_map(|rule| &rule.matches);
    let patterns = matches().map(RequestMatch::patterns).sum();
    for (count, what, most) in [
        (matches().count(), "matches", ALL_MATCHES_MAX),
        (patterns, "regular expressions", ALL_PATTERNS_MAX),
    ] {
        if count > most {
            let reason = format!("have {count} {what} together: at most {most}");
            return Err(Fault::new("spec.rules", reason));
        }
    }
    Ok(())
}

/// Backends of a rule, `field` being the path of their list.
pub(super) fn backends(
    id: &RouteId,
    field: &str,
    given: Vec<BackendManifest>,
    matches: &[RequestMatch],
) -> Result<Vec<BackendFacts>, Fault> {
    at_most(field, &given, BACKENDS_MAX)?;
    let read = |(index, given): (usize, BackendManifest)| {
        let field = format!("{field}[{index}]");
        let weight = match given.weight {
            None => 1,
            Some(weight) => u32::try_from(weight)
                .ok()
                .filter(|weight| *weight <= WEIGHT_MAX)
                .ok_or_else(|| {
                    let reason = format!("{weight} is not a weight: 0 to {WEIGHT_MAX}");
                    Fault::new(format!("{field}.weight"), reason)
                })?,
        };
        let filters = given.filters.clone();
        Ok(BackendFacts {
            reference: given.reference(id, &field)?,
            weight,
            filters: FilterFacts::of(id, &format!("{field}.filters"), filters, matches)?,
        })
    };
    given.into_iter().enumerate().map(read).collect()
}

/// What to say of a rule that sends nothing anywhere.
pub(super) fn note_on_weights(
    field: &str,
    backends: &[BackendFacts],
    answer: &str,
) -> Option<Arc<str>> {
    let none = !backends.is_empty() && backends.iter().all(|backend| backend.weight == 0);
    none.then(|| format!("{field}.backendRefs: every weight is 0: {answer}").into())
}

impl BackendManifest {
    /// What it refers to.
    pub(super) fn reference(&self, id: &RouteId, field: &str) -> Result<BackendRef, Fault> {
        let group = self.group.as_deref().unwrap_or_default();
        let kind = self.kind.as_deref().unwrap_or("Service");
        let referent = if group.is_empty() && kind == "Service" {
            let namespace = self.namespace.as_deref().unwrap_or(&id.name.namespace);
            check_name(&format!("{field}.name"), &self.name)?;
            check_name(&format!("{field}.namespace"), namespace)?;
            let field = format!("{field}.port");
            let Some(port) = self.port else {
                return Err(Fault::new(field, "is missing: a Service's port is meant"));
            };
            Referent::Service {
                name: ObjectName::new(namespace, &self.name),
                port: check_port(field, port)?,
            }
        } else {
            Referent::Other(format!("{group}/{kind}"))
        };
        Ok(BackendRef {
            field: field.to_owned(),
            referent,
        })
    }
}

/// Refuses a list that is longer than the API allows.
pub(super) fn at_most<T>(field: &str, list: &[T], most: usize) -> Result<(), Fault> {
    if list.len() <= most {
        return Ok(());
    }
    Err(Fault::new(
        field,
        format!("has {} entries: at most {most}", list.len()),
    ))
}

/// A host name as the API has it; with `*.` before it where that is allowed.
pub(super) fn check_hostname(field: &str, text: &str, wildcard: Wildcard) -> Result<(), Fault> {
    let name = match wildcard {
        Wildcard::Allowed => text.strip_prefix("*.").unwrap_or(text),
        Wildcard::Refused => text,
    };
    let is_address = name.parse::<std::net::IpAddr>().is_ok();
    if crate::mesh::is_kubernetes_name(name) && !is_address {
        return Ok(());
    }
    Err(Fault::new(field, format!("{text:?} is not a host name")))
}

/// Whether a host name may begin with `*.`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wildcard {
    Allowed,
    Refused,
}

/// What to say of host names where they mean nothing (GEP-1294, "`hostnames` field").
pub(super) fn note_on_hostnames(hostnames: &[String]) -> Option<Arc<str>> {
    (!hostnames.is_empty()).then(|| "spec.hostnames: mean nothing in a mesh".into())
}
