//! The endpoints of a destination as one immutable value.

use std::sync::Arc;
use std::time::Duration;

use imbl::{HashMap, Vector};

use super::super::endpoint::{Endpoint, Member, TIERS, Target};
use super::super::time::Timestamp;
use super::maglev::Maglev;
use super::ring::Ring;
use super::weights::{Slot, Weights};
use super::{Algorithm, BalanceSettings};

/// A version of the endpoints. Cloning shares all of it.
#[derive(Debug)]
pub struct Set<T> {
    pub(super) tiers: [Tier<T>; TIERS],
    index: HashMap<T, Place>,
    pub(super) ring: Option<Ring<T>>,
    pub(super) maglev: Option<Arc<Maglev<T>>>,
}

/// The endpoints of one locality.
#[derive(Debug)]
pub(super) struct Tier<T> {
    pub(super) endpoints: Vector<Arc<Endpoint<T>>>,
    pub(super) weights: Option<Weights<T>>,
}

#[derive(Clone, Debug)]
struct Place {
    tier: usize,
    at: usize,
    weight: u32,
    slot: Option<Slot>,
}

impl<T> Clone for Tier<T> {
    fn clone(&self) -> Self {
        Self {
            endpoints: self.endpoints.clone(),
            weights: self.weights.clone(),
        }
    }
}

impl<T: Target> Clone for Set<T> {
    fn clone(&self) -> Self {
        Self {
            tiers: self.tiers.clone(),
            index: self.index.clone(),
            ring: self.ring.clone(),
            maglev: self.maglev.clone(),
        }
    }
}

impl<T: Target> Set<T> {
    pub(in super::super) fn new(settings: &BalanceSettings) -> Self {
        let weighted = settings.algorithm == Algorithm::Weighted;
        Self {
            tiers: std::array::from_fn(|_| Tier {
                endpoints: Vector::new(),
                weights: weighted.then(Weights::default),
            }),
            index: HashMap::new(),
            ring: (settings.algorithm == Algorithm::RingHash)
                .then(|| Ring::new(settings.ring_points)),
            maglev: None,
        }
    }

    pub(in super::super) fn len(&self) -> usize {
        self.index.len()
    }

    pub(in super::super) fn endpoints(&self) -> impl Iterator<Item = &Arc<Endpoint<T>>> {
        self.tiers.iter().flat_map(|tier| &tier.endpoints)
    }

    pub(in super::super) fn get(&self, target: &T) -> Option<&Arc<Endpoint<T>>> {
        let place = self.index.get(target)?;
        self.tiers[place.tier].endpoints.get(place.at)
    }

    /// Whether an endpoint is there just as described.
    pub(in super::super) fn has(&self, member: &Member<T>) -> bool {
        let as_described =
            |place: &Place| place.tier == member.tier_index() && place.weight == member.weight;
        self.index.get(&member.target).is_some_and(as_described)
    }

    /// Adds an endpoint, or moves it to what the member says; what is known of it stays. `former`
    /// is an endpoint that was removed lately and comes back.
    pub(in super::super) fn put(
        &mut self,
        member: &Member<T>,
        former: Option<Arc<Endpoint<T>>>,
        window: Duration,
        now: Timestamp,
    ) {
        let known = self.remove(&member.target).or(former);
        let endpoint = known.unwrap_or_else(|| Arc::new(Endpoint::new(member, window, now)));
        endpoint.set_weight(member.weight);
        let index = member.tier_index();
        let tier = &mut self.tiers[index];
        tier.endpoints.push_back(Arc::clone(&endpoint));
        let place = Place {
            tier: index,
            at: tier.endpoints.len() - 1,
            weight: member.weight,
            slot: tier
                .weights
                .as_mut()
                .map(|weights| weights.add(Arc::clone(&endpoint), endpoint.weight())),
        };
        if let Some(ring) = &mut self.ring {
            ring.add(&endpoint, endpoint.weight());
        }
        self.index.insert(member.target.clone(), place);
    }

    /// Takes an endpoint out; the last of its tier moves into its place.
    pub(in super::super) fn remove(&mut self, target: &T) -> Option<Arc<Endpoint<T>>> {
        let place = self.index.remove(target)?;
        let tier = &mut self.tiers[place.tier];
        if let (Some(weights), Some(slot)) = (&mut tier.weights, place.slot)
            && let Some(moved) = weights.remove(slot)
            && let Some(its) = self.index.get_mut(moved.target())
        {
            its.slot = Some(slot);
        }
        let last = tier.endpoints.pop_back()?;
        let out = if place.at == tier.endpoints.len() {
            last
        } else {
            if let Some(its) = self.index.get_mut(last.target()) {
                its.at = place.at;
            }
            tier.endpoints.set(place.at, last)
        };
        if let Some(ring) = &mut self.ring {
            ring.remove(target, out.weight());
        }
        Some(out)
    }

    /// Maglev's table cannot be changed, only built anew; the others are done already.
    pub(in super::super) fn finish(&mut self, settings: &BalanceSettings) {
        if settings.algorithm == Algorithm::Maglev {
            let endpoints = self.endpoints().cloned().collect();
            self.maglev = Some(Arc::new(Maglev::build(endpoints, settings.maglev_table)));
        }
    }
}
