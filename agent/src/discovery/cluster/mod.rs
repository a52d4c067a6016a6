//! All objects that are in force, and the snapshot that they make.
//!
//! Changes come in batches. What a batch touches is worked out anew, nothing else: one change costs
//! one change. An object that is refused leaves its former state in force, if it had one.

mod claims;
mod dirty;
mod facts;
mod index;
mod policies;
mod refresh;
mod routes;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use self::claims::{Claim, Claims};
use self::dirty::Dirty;
use self::facts::Facts;
use self::index::Index;
use self::policies::Rings;
use self::routes::CompiledRoutes;
use super::object::{Kind, Object, ObjectKey, Rejection};
use super::translate::{ParentFacts, PodFacts, PodState, ServiceFacts, SliceFacts, route_parents};
use crate::mesh::{ObjectName, Snapshot, WorkloadUid};

/// A change of one object.
#[derive(Debug, Clone)]
pub enum Change {
    /// It is so from now on.
    Put(Object),
    /// It is no more.
    Delete(ObjectKey),
    /// There is a new version of it that cannot even be read: the former stays in force.
    Refuse(Rejection),
}

/// What a batch did to the snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing.
    Unchanged,
    /// There is a new one.
    Changed,
}

/// All objects that are in force, and the snapshot that they make.
#[derive(Debug)]
pub struct Cluster {
    node: Arc<str>,
    facts: HashMap<ObjectKey, Arc<Facts>>,
    claims: Claims,
    refused: BTreeMap<ObjectKey, Refused>,
    index: Index,
    /// Under which UID each pod is in the snapshot.
    uids: HashMap<ObjectName, WorkloadUid>,
    routes: CompiledRoutes,
    rings: Rings,
    snapshot: Snapshot,
}

/// An object, or a version of it, that is not in force.
#[derive(Debug)]
struct Refused {
    rejection: Rejection,
    /// It is taken when this claim becomes free.
    waits: Option<(Claim, Arc<Facts>)>,
    /// `metadata.generation` of that version.
    generation: Option<i64>,
    /// What a route would be attached to, for its status.
    parents: Vec<ParentFacts>,
}

type Step = (ObjectKey, Option<Arc<Facts>>);

impl Cluster {
    /// An empty one, as seen from this node.
    #[must_use]
    pub fn new(node: &str) -> Self {
        Self {
            node: node.into(),
            facts: HashMap::new(),
            claims: Claims::default(),
            refused: BTreeMap::new(),
            index: Index::default(),
            uids: HashMap::new(),
            routes: CompiledRoutes::new(),
            rings: Rings::new(),
            snapshot: Snapshot::default(),
        }
    }

    /// The snapshot that the objects in force make.
    #[must_use]
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Objects whose last version is not in force, and why.
    pub fn rejections(&self) -> impl Iterator<Item = &Rejection> {
        self.refused.values().map(|refused| &refused.rejection)
    }

    /// Why the last version of this object is not in force, if it is not.
    #[must_use]
    pub fn rejection(&self, key: &ObjectKey) -> Option<&Rejection> {
        self.refused.get(key).map(|refused| &refused.rejection)
    }

    /// How many objects of each kind are in force.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<Kind, usize> {
        let mut counts = BTreeMap::new();
        for key in self.facts.keys() {
            *counts.entry(key.kind).or_insert(0) += 1;
        }
        counts
    }

    /// How many pods are in this state.
    #[must_use]
    pub fn pods_in(&self, state: PodState) -> usize {
        self.facts
            .values()
            .filter(|facts| matches!(&***facts, Facts::Pod(pod) if pod.state == state))
            .count()
    }

    /// Takes a batch of changes. Within it objects may swap what only one can have (an address, a
    /// port of an address); of two that want it, the one in force, else the earlier one, has it.
    pub fn apply(&mut self, changes: impl IntoIterator<Item = Change>) -> Outcome {
        let mut steps: Vec<Step> = Vec::new();
        let mut places: HashMap<ObjectKey, usize> = HashMap::new();
        let mut dirty = Dirty::default();
        for change in changes {
            let (key, facts) = match change {
                Change::Put(object) => {
                    let key = object.key();
                    match Facts::of(&object) {
                        Ok(facts) => (key, Some(Arc::new(facts))),
                        Err(fault) => {
                            dirty.statuses.extend(key.route());
                            dirty.policies.extend(key.policy());
                            self.refuse(Refused {
                                rejection: fault.of(&key),
                                waits: None,
                                generation: object.metadata().generation,
                                parents: route_parents(&object),
                            });
                            continue;
                        }
                    }
                }
                Change::Delete(key) => (key, None),
                Change::Refuse(rejection) => {
                    dirty.statuses.extend(rejection.object.route());
                    self.refuse(Refused {
                        rejection,
                        waits: None,
                        generation: None,
                        parents: Vec::new(),
                    });
                    continue;
                }
            };
            dirty.statuses.extend(key.route());
            dirty.policies.extend(key.policy());
            self.forgive(&key);
            if let Some(&place) = places.get(&key) {
                steps[place].1 = facts;
                continue;
            }
            places.insert(key.clone(), steps.len());
            steps.push((key, facts));
        }
        while !steps.is_empty() {
            steps = self.settle(steps, &mut dirty);
        }
        self.refresh(dirty)
    }

    /// Puts facts in force, and gives back those that can be tried now.
    fn settle(&mut self, steps: Vec<Step>, dirty: &mut Dirty) -> Vec<Step> {
        let mut freed = BTreeSet::new();
        let mut former = Vec::with_capacity(steps.len());
        for (key, new) in &steps {
            let old = self.facts.get(key).cloned();
            if old.is_some() && old == *new {
                former.push(None);
                continue;
            }
            self.withdraw(key, new.as_deref(), &mut freed);
            former.push(old);
        }
        let mut to_restore = Vec::new();
        for ((key, new), old) in steps.into_iter().zip(former) {
            if self.facts.contains_key(&key) {
                continue; // The same as before.
            }
            let Some(new) = new else {
                if let Some(old) = old {
                    dirty.mark(&key, &old);
                }
                continue;
            };
            match self.admit(&key, new.clone()) {
                Ok(()) => {
                    dirty.mark(&key, &new);
                    if let Some(old) = old {
                        dirty.mark(&key, &old);
                    }
                }
                Err((rejection, claim)) => {
                    self.refuse(Refused {
                        rejection,
                        waits: Some((claim, new)),
                        generation: None,
                        parents: Vec::new(),
                    });
                    to_restore.extend(old.map(|old| (key, old)));
                }
            }
        }
        for (key, old) in to_restore {
            // What it gave up may have gone to another of the batch: then it is out.
            if self.admit(&key, old.clone()).is_err() {
                dirty.mark(&key, &old);
                self.release(&key, &old, &mut freed);
            }
        }
        self.waiting_for(&freed)
    }

    fn admit(&mut self, key: &ObjectKey, facts: Arc<Facts>) -> Result<(), (Rejection, Claim)> {
        let wanted = facts.claims();
        if let Some((claim, fault)) = self.claims.conflict(key, &wanted) {
            return Err((fault.of(key), claim));
        }
        self.claims.hold(key, wanted);
        self.index.add(key, &facts);
        self.facts.insert(key.clone(), facts);
        Ok(())
    }

    /// Takes an object out of force. What its new version wants too stays its own, so that no
    /// other of the batch can take it.
    fn withdraw(&mut self, key: &ObjectKey, new: Option<&Facts>, freed: &mut BTreeSet<Claim>) {
        let Some(old) = self.facts.remove(key) else {
            return;
        };
        self.index.remove(key, &old);
        let kept: BTreeSet<Claim> = new
            .into_iter()
            .flat_map(Facts::claims)
            .map(|(claim, _)| claim)
            .collect();
        for (claim, _) in old.claims() {
            if !kept.contains(&claim) {
                self.claims.release(key, &claim);
                freed.insert(claim);
            }
        }
    }

    fn release(&mut self, key: &ObjectKey, facts: &Facts, freed: &mut BTreeSet<Claim>) {
        for (claim, _) in facts.claims() {
            self.claims.release(key, &claim);
            freed.insert(claim);
        }
    }

    fn refuse(&mut self, refused: Refused) {
        let key = refused.rejection.object.clone();
        self.forgive(&key);
        if let Some((claim, _)) = &refused.waits {
            self.claims.wait(claim.clone(), key.clone());
        }
        self.refused.insert(key, refused);
    }

    fn forgive(&mut self, key: &ObjectKey) {
        let refused = self.refused.remove(key);
        if let Some((claim, _)) = refused.and_then(|refused| refused.waits) {
            self.claims.stop_waiting(&claim, key);
        }
    }

    fn waiting_for(&mut self, freed: &BTreeSet<Claim>) -> Vec<Step> {
        let waiting: Vec<ObjectKey> = freed
            .iter()
            .flat_map(|claim| self.claims.next_for(claim))
            .collect();
        let mut steps = Vec::with_capacity(waiting.len());
        for key in waiting {
            let waits = self.refused.get(&key).and_then(|one| one.waits.clone());
            self.forgive(&key);
            steps.extend(waits.map(|(_, facts)| (key, Some(facts))));
        }
        steps
    }

    /// Works out anew what is dirty.
    fn refresh(&mut self, mut dirty: Dirty) -> Outcome {
        let mut outcome = Outcome::Unchanged;
        if dirty.config {
            let config = self.config();
            if config != **self.snapshot.config() {
                self.snapshot.set_config(config);
                outcome = Outcome::Changed;
                dirty.pods.extend(self.index.pods());
            }
        }
        for namespace in &dirty.namespaces {
            dirty.pods.extend(self.index.pods_of_namespace(namespace));
        }
        for name in &dirty.nodes {
            self.refresh_node(name);
            outcome = Outcome::Changed;
        }
        if self.refresh_pods(&dirty.pods, &mut dirty.services) == Outcome::Changed {
            outcome = Outcome::Changed;
        }
        for name in std::mem::take(&mut dirty.services) {
            if self.refresh_service(&name, &mut dirty) == Outcome::Changed {
                outcome = Outcome::Changed;
            }
        }
        let policies = std::mem::take(&mut dirty.policies);
        let attachments = std::mem::take(&mut dirty.attachments);
        if self.refresh_routes(dirty) == Outcome::Changed {
            outcome = Outcome::Changed;
        }
        if self.refresh_policies(policies, attachments) == Outcome::Changed {
            outcome = Outcome::Changed;
        }
        outcome
    }

    fn pod(&self, name: &ObjectName) -> Option<&PodFacts> {
        self.facts.get(&key(Kind::Pod, name))?.pod()
    }

    fn service(&self, name: &ObjectName) -> Option<&ServiceFacts> {
        self.facts.get(&key(Kind::Service, name))?.service()
    }

    fn slice(&self, name: &ObjectName) -> Option<&SliceFacts> {
        self.facts.get(&key(Kind::EndpointSlice, name))?.slice()
    }
}

fn key(kind: Kind, name: &ObjectName) -> ObjectKey {
    ObjectKey {
        kind,
        name: name.clone(),
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
