//! What is said of a route in its status.

use std::sync::Arc;

use serde::Serialize;

use super::RouteId;
use crate::mesh::ObjectName;

/// Status of a route (`RouteStatus`), one part for each Service that it is attached to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RouteStatus {
    /// The route.
    pub route: RouteId,
    /// `metadata.generation` of the version that the conditions are about.
    pub observed_generation: Option<i64>,
    /// Services that it names as parents. Parents of other kinds are not ours to speak of.
    pub parents: Vec<ParentStatus>,
    /// What has no effect in a mesh, though it is no error, such as `hostnames`.
    pub notes: Vec<Arc<str>>,
}

/// Status for one parent (`RouteParentStatus`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ParentStatus {
    /// The Service.
    pub service: ObjectName,
    /// The parent, as `namespace/name`, with `:port` and `#sectionName` where the route has them.
    pub parent: Arc<str>,
    /// Always `undermesh.io/mesh-controller`.
    pub controller: &'static str,
    /// Conditions, in the order of their types.
    pub conditions: Vec<Condition>,
}

/// `controllerName` of all statuses.
pub const CONTROLLER: &str = "undermesh.io/mesh-controller";

/// One condition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Condition {
    /// What it is about.
    #[serde(rename = "type")]
    pub kind: ConditionType,
    /// Whether it holds.
    pub status: Truth,
    /// Why, in one word of the API.
    pub reason: &'static str,
    /// Why, in words for people.
    pub message: Arc<str>,
}

/// Types of conditions (`RouteConditionType`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum ConditionType {
    /// The route is in force for this parent.
    Accepted,
    /// All that it refers to is there and may be referred to.
    ResolvedRefs,
    /// The version in force is not the one that is given.
    PartiallyInvalid,
}

/// Whether a condition holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Truth {
    /// It does.
    True,
    /// It does not.
    False,
}
