//! A random choice in proportion to weight, in O(1), that a change costs O(log n).
//!
//! Endpoints are kept in classes by the power of two of their weight. A class is drawn by its total,
//! then a member of it by rejection: none weighs less than half of the class's most, so two draws
//! are expected (Matias, Vitter, Ni 2003, without their recursion: sixteen classes are few).

use std::sync::Arc;

use imbl::Vector;
use rand::Rng;

use super::super::endpoint::{Endpoint, Target};

/// Weights are below 2¹⁶.
const CLASSES: usize = 16;

/// Endpoints by weight.
#[derive(Debug)]
pub(super) struct Weights<T> {
    classes: [Class<T>; CLASSES],
}

#[derive(Debug)]
struct Class<T> {
    total: u64,
    /// The weight is kept beside the endpoint: a total must match what was added to it.
    members: Vector<(u32, Arc<Endpoint<T>>)>,
}

impl<T> Clone for Weights<T> {
    fn clone(&self) -> Self {
        Self {
            classes: std::array::from_fn(|class| self.classes[class].clone()),
        }
    }
}

impl<T> Clone for Class<T> {
    fn clone(&self) -> Self {
        Self {
            total: self.total,
            members: self.members.clone(),
        }
    }
}

impl<T> Default for Weights<T> {
    fn default() -> Self {
        Self {
            classes: std::array::from_fn(|_| Class {
                total: 0,
                members: Vector::new(),
            }),
        }
    }
}

/// Where an endpoint is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    class: usize,
    at: usize,
}

impl<T: Target> Weights<T> {
    pub(super) fn add(&mut self, endpoint: Arc<Endpoint<T>>, weight: u32) -> Slot {
        let class = weight.max(1).ilog2() as usize % CLASSES;
        let home = &mut self.classes[class];
        home.total += u64::from(weight);
        home.members.push_back((weight, endpoint));
        let at = home.members.len() - 1;
        Slot { class, at }
    }

    /// Takes one out; the last of its class moves into its place and is returned.
    pub(super) fn remove(&mut self, slot: Slot) -> Option<Arc<Endpoint<T>>> {
        let home = &mut self.classes[slot.class];
        let last = home.members.pop_back()?;
        if slot.at == home.members.len() {
            home.total -= u64::from(last.0);
            return None;
        }
        let moved = Arc::clone(&last.1);
        let out = home.members.set(slot.at, last);
        home.total -= u64::from(out.0);
        Some(moved)
    }

    pub(super) fn draw(&self, rng: &mut (impl Rng + ?Sized)) -> Option<&Arc<Endpoint<T>>> {
        let total: u64 = self.classes.iter().map(|class| class.total).sum();
        if total == 0 {
            return None;
        }
        let mut rest = rng.random_range(0..total);
        let (power, class) = self.classes.iter().enumerate().find(|(_, class)| {
            let here = rest < class.total;
            if !here {
                rest -= class.total;
            }
            here
        })?;
        let most = 2u32 << power;
        loop {
            let (weight, endpoint) = class
                .members
                .get(rng.random_range(0..class.members.len()))?;
            if rng.random_range(0..most) < *weight {
                return Some(endpoint);
            }
        }
    }
}
