//! What the endpoint shows.

use std::collections::BTreeMap;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::time::SystemTime;

use serde::Serialize;
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::Instant;

use crate::telemetry::Telemetry;

/// Whether something that readiness asks for is so, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// It is so; the text says what was seen.
    Ready(String),
    /// It is not so yet, or no more; the text says what is missing.
    NotReady(String),
}

impl Condition {
    /// Whether it holds.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        matches!(self, Self::Ready(_))
    }
}

/// A column of a view's table.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    /// What stands above it.
    pub header: &'static str,
    /// Names of fields (`a.b` for a nested one): the first that is there and not null is shown.
    pub fields: &'static [&'static str],
}

type Read = Box<dyn Fn() -> Value + Send + Sync>;
type ReadCondition = Box<dyn Fn() -> Condition + Send + Sync>;

/// Everything that the listeners show. Closures are called for each request on a thread that may
/// block, and a request waits for them a bounded time.
pub struct AdminState {
    node: String,
    telemetry: Arc<Telemetry>,
    started: Instant,
    started_at: SystemTime,
    conditions: Vec<(&'static str, ReadCondition)>,
    reports: Vec<(&'static str, Read)>,
    views: BTreeMap<&'static str, View>,
}

pub(super) struct View {
    pub columns: &'static [Column],
    read: Read,
}

impl AdminState {
    /// Of the agent of this node, with the views that the telemetry gives.
    #[must_use]
    pub fn new(node: &str, telemetry: Arc<Telemetry>) -> Self {
        Self {
            node: node.to_owned(),
            telemetry,
            started: Instant::now(),
            started_at: SystemTime::now(),
            conditions: Vec::new(),
            reports: Vec::new(),
            views: BTreeMap::new(),
        }
    }

    /// Adds a condition of readiness. The agent is ready when all hold.
    #[must_use]
    pub fn condition(
        mut self,
        name: &'static str,
        read: impl Fn() -> Condition + Send + Sync + 'static,
    ) -> Self {
        self.conditions.push((name, Box::new(read)));
        self
    }

    /// Adds a part of `/healthz`, such as the documents that were refused.
    #[must_use]
    pub fn report<T: Serialize>(
        mut self,
        name: &'static str,
        read: impl Fn() -> T + Send + Sync + 'static,
    ) -> Self {
        self.reports
            .push((name, Box::new(move || to_value(&read()))));
        self
    }

    /// Adds the view `/<name>`. Without columns its table has one for each field.
    #[must_use]
    pub fn view<T: Serialize>(
        mut self,
        name: &'static str,
        columns: &'static [Column],
        read: impl Fn() -> T + Send + Sync + 'static,
    ) -> Self {
        let read: Read = Box::new(move || to_value(&read()));
        self.views.insert(name, View { columns, read });
        self
    }

    pub(super) fn telemetry(&self) -> &Arc<Telemetry> {
        &self.telemetry
    }

    pub(super) fn view_named(&self, name: &str) -> Option<&View> {
        self.views.get(name)
    }

    pub(super) fn view_names(&self) -> impl Iterator<Item = &'static str> {
        self.views.keys().copied()
    }

    /// What `/healthz` says. That it is said at all means that the agent lives.
    pub(super) fn health(&self) -> Value {
        let started_at = OffsetDateTime::from(self.started_at)
            .format(&Rfc3339)
            .unwrap_or_default();
        let mut health = Map::new();
        health.insert("status".into(), "ok".into());
        health.insert("node".into(), self.node.as_str().into());
        health.insert("version".into(), env!("CARGO_PKG_VERSION").into());
        health.insert("started_at".into(), started_at.into());
        health.insert(
            "uptime_seconds".into(),
            self.started.elapsed().as_secs().into(),
        );
        health.insert("connections".into(), self.telemetry.live().into());
        for (name, read) in &self.reports {
            health.insert((*name).into(), read());
        }
        Value::Object(health)
    }

    /// Every condition. One of which the closure panics does not hold.
    pub(super) fn readiness(&self) -> Readiness {
        let read = |read: &ReadCondition| {
            panic::catch_unwind(AssertUnwindSafe(read))
                .unwrap_or_else(|_| Condition::NotReady("the check itself failed".into()))
        };
        Readiness {
            conditions: self
                .conditions
                .iter()
                .map(|(name, condition)| (*name, read(condition)))
                .collect(),
        }
    }
}

impl View {
    pub(super) fn read(&self) -> Value {
        (self.read)()
    }
}

/// Conditions at one moment.
pub(super) struct Readiness {
    conditions: Vec<(&'static str, Condition)>,
}

impl Readiness {
    pub fn is_ready(&self) -> bool {
        self.unmet().next().is_none()
    }

    /// Names of conditions that do not hold.
    pub fn unmet(&self) -> impl Iterator<Item = &'static str> {
        self.conditions
            .iter()
            .filter(|(_, condition)| !condition.is_ready())
            .map(|(name, _)| *name)
    }

    pub fn to_value(&self) -> Value {
        let conditions: Vec<Value> = self
            .conditions
            .iter()
            .map(|(name, condition)| {
                let (state, reason) = match condition {
                    Condition::Ready(reason) => ("ready", reason),
                    Condition::NotReady(reason) => ("not_ready", reason),
                };
                json!({"name": name, "state": state, "reason": reason})
            })
            .collect();
        json!({"ready": self.is_ready(), "conditions": conditions})
    }
}

/// A view that cannot be written as JSON shows why instead.
fn to_value(view: &impl Serialize) -> Value {
    serde_json::to_value(view).unwrap_or_else(|error| json!({"error": error.to_string()}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> AdminState {
        AdminState::new("node-a", Telemetry::new())
    }

    #[test]
    fn readiness_needs_every_condition_and_names_those_that_fail() {
        let state = state()
            .condition("capture", || Condition::Ready("4 pods".into()))
            .condition("certificates", || Condition::NotReady("CA away".into()));
        let readiness = state.readiness();
        assert!(!readiness.is_ready());
        assert_eq!(readiness.unmet().collect::<Vec<_>>(), ["certificates"]);
        let value = readiness.to_value();
        assert_eq!(value["conditions"][0]["state"], "ready");
        assert_eq!(value["conditions"][1]["reason"], "CA away");
    }

    #[test]
    fn a_condition_that_panics_does_not_hold() {
        let state = state().condition("broken", || panic!("a test of panics"));
        assert!(!state.readiness().is_ready());
    }

    #[test]
    fn health_holds_the_reports_of_other_parts() {
        let state = state().report("refused_documents", || vec!["a.yaml:3"]);
        let health = state.health();
        assert_eq!(health["node"], "node-a");
        assert_eq!(health["refused_documents"][0], "a.yaml:3");
    }
}
