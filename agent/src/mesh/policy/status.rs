//! What is said of a policy in its status.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;

use super::super::ObjectName;
use super::super::route::{Condition, Truth};

/// Kinds of policies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum PolicyKind {
    /// `TrafficPolicy` (`undermesh.io/v1alpha1`).
    TrafficPolicy,
    /// `XBackendTrafficPolicy` (`gateway.networking.x-k8s.io/v1alpha1`). A `TrafficPolicy` comes
    /// before it.
    XBackendTrafficPolicy,
}

/// What tells one policy from all others.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyId {
    /// Its kind.
    pub kind: PolicyKind,
    /// Namespace and name.
    pub name: ObjectName,
}

impl fmt::Display for PolicyId {
    /// `TrafficPolicy/shop/cart`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}/{}", self.kind, self.name)
    }
}

impl Serialize for PolicyId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Status of a policy (GEP-713 `PolicyStatus`), one part for each target.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PolicyStatus {
    /// The policy.
    pub policy: PolicyId,
    /// `metadata.generation` of the version that the conditions are about.
    pub observed_generation: Option<i64>,
    /// What it is attached to, in the order of `targetRefs`.
    pub ancestors: Vec<AncestorStatus>,
    /// Why its last version is not in force: the field and the reason. The version before it stays
    /// in force, if there was one.
    pub rejection: Option<Arc<str>>,
    /// What the version in force says: only the fields that are given.
    pub spec: Value,
}

impl PolicyStatus {
    /// What conditions that do not hold say.
    pub fn problems(&self) -> impl Iterator<Item = &Arc<str>> {
        self.ancestors
            .iter()
            .flat_map(|ancestor| &ancestor.conditions)
            .filter(|condition| condition.status == Truth::False)
            .map(|condition| &condition.message)
    }
}

/// Status for one target (`PolicyAncestorStatus`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AncestorStatus {
    /// The target, as `Service/shop/cart#http` or `HTTPRoute/shop/cart`.
    pub ancestor: Arc<str>,
    /// Always [`super::super::route::CONTROLLER`].
    pub controller: &'static str,
    /// Conditions, in the order of their types.
    pub conditions: Vec<Condition>,
}
