//! Consistent hashing on a ring (Karger et al. 1997), as a persistent ordered map: adding or
//! removing an endpoint costs its own points only.

use std::sync::Arc;

use imbl::OrdMap;

use super::super::endpoint::{Endpoint, Target};
use super::hash::hash;

/// The most points one endpoint has, whatever its weight.
const POINTS_MAX: u32 = 4096;

#[derive(Debug)]
pub(super) struct Ring<T> {
    points: OrdMap<(u64, u32), Arc<Endpoint<T>>>,
    per_weight: u32,
}

impl<T> Clone for Ring<T> {
    fn clone(&self) -> Self {
        Self {
            points: self.points.clone(),
            per_weight: self.per_weight,
        }
    }
}

impl<T: Target> Ring<T> {
    pub(super) fn new(per_weight: u32) -> Self {
        Self {
            points: OrdMap::new(),
            per_weight,
        }
    }

    pub(super) fn add(&mut self, endpoint: &Arc<Endpoint<T>>, weight: u32) {
        for key in self.keys(endpoint.target(), weight) {
            self.points.insert(key, Arc::clone(endpoint));
        }
    }

    pub(super) fn remove(&mut self, target: &T, weight: u32) {
        for key in self.keys(target, weight) {
            if self
                .points
                .get(&key)
                .is_some_and(|there| there.target() == target)
            {
                self.points.remove(&key);
            }
        }
    }

    /// Endpoints from a hash on, around the ring; one endpoint may come up several times.
    pub(super) fn from(&self, hash: u64) -> impl Iterator<Item = &Arc<Endpoint<T>>> {
        let behind = self.points.range((hash, 0)..);
        let before = self.points.range(..(hash, 0));
        behind.chain(before).map(|(_, endpoint)| endpoint)
    }

    fn keys(&self, target: &T, weight: u32) -> impl Iterator<Item = (u64, u32)> + use<T> {
        let points = self.per_weight.saturating_mul(weight).min(POINTS_MAX);
        let own = hash(target, 0);
        // The second half of the key keeps two endpoints apart whose points collide.
        (0..points).map(move |point| {
            (
                super::super::backoff::mix(
                    own ^ u64::from(point).wrapping_mul(0x9e37_79b9_7f4a_7c15),
                ),
                own as u32,
            )
        })
    }
}
