//! Policies: which one is in force for what, and what is said of them.
//!
//! Which of several policies with one target is in force follows from the objects alone, not from
//! the order of their coming, so that all nodes decide alike.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::Value;

use super::super::object::ObjectKey;
use super::super::translate::{PolicyFacts, PolicyTarget};
use super::{Cluster, Outcome};
use crate::mesh::policy::{
    AncestorStatus, Layer, PolicyId, PolicyKind, PolicyStatus, ServiceLayers,
};
use crate::mesh::route::{CONTROLLER, Condition, ConditionType, RouteId, Truth};
use crate::mesh::{ObjectName, Service};

/// What policies are attached to, whole: a Service with all of its ports, or a route.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Attachment {
    Service(ObjectName),
    Route(RouteId),
}

impl From<&PolicyTarget> for Attachment {
    fn from(target: &PolicyTarget) -> Self {
        match target {
            PolicyTarget::Service { name, .. } => Self::Service(name.clone()),
            PolicyTarget::Route(route) => Self::Route(route.clone()),
        }
    }
}

/// Policies that would close a ring of fallbacks, each with the Service that it would close it for.
pub(super) type Rings = BTreeSet<(PolicyId, ObjectName)>;

/// Why a policy is not in force for a target.
enum Out {
    NotFound(String),
    Conflicted(PolicyId),
    Ring(ObjectName),
}

impl Cluster {
    /// Works out anew what is dirty of policies, once Services and routes are as they are to be.
    pub(super) fn refresh_policies(
        &mut self,
        mut policies: BTreeSet<PolicyId>,
        mut attachments: BTreeSet<Attachment>,
    ) -> Outcome {
        if policies.is_empty() && attachments.is_empty() {
            return Outcome::Unchanged;
        }
        let rings = self.find_rings();
        for (_, service) in rings.symmetric_difference(&self.rings) {
            attachments.insert(Attachment::Service(service.clone()));
        }
        self.rings = rings;
        let mut outcome = Outcome::Unchanged;
        for attachment in attachments {
            let changed = match &attachment {
                Attachment::Service(name) => self.attach_to_service(name),
                Attachment::Route(route) => self.attach_to_route(route),
            };
            if changed == Outcome::Changed {
                outcome = Outcome::Changed;
            }
            policies.extend(self.index.policies_on(&attachment).cloned());
        }
        for id in &policies {
            if self.refresh_policy_status(id) == Outcome::Changed {
                outcome = Outcome::Changed;
            }
        }
        outcome
    }

    fn attach_to_service(&mut self, name: &ObjectName) -> Outcome {
        let mut layers = ServiceLayers::default();
        for (target, facts) in self.in_force(&Attachment::Service(name.clone())) {
            let PolicyTarget::Service { section, .. } = target else {
                continue;
            };
            let layer = Layer {
                name: facts.id.name.clone(),
                spec: facts.spec.clone(),
            };
            match section {
                // The weaker kind comes first.
                None if facts.id.kind == PolicyKind::XBackendTrafficPolicy => {
                    layers.whole.insert(0, layer);
                }
                None => layers.whole.push(layer),
                Some(port) => layers.ports.entry(port.clone()).or_default().push(layer),
            }
        }
        let layers = (!layers.is_empty()).then_some(layers);
        if self.snapshot.service_policies(name) == layers.as_ref() {
            return Outcome::Unchanged;
        }
        self.snapshot.set_service_policies(name, layers);
        Outcome::Changed
    }

    fn attach_to_route(&mut self, route: &RouteId) -> Outcome {
        let attachment = Attachment::Route(route.clone());
        let layer = self.in_force(&attachment).first().map(|(_, facts)| Layer {
            name: facts.id.name.clone(),
            spec: facts.spec.clone(),
        });
        if self.snapshot.route_policy(route) == layer.as_ref() {
            return Outcome::Unchanged;
        }
        self.snapshot.set_route_policy(route, layer);
        Outcome::Changed
    }

    /// The policies in force for a Service and its ports, or for a route.
    fn in_force(&self, attachment: &Attachment) -> Vec<(&PolicyTarget, &PolicyFacts)> {
        self.index
            .policies_on(attachment)
            .filter_map(|id| self.policy(id))
            .flat_map(|facts| facts.targets.iter().map(move |target| (target, facts)))
            .filter(|(target, _)| Attachment::from(*target) == *attachment)
            .filter(|(target, facts)| self.out(facts, target).is_none())
            .collect()
    }

    /// Why this policy is not in force for one of its targets, if it is not.
    fn out(&self, facts: &PolicyFacts, target: &PolicyTarget) -> Option<Out> {
        if let Some(missing) = self.missing(target) {
            return Some(Out::NotFound(missing));
        }
        if let Some(senior) = self.senior(facts, target) {
            return Some(Out::Conflicted(senior.id.clone()));
        }
        match target {
            PolicyTarget::Service { name, .. } => {
                let ring = (facts.id.clone(), name.clone());
                self.rings.contains(&ring).then(|| Out::Ring(name.clone()))
            }
            PolicyTarget::Route(_) => None,
        }
    }

    fn missing(&self, target: &PolicyTarget) -> Option<String> {
        match target {
            PolicyTarget::Service { name, section } => {
                let Some(service) = self.snapshot.service(name) else {
                    return Some(format!("there is no Service {name}"));
                };
                let section = section.as_ref()?;
                (!has_section(service, section))
                    .then(|| format!("Service {name} has no TCP port {section:?}"))
            }
            PolicyTarget::Route(route) => (!self.facts.contains_key(&ObjectKey::from(route)))
                .then(|| format!("there is no {} {}", route.kind, route.name)),
        }
    }

    /// The policy of the same kind that has this very target before this one.
    fn senior(&self, facts: &PolicyFacts, target: &PolicyTarget) -> Option<&PolicyFacts> {
        self.index
            .policies_on(&target.into())
            .filter_map(|id| self.policy(id))
            .filter(|other| other.id.kind == facts.id.kind && other.targets.contains(target))
            .filter(|other| other.seniority() < facts.seniority())
            .min_by(|one, other| one.seniority().cmp(&other.seniority()))
    }

    /// Follows the fallbacks from Service to Service, the oldest policies first: who would close a
    /// ring is out.
    fn find_rings(&self) -> Rings {
        let mut falls: Vec<(&PolicyFacts, &ObjectName, ObjectName)> = Vec::new();
        for facts in self.index.falling_back().filter_map(|id| self.policy(id)) {
            let Some(to) = facts.fallback() else { continue };
            for target in &facts.targets {
                if let PolicyTarget::Service { name, .. } = target
                    && self.senior(facts, target).is_none()
                {
                    falls.push((facts, name, to.clone()));
                }
            }
        }
        falls.sort_by(|one, other| one.0.seniority().cmp(&other.0.seniority()));
        let mut steps: BTreeMap<ObjectName, BTreeSet<ObjectName>> = BTreeMap::new();
        let mut rings = Rings::new();
        for (facts, from, to) in falls {
            if reaches(&steps, &to, from) {
                rings.insert((facts.id.clone(), from.clone()));
            } else {
                steps.entry(from.clone()).or_default().insert(to);
            }
        }
        rings
    }

    fn refresh_policy_status(&mut self, id: &PolicyId) -> Outcome {
        let now = self.policy_status(id);
        let old = self.snapshot.policy_status(id);
        if old.map(|old| &**old) == now.as_ref() {
            return Outcome::Unchanged;
        }
        self.snapshot.set_policy_status(id, now.map(Arc::new));
        Outcome::Changed
    }

    fn policy_status(&self, id: &PolicyId) -> Option<PolicyStatus> {
        let rejection = self
            .rejection(&id.into())
            .map(|rejection| format!("{}: {}", rejection.field, rejection.reason).into());
        let Some(facts) = self.policy(id) else {
            return rejection.map(|rejection| PolicyStatus {
                policy: id.clone(),
                observed_generation: None,
                ancestors: Vec::new(),
                rejection: Some(rejection),
                spec: Value::Null,
            });
        };
        let ancestors = facts.targets.iter().enumerate().map(|(index, target)| {
            let accepted = self.policy_accepted(facts, index, target);
            AncestorStatus {
                ancestor: target.to_string().into(),
                controller: CONTROLLER,
                conditions: [accepted]
                    .into_iter()
                    .chain(self.fallback_resolved(facts))
                    .collect(),
            }
        });
        Some(PolicyStatus {
            policy: id.clone(),
            observed_generation: facts.generation,
            ancestors: ancestors.collect(),
            rejection,
            spec: serde_json::to_value(&*facts.spec).unwrap_or_default(),
        })
    }

    fn policy_accepted(
        &self,
        facts: &PolicyFacts,
        index: usize,
        target: &PolicyTarget,
    ) -> Condition {
        let place = format!("spec.targetRefs[{index}]");
        let (status, reason, message) = match self.out(facts, target) {
            None => (Truth::True, "Accepted", "is in force".to_owned()),
            Some(Out::NotFound(missing)) => (
                Truth::False,
                "TargetNotFound",
                format!("{place}: {missing}"),
            ),
            Some(Out::Conflicted(senior)) => (
                Truth::False,
                "Conflicted",
                format!("{place}: {senior} has this target, and comes first"),
            ),
            Some(Out::Ring(service)) => (
                Truth::False,
                "Invalid",
                format!("spec.fallback.backend: would lead back to Service {service}, in a ring"),
            ),
        };
        Condition {
            kind: ConditionType::Accepted,
            status,
            reason,
            message: message.into(),
        }
    }

    /// Whether the Service that it falls back to is there, if it names one.
    fn fallback_resolved(&self, facts: &PolicyFacts) -> Option<Condition> {
        let backend = facts.spec.fallback.as_ref()?.backend.as_ref()?;
        let name = facts.fallback()?;
        let service = self.snapshot.service(&name);
        let there = service.is_some_and(|service| service.port(backend.port).is_some());
        let (status, reason, message) = if there {
            (Truth::True, "ResolvedRefs", "all is there".to_owned())
        } else {
            let missing = format!(
                "there is no Service {name} with a TCP port {}",
                backend.port
            );
            let message = format!("spec.fallback.backend: {missing}");
            (Truth::False, "BackendNotFound", message)
        };
        Some(Condition {
            kind: ConditionType::ResolvedRefs,
            status,
            reason,
            message: message.into(),
        })
    }

    fn policy(&self, id: &PolicyId) -> Option<&PolicyFacts> {
        self.facts.get(&id.into())?.policy()
    }
}

/// Whether a Service has this port: by name, or by number where it has no name.
fn has_section(service: &Service, section: &str) -> bool {
    service.ports.iter().any(|port| {
        *port.name == *section || (port.name.is_empty() && port.port.to_string() == section)
    })
}

fn reaches(
    steps: &BTreeMap<ObjectName, BTreeSet<ObjectName>>,
    from: &ObjectName,
    to: &ObjectName,
) -> bool {
    let mut seen = BTreeSet::new();
    let mut next = vec![from];
    while let Some(name) = next.pop() {
        if name == to {
            return true;
        }
        if seen.insert(name) {
            next.extend(steps.get(name).into_iter().flatten());
        }
    }
    false
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
