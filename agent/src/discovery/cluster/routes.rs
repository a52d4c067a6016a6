//! Routes: their backends looked up, attached to their Services, and what is said of them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::super::object::{Kind, ObjectKey, Rejection};
use super::super::translate::{BackendRef, ParentFacts, Referent, RouteFacts, RouteRules};
use super::dirty::Dirty;
use super::{Cluster, Outcome, key};
use crate::mesh::route::{
    Attached, BackendTarget, CONTROLLER, Condition, ConditionType, InvalidBackend, ParentStatus,
    PortRoutes, RouteId, RouteKind, RouteStatus, RouteTable, Rule, ServiceRoutes, StreamRoutes,
    StreamRule, Truth,
};
use crate::mesh::{ObjectName, Service};

/// Routes in force with their backends looked up.
pub(super) type CompiledRoutes = HashMap<RouteId, Arc<Compiled>>;

/// A route with its backends looked up.
#[derive(Debug, PartialEq)]
pub(super) struct Compiled {
    rules: CompiledRules,
    unresolved: Vec<Unresolved>,
}

#[derive(Debug, PartialEq)]
enum CompiledRules {
    Requests(Vec<Arc<Rule>>),
    Streams(Vec<Arc<StreamRule>>),
}

/// A reference to nothing that requests can be sent to.
#[derive(Debug, PartialEq)]
struct Unresolved {
    field: String,
    reason: InvalidBackend,
    message: String,
}

/// Ports of a Service for clients of a namespace, none being those that have no routes of their
/// own.
type Place = (Option<Arc<str>>, u16);

impl Cluster {
    /// Works out anew what is dirty of routes, once Services are as they are to be.
    pub(super) fn refresh_routes(&mut self, mut dirty: Dirty) -> Outcome {
        for namespace in &dirty.grants {
            dirty
                .routes
                .extend(self.index.routes_into(namespace).cloned());
        }
        for id in &dirty.routes {
            if self.compile(id) == Outcome::Changed {
                let parents = self.route(id).into_iter().flat_map(|route| &route.parents);
                dirty
                    .attached
                    .extend(parents.map(|parent| parent.service.clone()));
            }
        }
        let mut outcome = Outcome::Unchanged;
        for service in &dirty.attached {
            if self.attach(service) == Outcome::Changed {
                outcome = Outcome::Changed;
            }
            dirty
                .statuses
                .extend(self.index.routes_of(service).cloned());
        }
        dirty.statuses.extend(dirty.routes);
        for id in &dirty.statuses {
            if self.refresh_status(id) == Outcome::Changed {
                outcome = Outcome::Changed;
            }
        }
        outcome
    }

    fn compile(&mut self, id: &RouteId) -> Outcome {
        let now = self.route(id).map(|route| self.compiled(route));
        if self.routes.get(id).map(|old| &**old) == now.as_ref() {
            return Outcome::Unchanged;
        }
        match now {
            Some(now) => self.routes.insert(id.clone(), Arc::new(now)),
            None => self.routes.remove(id),
        };
        Outcome::Changed
    }

    fn compiled(&self, route: &RouteFacts) -> Compiled {
        let mut unresolved = Vec::new();
        let mut resolve = |reference: &BackendRef| {
            self.resolve(route, reference).unwrap_or_else(|fault| {
                let reason = fault.reason;
                unresolved.push(fault);
                BackendTarget::Invalid { reason }
            })
        };
        let rules = match &route.rules {
            RouteRules::Requests(rules) => CompiledRules::Requests(
                rules
                    .iter()
                    .map(|rule| Arc::new(rule.resolve(&route.id, &mut resolve)))
                    .collect(),
            ),
            RouteRules::Streams(rules) => CompiledRules::Streams(
                rules
                    .iter()
                    .map(|rule| Arc::new(rule.resolve(&route.id, &mut resolve)))
                    .collect(),
            ),
        };
        Compiled { rules, unresolved }
    }

    fn resolve(
        &self,
        route: &RouteFacts,
        reference: &BackendRef,
    ) -> Result<BackendTarget, Unresolved> {
        let unresolved = |reason, message| Unresolved {
            field: reference.field.clone(),
            reason,
            message,
        };
        let (name, port) = match &reference.referent {
            Referent::Service { name, port } => (name, *port),
            Referent::Other(kind) => {
                let message = format!("{kind} is no backend of a mesh: a Service is");
                return Err(unresolved(InvalidBackend::InvalidKind, message));
            }
        };
        if !self.permits(route, name) {
            let message = format!(
                "no ReferenceGrant of {} permits Service {name}",
                name.namespace
            );
            return Err(unresolved(InvalidBackend::RefNotPermitted, message));
        }
        let Some(service) = self.snapshot.service(name) else {
            let message = format!("there is no Service {name}");
            return Err(unresolved(InvalidBackend::BackendNotFound, message));
        };
        if service.port(port).is_none() {
            let message = format!("Service {name} has no TCP port {port}");
            return Err(unresolved(InvalidBackend::BackendNotFound, message));
        }
        Ok(BackendTarget::Service {
            name: name.clone(),
            port,
        })
    }

    /// Whether a route may send to this Service: one of its own namespace, one for which there is
    /// a grant, or the very one that its clients asked for, if it concerns nobody else's.
    fn permits(&self, route: &RouteFacts, service: &ObjectName) -> bool {
        if service.namespace == route.id.name.namespace {
            return true;
        }
        let asked_for = route.is_consumer()
            && route
                .parents
                .iter()
                .any(|parent| parent.service == *service);
        asked_for
            || self
                .index
                .grants_of(&service.namespace)
                .filter_map(|name| self.facts.get(&key(Kind::ReferenceGrant, name))?.grant())
                .any(|grant| grant.permits(&route.id, service))
    }

    /// Puts together all routes of a Service.
    fn attach(&mut self, name: &ObjectName) -> Outcome {
        let now = self
            .snapshot
            .service(name)
            .map(|service| self.routes_of(service))
            .filter(|routes| !routes.is_empty());
        if self.snapshot.routes_of(name).map(|old| &**old) == now.as_ref() {
            return Outcome::Unchanged;
        }
        self.snapshot.set_routes(name, now.map(Arc::new));
        Outcome::Changed
    }

    fn routes_of(&self, service: &Service) -> ServiceRoutes {
        let mut places: BTreeMap<Place, Vec<(&RouteFacts, &Compiled)>> = BTreeMap::new();
        for id in self.index.routes_of(&service.name) {
            let (Some(route), Some(compiled)) = (self.route(id), self.routes.get(id)) else {
                continue;
            };
            let ports: BTreeSet<u16> = route
                .parents
                .iter()
                .filter(|parent| parent.service == service.name)
                .flat_map(|parent| ports(service, parent))
                .collect();
            for port in ports {
                let place = (consumer(id, &service.name), port);
                places.entry(place).or_default().push((route, compiled));
            }
        }
        let mut routes = ServiceRoutes::default();
        for ((namespace, port), candidates) in places {
            let ports: &mut PortRoutes = match namespace {
                Some(namespace) => routes.consumers.entry(namespace).or_default(),
                None => &mut routes.producer,
            };
            ports.extend(merge(candidates).map(|attached| (port, attached)));
        }
        routes
    }

    fn refresh_status(&mut self, id: &RouteId) -> Outcome {
        let now = self.status(id);
        let old = self.snapshot.route_status(id);
        if old.map(|old| &**old) == now.as_ref() {
            return Outcome::Unchanged;
        }
        self.snapshot.set_route_status(id, now.map(Arc::new));
        Outcome::Changed
    }

    fn status(&self, id: &RouteId) -> Option<RouteStatus> {
        let refused = self.refused.get(&ObjectKey::from(id));
        let rejection = refused.map(|refused| &refused.rejection);
        let Some(route) = self.route(id) else {
            let refused = refused?;
            let parents = refused.parents.iter().map(|parent| ParentStatus {
                service: parent.service.clone(),
                parent: parent.to_string().into(),
                controller: CONTROLLER,
                conditions: vec![not_accepted("UnsupportedValue", fault(&refused.rejection))],
            });
            return Some(RouteStatus {
                route: id.clone(),
                observed_generation: refused.generation,
                parents: parents.collect(),
                notes: Vec::new(),
            });
        };
        let compiled = self.routes.get(id)?;
        let parents = route.parents.iter().map(|parent| {
            let mut conditions = vec![self.accepted(id, parent), resolved(compiled)];
            conditions.extend(rejection.map(|rejection| Condition {
                kind: ConditionType::PartiallyInvalid,
                status: Truth::True,
                reason: "UnsupportedValue",
                message: format!("Fall Back to the former version: {}", fault(rejection)).into(),
            }));
            ParentStatus {
                service: parent.service.clone(),
                parent: parent.to_string().into(),
                controller: CONTROLLER,
                conditions,
            }
        });
        Some(RouteStatus {
            route: id.clone(),
            observed_generation: refused.map_or(route.generation, |refused| refused.generation),
            parents: parents.collect(),
            notes: route.notes.clone(),
        })
    }

    fn accepted(&self, id: &RouteId, parent: &ParentFacts) -> Condition {
        let name = &parent.service;
        let Some(service) = self.snapshot.service(name) else {
            return not_accepted("NoMatchingParent", format!("there is no Service {name}"));
        };
        if service.vips.is_empty() {
            let message = format!("Service {name} has no address of its own that could be matched");
            return not_accepted("UnsupportedValue", message);
        }
        let ports = ports(service, parent);
        if ports.is_empty() {
            let message = format!("Service {name} has no such TCP port");
            return not_accepted("NoMatchingParent", message);
        }
        let attached = self.snapshot.routes_of(name);
        let consumer = consumer(id, name);
        let winner = |port: &u16| -> Option<RouteKind> {
            let routes = attached?;
            let ports = match &consumer {
                Some(namespace) => routes.consumers.get(namespace)?,
                None => &routes.producer,
            };
            ports.get(port).map(Attached::kind)
        };
        let mut lost = Vec::new();
        for port in &ports {
            if let Some(kind) = winner(port).filter(|kind| *kind != id.kind) {
                lost.push(format!("port {port} has a {kind}"));
            }
        }
        if lost.len() == ports.len() {
            return not_accepted("Conflicted", lost.join(", "));
        }
        Condition {
            kind: ConditionType::Accepted,
            status: Truth::True,
            reason: "Accepted",
            message: if lost.is_empty() {
                "in force".into()
            } else {
                format!("in force, but {}", lost.join(", ")).into()
            },
        }
    }

    fn route(&self, id: &RouteId) -> Option<&RouteFacts> {
        self.facts.get(&ObjectKey::from(id))?.route()
    }
}

/// Ports of a Service that a route is attached to by this reference.
fn ports(service: &Service, parent: &ParentFacts) -> Vec<u16> {
    service
        .ports
        .iter()
        .filter(|port| parent.port.is_none_or(|wanted| wanted == port.port))
        .filter(|port| {
            parent
                .section
                .as_ref()
                .is_none_or(|wanted| *wanted == port.name)
        })
        .map(|port| port.port)
        .collect()
}

/// The namespace whose clients alone a route concerns, if it is not the Service's own.
fn consumer(id: &RouteId, service: &ObjectName) -> Option<Arc<str>> {
    let namespace = &id.name.namespace;
    (*namespace != service.namespace).then(|| namespace.clone())
}

/// All routes of the first kind that there is, the oldest first, then by name.
fn merge(mut candidates: Vec<(&RouteFacts, &Compiled)>) -> Option<Attached> {
    let kind = candidates.iter().map(|(route, _)| route.id.kind).min()?;
    candidates.retain(|(route, _)| route.id.kind == kind);
    candidates.sort_by_key(|(route, _)| {
        // One that has no age is younger than any.
        let age = (route.created.is_none(), route.created);
        (age, &route.id.name)
    });
    let mut requests = Vec::new();
    let mut streams = Vec::new();
    for (_, compiled) in candidates {
        match &compiled.rules {
            CompiledRules::Requests(rules) => requests.extend(rules.iter().cloned()),
            CompiledRules::Streams(rules) => streams.extend(rules.iter().cloned()),
        }
    }
    Some(match kind {
        RouteKind::Grpc | RouteKind::Http => {
            Attached::Requests(Arc::new(RouteTable::new(kind, requests)))
        }
        RouteKind::Tls | RouteKind::Tcp => {
            Attached::Streams(Arc::new(StreamRoutes::new(kind, streams)))
        }
    })
}

fn resolved(compiled: &Compiled) -> Condition {
    let Some(first) = compiled.unresolved.first() else {
        return Condition {
            kind: ConditionType::ResolvedRefs,
            status: Truth::True,
            reason: "ResolvedRefs",
            message: "all backends are there".into(),
        };
    };
    let each: Vec<String> = compiled
        .unresolved
        .iter()
        .map(|one| format!("{}: {}", one.field, one.message))
        .collect();
    Condition {
        kind: ConditionType::ResolvedRefs,
        status: Truth::False,
        reason: match first.reason {
            InvalidBackend::InvalidKind => "InvalidKind",
            InvalidBackend::BackendNotFound => "BackendNotFound",
            InvalidBackend::RefNotPermitted => "RefNotPermitted",
        },
        message: each.join("; ").into(),
    }
}

fn not_accepted(reason: &'static str, message: String) -> Condition {
    Condition {
        kind: ConditionType::Accepted,
        status: Truth::False,
        reason,
        message: message.into(),
    }
}

fn fault(rejection: &Rejection) -> String {
    format!("{}: {}", rejection.field, rejection.reason)
}

#[cfg(test)]
#[path = "route_tests.rs"]
mod tests;
