//! What `/policies` shows: every policy, what it is attached to, and whether it is in force there.

use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;

use super::Column;
use crate::mesh::Snapshot;
use crate::mesh::policy::{AncestorStatus, PolicyId, PolicyStatus};
use crate::mesh::route::{Condition, ConditionType, Truth};

/// `/policies` as a table; JSON has what each policy says too.
pub const POLICY_COLUMNS: &[Column] = &[
    column("POLICY", &["policy"]),
    column("TARGET", &["ancestor"]),
    column("IN FORCE", &["in_force"]),
    column("REASON", &["reason"]),
    column("MESSAGE", &["rejection", "message"]),
];

const fn column(header: &'static str, fields: &'static [&'static str]) -> Column {
    Column { header, fields }
}

/// One policy for one target of `/policies`.
#[derive(Debug, Serialize)]
pub struct PolicyRow {
    policy: PolicyId,
    observed_generation: Option<i64>,
    ancestor: Option<Arc<str>>,
    in_force: Truth,
    reason: &'static str,
    message: Option<Arc<str>>,
    conditions: Vec<Condition>,
    /// Why the last version is not in force: the field and the reason.
    rejection: Option<Arc<str>>,
    spec: Value,
}

/// Every policy, with a row for each target.
#[must_use]
pub fn rows(snapshot: &Snapshot) -> Vec<PolicyRow> {
    snapshot
        .policy_statuses()
        .flat_map(|one| rows_of(one))
        .collect()
}

/// What of policies is not in force, and why: `object: field: reason`.
#[must_use]
pub fn refused(snapshot: &Snapshot) -> Vec<String> {
    let mut refused = Vec::new();
    for status in snapshot.policy_statuses() {
        let reasons = status.rejection.iter().chain(status.problems());
        refused.extend(reasons.map(|reason| format!("{}: {reason}", status.policy)));
    }
    refused
}

fn rows_of(status: &PolicyStatus) -> Vec<PolicyRow> {
    if status.ancestors.is_empty() {
        return vec![row(status, None)];
    }
    let ancestors = status.ancestors.iter();
    ancestors
        .map(|ancestor| row(status, Some(ancestor)))
        .collect()
}

fn row(status: &PolicyStatus, ancestor: Option<&AncestorStatus>) -> PolicyRow {
    let conditions = ancestor.map_or_else(Vec::new, |ancestor| ancestor.conditions.clone());
    let accepted = conditions
        .iter()
        .find(|one| one.kind == ConditionType::Accepted);
    PolicyRow {
        policy: status.policy.clone(),
        observed_generation: status.observed_generation,
        ancestor: ancestor.map(|ancestor| ancestor.ancestor.clone()),
        in_force: accepted.map_or(Truth::False, |one| one.status),
        reason: accepted.map_or("Invalid", |one| one.reason),
        // What is wrong comes before what is well.
        message: status_problem(&conditions)
            .or(accepted)
            .map(|one| one.message.clone()),
        rejection: status.rejection.clone(),
        spec: status.spec.clone(),
        conditions,
    }
}

fn status_problem(conditions: &[Condition]) -> Option<&Condition> {
    conditions.iter().find(|one| one.status == Truth::False)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::mesh::ObjectName;
    use crate::mesh::policy::PolicyKind;
    use crate::mesh::route::CONTROLLER;

    fn snapshot() -> Snapshot {
        let policy = |name: &str| PolicyId {
            kind: PolicyKind::TrafficPolicy,
            name: ObjectName::new("shop", name),
        };
        let condition = |kind, status, reason, message: &str| Condition {
            kind,
            status,
            reason,
            message: message.into(),
        };
        let ancestor = |ancestor: &str, conditions| AncestorStatus {
            ancestor: ancestor.into(),
            controller: CONTROLLER,
            conditions,
        };
        let accepted = || {
            condition(
                ConditionType::Accepted,
                Truth::True,
                "Accepted",
                "is in force",
            )
        };
        let statuses = [
            PolicyStatus {
                policy: policy("cart"),
                observed_generation: Some(2),
                ancestors: vec![
                    ancestor("Service/shop/cart", vec![accepted()]),
                    ancestor(
                        "HTTPRoute/shop/main",
                        vec![condition(
                            ConditionType::Accepted,
                            Truth::False,
                            "TargetNotFound",
                            "spec.targetRefs[1]: there is no HTTPRoute shop/main",
                        )],
                    ),
                ],
                rejection: None,
                spec: json!({}),
            },
            PolicyStatus {
                policy: policy("web"),
                observed_generation: None,
                ancestors: Vec::new(),
                rejection: Some("spec.breaker.probes: must be from 1 to 1000, is 0".into()),
                spec: Value::Null,
            },
        ];
        let mut snapshot = Snapshot::default();
        for status in statuses {
            snapshot.set_policy_status(&status.policy.clone(), Some(Arc::new(status)));
        }
        snapshot
    }

    #[test]
    fn a_policy_has_a_row_for_each_target_and_one_if_it_was_never_in_force() {
        let rows = serde_json::to_value(rows(&snapshot())).unwrap();
        let shown: Vec<_> = rows
            .as_array()
            .unwrap()
            .iter()
            .map(|row| {
                (
                    &row["policy"],
                    &row["ancestor"],
                    &row["in_force"],
                    &row["reason"],
                )
            })
            .map(|(policy, ancestor, in_force, reason)| json!([policy, ancestor, in_force, reason]))
            .collect();
        assert_eq!(
            shown,
            [
                json!([
                    "TrafficPolicy/shop/cart",
                    "Service/shop/cart",
                    "True",
                    "Accepted"
                ]),
                json!([
                    "TrafficPolicy/shop/cart",
                    "HTTPRoute/shop/main",
                    "False",
                    "TargetNotFound"
                ]),
                json!(["TrafficPolicy/shop/web", null, "False", "Invalid"]),
            ]
        );
    }

    #[test]
    fn what_is_refused_is_told_by_object_field_and_reason() {
        assert_eq!(
            refused(&snapshot()),
            [
                "TrafficPolicy/shop/cart: spec.targetRefs[1]: there is no HTTPRoute shop/main",
                "TrafficPolicy/shop/web: spec.breaker.probes: must be from 1 to 1000, is 0",
            ]
        );
    }
}
