//! Maglev hashing (Eisenbud et al., NSDI 2016, §3.4): a table in which every endpoint has its share
//! and keeps most of it when others come and go.

use std::sync::Arc;

use super::super::endpoint::{Endpoint, Target};
use super::hash::hash;

#[derive(Debug)]
pub(super) struct Maglev<T> {
    endpoints: Vec<Arc<Endpoint<T>>>,
    table: Vec<u32>,
}

impl<T: Target> Maglev<T> {
    /// Fills a table of at least `size` entries; the size is made a prime, as the permutations need.
    pub(super) fn build(mut endpoints: Vec<Arc<Endpoint<T>>>, size: u32) -> Self {
        // The order of discovery must not matter: two agents must agree.
        endpoints.sort_by_cached_key(|endpoint| hash(endpoint.target(), 0));
        let size = prime_from(size.max(13));
        let mut table = vec![u32::MAX; size as usize];
        let heaviest = endpoints
            .iter()
            .map(|endpoint| endpoint.weight())
            .max()
            .unwrap_or(1);
        let mut seats: Vec<Seat> = endpoints
            .iter()
            .map(|endpoint| Seat::new(endpoint, size))
            .collect();
        let mut left = if endpoints.is_empty() { 0 } else { size };
        let mut round = 0u64;
        while left > 0 {
            round += 1;
            for (index, seat) in seats.iter_mut().enumerate() {
                // A lighter endpoint takes its turn in proportion to its weight.
                let due = round * u64::from(endpoints[index].weight()) / u64::from(heaviest);
                if left == 0 || seat.taken >= due {
                    continue;
                }
                while table[seat.at as usize] != u32::MAX {
                    seat.advance(size);
                }
                table[seat.at as usize] = index as u32;
                seat.taken += 1;
                left -= 1;
            }
        }
        Self { endpoints, table }
    }

    /// Endpoints from a hash on; one endpoint may come up several times.
    pub(super) fn from(&self, hash: u64) -> impl Iterator<Item = &Arc<Endpoint<T>>> {
        let start = (hash % self.table.len().max(1) as u64) as usize;
        let around = self.table[start..].iter().chain(&self.table[..start]);
        around.filter_map(|index| self.endpoints.get(*index as usize))
    }
}

/// An endpoint's walk through its permutation of the table.
struct Seat {
    at: u32,
    skip: u32,
    taken: u64,
}

impl Seat {
    fn new<T: Target>(endpoint: &Endpoint<T>, size: u32) -> Self {
        Self {
            at: (hash(endpoint.target(), 1) % u64::from(size)) as u32,
            skip: (hash(endpoint.target(), 2) % u64::from(size - 1)) as u32 + 1,
            taken: 0,
        }
    }

    const fn advance(&mut self, size: u32) {
        self.at = ((self.at as u64 + self.skip as u64) % size as u64) as u32;
    }
}

fn prime_from(start: u32) -> u32 {
    let is_prime = |candidate: u32| {
        (2..)
            .take_while(|divisor| divisor * divisor <= candidate)
            .all(|divisor| !candidate.is_multiple_of(divisor))
    };
    (start..)
        .find(|candidate| is_prime(*candidate))
        .unwrap_or(start)
}
