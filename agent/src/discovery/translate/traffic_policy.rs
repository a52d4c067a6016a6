//! `TrafficPolicy`, Undermesh's own kind: what traffic to a Service, or over a route, gets.

use std::fmt;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::super::object::Fault;
use super::{GATEWAY_GROUP, check_name};
use crate::mesh::ObjectName;
use crate::mesh::policy::spec::{PolicyTargetRef, TrafficPolicySpec};
use crate::mesh::policy::{PolicyId, PolicyKind};
use crate::mesh::route::{RouteId, RouteKind};

/// `apiVersion` of [`TrafficPolicyManifest`].
pub const TRAFFIC_POLICY_API_VERSION: &str = "undermesh.io/v1alpha1";

/// The most targets of one policy.
const TARGETS_MAX: usize = 16;

/// A `TrafficPolicy` as it is written.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrafficPolicyManifest {
    /// `undermesh.io/v1alpha1`.
    pub api_version: String,
    /// `TrafficPolicy`.
    pub kind: String,
    /// Its name and namespace.
    pub metadata: ObjectMeta,
    /// What it says.
    pub spec: TrafficPolicySpec,
    /// What is said of it; not read.
    #[serde(default)]
    pub status: Option<IgnoredAny>,
}

/// What the mesh needs to know of a policy, of either kind.
#[derive(Debug, Clone, PartialEq)]
pub struct PolicyFacts {
    /// Kind and name.
    pub id: PolicyId,
    /// `metadata.creationTimestamp`, by which the older of two with one target comes first. Manifests
    /// in files have none; then names decide.
    pub created: Option<Time>,
    /// `metadata.generation`.
    pub generation: Option<i64>,
    /// What it is attached to, in the order of `targetRefs`.
    pub targets: Vec<PolicyTarget>,
    /// What it says.
    pub spec: Arc<TrafficPolicySpec>,
}

/// What a policy is attached to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PolicyTarget {
    /// A Service, or one port of it.
    Service {
        /// Its name.
        name: ObjectName,
        /// The port's name, or its number where it has none; none: all ports.
        section: Option<Arc<str>>,
    },
    /// A route.
    Route(RouteId),
}

impl fmt::Display for PolicyTarget {
    /// `Service/shop/cart#http`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service {
                name,
                section: Some(section),
            } => write!(f, "Service/{name}#{section}"),
            Self::Service {
                name,
                section: None,
            } => write!(f, "Service/{name}"),
            Self::Route(route) => route.fmt(f),
        }
    }
}

impl PolicyFacts {
    /// Checks a `TrafficPolicy`.
    pub fn of_traffic_policy(manifest: &TrafficPolicyManifest) -> Result<Self, Fault> {
        Self::new(
            PolicyKind::TrafficPolicy,
            &manifest.metadata,
            &manifest.spec,
        )
    }

    /// Checks what a policy of either kind says.
    pub(super) fn new(
        kind: PolicyKind,
        metadata: &ObjectMeta,
        spec: &TrafficPolicySpec,
    ) -> Result<Self, Fault> {
        let name = metadata.name.as_deref().unwrap_or_default();
        let namespace = metadata.namespace.as_deref().unwrap_or("default");
        let targets = targets(namespace, &spec.target_refs)?;
        if targets
            .iter()
            .any(|one| matches!(one, PolicyTarget::Route(_)))
            && let Some(field) = spec.service_only().first()
        {
            return Err(Fault::new(
                format!("spec.{field}"),
                "holds for a whole Service: a policy that targets a route cannot have it",
            ));
        }
        check_settings(spec)?;
        Ok(Self {
            id: PolicyId {
                kind,
                name: ObjectName::new(namespace, name),
            },
            created: metadata.creation_timestamp.clone(),
            generation: metadata.generation,
            targets,
            spec: Arc::new(spec.clone()),
        })
    }

    /// The Service that it falls back to.
    #[must_use]
    pub fn fallback(&self) -> Option<ObjectName> {
        let backend = self.spec.fallback.as_ref()?.backend.as_ref()?;
        Some(ObjectName::new(&self.id.name.namespace, &backend.name))
    }

    /// Which of two policies comes first where both want one target (GEP-713, "Conflict
    /// resolution"): the older one; then the one whose name comes first.
    #[must_use]
    pub fn seniority(&self) -> impl Ord + use<'_> {
        let age = self.created.as_ref().map(|created| created.0);
        (age.is_none(), age, &self.id)
    }
}

/// All that is wrong with the settings, the first by its field.
fn check_settings(spec: &TrafficPolicySpec) -> Result<(), Fault> {
    let mut faults = spec.faults().into_iter();
    let Some(first) = faults.next() else {
        return Ok(());
    };
    let mut reason = first.reason;
    for other in faults {
        reason += &format!("; and spec.{other}");
    }
    Err(Fault::new(format!("spec.{}", first.field), reason))
}

fn targets(namespace: &str, refs: &[PolicyTargetRef]) -> Result<Vec<PolicyTarget>, Fault> {
    if refs.is_empty() || refs.len() > TARGETS_MAX {
        let reason = format!("must be 1 to {TARGETS_MAX}, are {}", refs.len());
        return Err(Fault::new("spec.targetRefs", reason));
    }
    let mut targets = Vec::with_capacity(refs.len());
    for (index, given) in refs.iter().enumerate() {
        let field = format!("spec.targetRefs[{index}]");
        let target = target(namespace, given, &field)?;
        if targets.contains(&target) {
            return Err(Fault::new(field, format!("{target} is named twice")));
        }
        targets.push(target);
    }
    Ok(targets)
}

fn target(namespace: &str, given: &PolicyTargetRef, field: &str) -> Result<PolicyTarget, Fault> {
    check_name(&format!("{field}.name"), &given.name)?;
    let name = ObjectName::new(namespace, &given.name);
    let kind = match (given.group.as_str(), given.kind.as_str()) {
        ("" | "core", "Service") => {
            return Ok(PolicyTarget::Service {
                name,
                section: given.section_name.as_deref().map(Arc::from),
            });
        }
        (GATEWAY_GROUP, "HTTPRoute") => RouteKind::Http,
        (GATEWAY_GROUP, "GRPCRoute") => RouteKind::Grpc,
        (GATEWAY_GROUP, "TLSRoute") => RouteKind::Tls,
        (GATEWAY_GROUP, "TCPRoute") => RouteKind::Tcp,
        (group, kind) => {
            let reason = format!(
                "{kind:?} of group {group:?} cannot be a target: a Service of group \"\" can, and an \
                 HTTPRoute, GRPCRoute, TLSRoute or TCPRoute of {GATEWAY_GROUP}"
            );
            return Err(Fault::new(format!("{field}.kind"), reason));
        }
    };
    if given.section_name.is_some() {
        let reason = "a policy holds for all rules of a route";
        return Err(Fault::new(format!("{field}.sectionName"), reason));
    }
    Ok(PolicyTarget::Route(RouteId { kind, name }))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn facts(spec: Value) -> Result<PolicyFacts, String> {
        let manifest = json!({
            "apiVersion": TRAFFIC_POLICY_API_VERSION, "kind": "TrafficPolicy",
            "metadata": { "name": "cart", "namespace": "shop" }, "spec": spec
        });
        let manifest: TrafficPolicyManifest =
            serde_json::from_value(manifest).map_err(|error| error.to_string())?;
        PolicyFacts::of_traffic_policy(&manifest)
            .map_err(|fault| format!("{}: {}", fault.field, fault.reason))
    }

    fn route(kind: &str) -> Value {
        json!({ "group": GATEWAY_GROUP, "kind": kind, "name": "main" })
    }

    #[test]
    fn services_their_ports_and_every_kind_of_route_can_be_targets() {
        let targets = json!([
            { "kind": "Service", "name": "cart" },
            { "group": "", "kind": "Service", "name": "cart", "sectionName": "http" },
            route("HTTPRoute"), route("GRPCRoute"), route("TLSRoute"), route("TCPRoute")
        ]);
        let facts = facts(json!({ "targetRefs": targets })).unwrap();
        let shown: Vec<_> = facts.targets.iter().map(ToString::to_string).collect();
        assert_eq!(
            shown,
            [
                "Service/shop/cart",
                "Service/shop/cart#http",
                "HTTPRoute/shop/main",
                "GRPCRoute/shop/main",
                "TLSRoute/shop/main",
                "TCPRoute/shop/main"
            ]
        );
    }

    #[test]
    fn what_cannot_be_a_target_is_refused() {
        let service = json!({ "kind": "Service", "name": "cart" });
        for (targets, expected) in [
            (json!([]), "spec.targetRefs: must be 1 to 16, are 0"),
            (
                json!(vec![service.clone(); 17]),
                "spec.targetRefs: must be 1 to 16, are 17",
            ),
            (
                json!([service, service]),
                "spec.targetRefs[1]: Service/shop/cart is named twice",
            ),
            (
                json!([{ "group": "apps", "kind": "Deployment", "name": "cart" }]),
                "spec.targetRefs[0].kind: \"Deployment\" of group \"apps\" cannot be a target",
            ),
            (
                json!([{ "kind": "HTTPRoute", "name": "main" }]),
                "spec.targetRefs[0].kind: \"HTTPRoute\" of group \"\" cannot be a target",
            ),
            (
                json!([{ "kind": "Service", "name": "Cart" }]),
                "spec.targetRefs[0].name: \"Cart\" is not a name",
            ),
            (
                json!([{ "group": GATEWAY_GROUP, "kind": "HTTPRoute", "name": "main",
                         "sectionName": "rule" }]),
                "spec.targetRefs[0].sectionName: a policy holds for all rules of a route",
            ),
            (
                json!([{ "kind": "Service", "name": "cart", "namespace": "other" }]),
                "unknown field `namespace`",
            ),
        ] {
            let error = facts(json!({ "targetRefs": targets })).unwrap_err();
            assert!(error.starts_with(expected), "{error} is not {expected}");
        }
    }

    #[test]
    fn a_route_cannot_have_what_holds_for_a_whole_service() {
        let error = facts(json!({
            "targetRefs": [route("HTTPRoute")], "retryBudget": { "ratio": 0.1 }
        }));
        let expected = "spec.retryBudget: holds for a whole Service: a policy that targets a route \
                        cannot have it";
        assert_eq!(error.unwrap_err(), expected);
    }

    #[test]
    fn everything_that_is_wrong_with_the_settings_is_told_by_its_field() {
        let error = facts(json!({
            "targetRefs": [{ "kind": "Service", "name": "cart" }],
            "breaker": { "failureRatio": 2, "probes": 0 }
        }));
        assert_eq!(
            error.unwrap_err(),
            "spec.breaker.failureRatio: must be from 0.01 to 1, is 2; \
             and spec.breaker.probes: must be from 1 to 1000, is 0"
        );
    }

    #[test]
    fn the_older_comes_first_and_among_equals_the_name_decides() {
        let policy = |name: &str, created: Option<&str>| {
            let mut facts = facts(json!({
                "targetRefs": [{ "kind": "Service", "name": "cart" }]
            }))
            .unwrap();
            facts.id.name = ObjectName::new("shop", name);
            facts.created = created.map(|at| serde_json::from_value(json!(at)).unwrap());
            facts
        };
        let mut policies = [
            policy("a", None),
            policy("b", Some("2026-02-01T00:00:00Z")),
            policy("d", Some("2026-01-01T00:00:00Z")),
            policy("c", Some("2026-01-01T00:00:00Z")),
        ];
        policies.sort_by(|one, other| one.seniority().cmp(&other.seniority()));
        let names: Vec<_> = policies.iter().map(|one| &*one.id.name.name).collect();
        assert_eq!(names, ["c", "d", "b", "a"]);
    }
}
