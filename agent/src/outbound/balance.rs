//! Which endpoint gets a new connection: power of two choices over live connections.
//!
//! Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing" (2001): of two random
//! endpoints the one with fewer connections. A full scan for the minimum would send every node's
//! next connection to the same endpoint.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use rand::Rng;

use crate::mesh::Endpoint;

/// Locks are held for one map operation at the start and the end of a connection.
const SHARDS: usize = 16;

/// Random draws before a full scan looks for endpoints that may be used.
const DRAWS: usize = 8;

/// Live connections of this node by endpoint. An entry lives as long as a connection to it, so
/// the maps are bounded by the connections.
#[derive(Debug)]
pub struct Loads {
    shards: [Mutex<HashMap<SocketAddr, usize>>; SHARDS],
    hasher: RandomState,
}

impl Default for Loads {
    fn default() -> Self {
        Self {
            shards: std::array::from_fn(|_| Mutex::default()),
            hasher: RandomState::new(),
        }
    }
}

impl Loads {
    /// The endpoint for the next connection, among those that are `usable`.
    pub fn pick<'a>(
        &self,
        endpoints: &'a [Endpoint],
        usable: impl Fn(&Endpoint) -> bool,
        random: &mut impl Rng,
    ) -> Option<&'a Endpoint> {
        if endpoints.is_empty() {
            return None;
        }
        let mut first: Option<&Endpoint> = None;
        for _ in 0..DRAWS {
            let drawn = &endpoints[random.random_range(0..endpoints.len())];
            if !usable(drawn) {
                continue;
            }
            match first {
                Some(other) if other.address != drawn.address => {
                    return Some(self.lighter(other, drawn));
                }
                _ => first = Some(drawn),
            }
        }
        // One endpoint only, or few usable ones among many.
        let usable: Vec<&Endpoint> = endpoints.iter().filter(|it| usable(it)).collect();
        match usable[..] {
            [] => None,
            [only] => Some(only),
            _ => {
                let at = random.random_range(0..usable.len());
                let skip = random.random_range(1..usable.len());
                Some(self.lighter(usable[at], usable[(at + skip) % usable.len()]))
            }
        }
    }

    /// Counts a connection to the endpoint until the guard is dropped.
    pub fn begin(self: &Arc<Self>, endpoint: SocketAddr) -> Load {
        *self.shard(endpoint).lock().entry(endpoint).or_default() += 1;
        Load {
            loads: self.clone(),
            endpoint,
        }
    }

    /// Live connections to the endpoint.
    #[must_use]
    pub fn of(&self, endpoint: SocketAddr) -> usize {
        self.shard(endpoint)
            .lock()
            .get(&endpoint)
            .copied()
            .unwrap_or_default()
    }

    fn lighter<'a>(&self, one: &'a Endpoint, other: &'a Endpoint) -> &'a Endpoint {
        if self.of(other.address) < self.of(one.address) {
            other
        } else {
            one
        }
    }

    fn shard(&self, endpoint: SocketAddr) -> &Mutex<HashMap<SocketAddr, usize>> {
        &self.shards[self.hasher.hash_one(endpoint) as usize % SHARDS]
    }
}

/// One live connection to an endpoint.
#[derive(Debug)]
pub struct Load {
    loads: Arc<Loads>,
    endpoint: SocketAddr,
}

impl Drop for Load {
    fn drop(&mut self) {
        let mut shard = self.loads.shard(self.endpoint).lock();
        if let Some(count) = shard.get_mut(&self.endpoint) {
            *count -= 1;
            if *count == 0 {
                shard.remove(&self.endpoint);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    fn endpoints(count: u8, ready: impl Fn(u8) -> bool) -> Vec<Endpoint> {
        let endpoint = |n| Endpoint {
            address: SocketAddr::from(([10, 0, 0, n], 80)),
            ready: ready(n),
            workload: None,
        };
        (0..count).map(endpoint).collect()
    }

    #[test]
    fn connections_spread_evenly() {
        let loads = Arc::new(Loads::default());
        let endpoints = endpoints(10, |_| true);
        let mut random = StdRng::seed_from_u64(1);
        let held: Vec<Load> = (0..1000)
            .map(|_| {
                loads.begin(
                    loads
                        .pick(&endpoints, |_| true, &mut random)
                        .unwrap()
                        .address,
                )
            })
            .collect();
        for endpoint in &endpoints {
            let load = loads.of(endpoint.address);
            assert!(
                (95..=105).contains(&load),
                "{} has {load} of 1000",
                endpoint.address
            );
        }
        drop(held);
        assert!(loads.shards.iter().all(|shard| shard.lock().is_empty()));
    }

    #[test]
    fn an_endpoint_that_is_not_usable_is_never_picked() {
        let loads = Arc::new(Loads::default());
        let endpoints = endpoints(100, |n| n == 42);
        let mut random = StdRng::seed_from_u64(2);
        for _ in 0..100 {
            let picked = loads.pick(&endpoints, |it| it.ready, &mut random).unwrap();
            assert_eq!(picked.address, SocketAddr::from(([10, 0, 0, 42], 80)));
        }
        assert!(loads.pick(&endpoints, |_| false, &mut random).is_none());
        assert!(loads.pick(&[], |_| true, &mut random).is_none());
    }
}
