//! Routes as they are shown.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use super::matching::{GrpcMatch, PathMatch, TargetMatch, ValueMatch};
use super::{
    Attached, Backend, BackendTarget, Condition, ConditionType, RequestMatch, RouteId, RouteStatus,
    ServiceRoutes, Truth,
};
use crate::mesh::Snapshot;

/// A route and one of the Services that it is attached to.
#[derive(Debug, Serialize)]
pub struct RouteView {
    /// The route.
    pub route: RouteId,
    /// The Service, with port and section where the route has them. None if it is attached to none.
    pub parent: Option<Arc<str>>,
    /// Condition `Accepted`.
    pub accepted: Option<Truth>,
    /// Condition `ResolvedRefs`.
    pub resolved_refs: Option<Truth>,
    /// Reason of the first condition that is not as it should be.
    pub reason: Option<&'static str>,
    /// Its message.
    pub message: Option<Arc<str>>,
    /// `metadata.generation` of the version that the conditions are about.
    pub observed_generation: Option<i64>,
    /// Who gives the conditions.
    pub controller: Option<&'static str>,
    /// All conditions.
    pub conditions: Vec<Condition>,
    /// What the route says to no effect.
    pub notes: Vec<Arc<str>>,
    /// Rules in force, in the order in which they are asked, each once for every port.
    pub rules: Vec<RuleView>,
}

/// A rule in force.
#[derive(Debug, Serialize)]
pub struct RuleView {
    /// Its name.
    pub name: Arc<str>,
    /// The Service's port.
    pub port: u16,
    /// Requests or connections that it is for.
    pub matches: Vec<String>,
    /// Where they go.
    pub backends: Vec<BackendView>,
}

/// Where a rule's requests go.
#[derive(Debug, Serialize)]
pub struct BackendView {
    /// The place.
    pub target: BackendTarget,
    /// Its weight.
    pub weight: u32,
}

impl Snapshot {
    /// All routes, by kind and name, as they are shown.
    #[must_use]
    pub fn route_views(&self) -> Vec<RouteView> {
        self.route_statuses()
            .flat_map(|status| {
                let attached = status.parents.iter().map(|parent| {
                    let service = self.routes_of(&parent.service);
                    let rules = service.map_or_else(Vec::new, |one| rules(one, &status.route));
                    view(status, Some((&parent.parent, &parent.conditions)), rules)
                });
                let detached = status
                    .parents
                    .is_empty()
                    .then(|| view(status, None, Vec::new()));
                attached.chain(detached).collect::<Vec<_>>()
            })
            .collect()
    }
}

fn view(
    status: &RouteStatus,
    parent: Option<(&Arc<str>, &Vec<Condition>)>,
    rules: Vec<RuleView>,
) -> RouteView {
    let conditions = parent.map_or_else(Vec::new, |(_, conditions)| conditions.clone());
    let of = |kind: ConditionType| {
        let condition = conditions.iter().find(|one| one.kind == kind);
        condition.map(|one| one.status)
    };
    let wrong = conditions.iter().find(|one| {
        let good = match one.kind {
            ConditionType::Accepted | ConditionType::ResolvedRefs => Truth::True,
            ConditionType::PartiallyInvalid => Truth::False,
        };
        one.status != good
    });
    RouteView {
        route: status.route.clone(),
        parent: parent.map(|(parent, _)| parent.clone()),
        accepted: of(ConditionType::Accepted),
        resolved_refs: of(ConditionType::ResolvedRefs),
        reason: wrong.map(|one| one.reason),
        message: wrong.map(|one| one.message.clone()),
        observed_generation: status.observed_generation,
        controller: parent.map(|_| super::CONTROLLER),
        notes: status.notes.clone(),
        conditions,
        rules,
    }
}

/// Rules of a route that are in force for a Service.
fn rules(service: &ServiceRoutes, route: &RouteId) -> Vec<RuleView> {
    let own = service.consumers.get(&route.name.namespace);
    let ports = own.unwrap_or(&service.producer);
    let mut rules: Vec<RuleView> = Vec::new();
    for (&port, attached) in ports {
        match attached {
            Attached::Requests(table) => {
                for selected in table.rules().filter(|one| one.rule.route == *route) {
                    let matched = selected.matched.to_string();
                    let known = rules
                        .iter_mut()
                        .find(|known| known.port == port && known.name == selected.rule.name);
                    match known {
                        Some(known) => known.matches.push(matched),
                        None => rules.push(RuleView {
                            name: selected.rule.name.clone(),
                            port,
                            matches: vec![matched],
                            backends: backends(&selected.rule.backends),
                        }),
                    }
                }
            }
            Attached::Streams(routes) => {
                let of_route = routes.rules().filter(|rule| rule.route == *route);
                rules.extend(of_route.map(|rule| RuleView {
                    name: rule.name.clone(),
                    port,
                    matches: rule.hostnames.iter().map(ToString::to_string).collect(),
                    backends: backends(&rule.backends),
                }));
            }
        }
    }
    rules
}

fn backends(backends: &[Backend]) -> Vec<BackendView> {
    backends
        .iter()
        .map(|backend| BackendView {
            target: backend.target.clone(),
            weight: backend.weight,
        })
        .collect()
}

impl fmt::Display for RequestMatch {
    /// `GET /v2/… version=two ?page=~"[0-9]+"`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(method) = &self.method {
            write!(f, "{method} ")?;
        }
        match &self.target {
            TargetMatch::Path(path) => write!(f, "{path}")?,
            TargetMatch::Grpc(call) => write!(f, "{call}")?,
        }
        for header in &self.headers {
            write!(f, " {}={}", header.name(), header.value())?;
        }
        for query in &self.query {
            write!(f, " ?{}={}", query.name, query.value)?;
        }
        Ok(())
    }
}

impl fmt::Display for PathMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(path) => f.write_str(path),
            Self::Prefix(prefix) => write!(f, "{prefix}/…"),
            Self::Regex(pattern) => write!(f, "{pattern:?}"),
        }
    }
}

impl fmt::Display for GrpcMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in [&self.service, &self.method] {
            match part {
                Some(value) => write!(f, "/{value}")?,
                None => f.write_str("/*")?,
            }
        }
        Ok(())
    }
}

impl fmt::Display for ValueMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(text) => f.write_str(text),
            Self::Regex(pattern) => write!(f, "{pattern:?}"),
        }
    }
}
