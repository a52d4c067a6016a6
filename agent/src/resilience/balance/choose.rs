//! The choice of one endpoint out of a set.

use std::sync::Arc;

use rand::Rng;

use super::super::ejection::SourceState;
use super::super::endpoint::{Endpoint, TIERS, Target};
use super::super::sync::{AtomicU32, Ordering};
use super::super::time::{Timestamp, nanos};
use super::set::{Set, Tier};
use super::{Algorithm, BalanceSettings};

/// Random draws before a tier is searched one by one. At most half of the endpoints are ejected by
/// default, so eight draws fail once in 256 picks, and the search then ends after two steps.
const DRAWS: usize = 8;
/// Steps on ring or table before a bounded load gives way to the nearest that stands.
const STEPS: usize = 256;

/// What one pick wants.
pub(in super::super) struct Wish<'a, T> {
    pub(in super::super) source: &'a SourceState<T>,
    /// Endpoints that earlier attempts of this request went to.
    pub(in super::super) tried: &'a [T],
    /// What consistent hashing hashes.
    pub(in super::super) hash: Option<u64>,
    /// How many endpoints stand at most, counted in advance: those ejected for all.
    pub(in super::super) ejected: usize,
    /// Too few stand: ejection is ignored.
    pub(in super::super) panic: bool,
    pub(in super::super) now: Timestamp,
}

/// How picky a pass over the endpoints is; each pass gives up one wish.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    /// Stands, and this request has not tried it.
    Fresh,
    /// Stands.
    Standing,
    /// Ejected, but not tried.
    Untried,
    /// Whatever there is.
    Any,
}

/// One way of choosing, with what it remembers.
#[derive(Debug)]
pub(in super::super) struct Chooser {
    settings: BalanceSettings,
    slow_start_nanos: u64,
    turn: AtomicU32,
    /// Attempts under way to all endpoints; kept only for bounded loads, as all workers write it.
    in_flight: AtomicU32,
}

impl Chooser {
    pub(in super::super) fn new(settings: BalanceSettings) -> Self {
        Self {
            slow_start_nanos: nanos(settings.slow_start),
            settings,
            turn: AtomicU32::new(0),
            in_flight: AtomicU32::new(0),
        }
    }

    /// An attempt begins.
    pub(in super::super) fn begin(&self) {
        if self.bounds_load() {
            self.in_flight.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// An attempt has ended.
    pub(in super::super) fn end(&self) {
        if self.bounds_load() {
            self.in_flight.fetch_sub(1, Ordering::Relaxed);
        }
    }

    const fn bounds_load(&self) -> bool {
        matches!(
            self.settings.algorithm,
            Algorithm::RingHash | Algorithm::Maglev
        )
    }

    /// The endpoint for an attempt. None only of an empty set.
    pub(in super::super) fn choose<'s, T: Target>(
        &self,
        set: &'s Set<T>,
        wish: &Wish<'_, T>,
        rng: &mut (impl Rng + ?Sized),
    ) -> Option<&'s Arc<Endpoint<T>>> {
        let passes: &[Pass] = if wish.panic {
            &[Pass::Untried, Pass::Any]
        } else {
            &[Pass::Fresh, Pass::Standing, Pass::Untried, Pass::Any]
        };
        let first = if set.tiers[0].endpoints.len() == set.len() {
            0
        } else {
            self.tier(set, wish, rng)
        };
        for pass in passes {
            if *pass == Pass::Fresh && wish.ejected >= set.len() {
                continue;
            }
            for tier in (first..TIERS).chain(0..first) {
                if let Some(found) = self.within(set, tier, *pass, wish, rng) {
                    return Some(found);
                }
            }
        }
        None
    }

    /// Which tier this pick begins with: the nearest, unless so little of it stands that a share of
    /// the traffic overflows.
    fn tier<T: Target>(
        &self,
        set: &Set<T>,
        wish: &Wish<'_, T>,
        rng: &mut (impl Rng + ?Sized),
    ) -> usize {
        let mut rest = rng.random::<f64>();
        let mut first_with_any = None;
        for (index, tier) in set
            .tiers
            .iter()
            .enumerate()
            .filter(|(_, tier)| !tier.endpoints.is_empty())
        {
            first_with_any.get_or_insert(index);
            let stands = if wish.ejected == 0 || wish.panic {
                1.0
            } else {
                tier.standing(wish, rng)
            };
            let share = (stands * self.settings.overprovisioning).min(1.0);
            if rest < share {
                return index;
            }
            rest = (rest - share) / (1.0 - share).max(f64::MIN_POSITIVE);
        }
        first_with_any.unwrap_or(0)
    }

    fn within<'s, T: Target>(
        &self,
        set: &'s Set<T>,
        tier: usize,
        pass: Pass,
        wish: &Wish<'_, T>,
        rng: &mut (impl Rng + ?Sized),
    ) -> Option<&'s Arc<Endpoint<T>>> {
        let members = &set.tiers[tier];
        if members.endpoints.is_empty() {
            return None;
        }
        match (self.settings.algorithm, wish.hash) {
            (Algorithm::LeastRequest, _) => {
                self.better_of_two(members, pass, wish, rng, |endpoint| {
                    f64::from(endpoint.in_flight() + 1) / f64::from(endpoint.weight())
                })
            }
            (Algorithm::RoundRobin, _) => self.next_in_turn(members, pass, wish, rng),
            (Algorithm::Weighted, _) => self.weighted(members, pass, wish, rng),
            (Algorithm::RingHash, Some(hash)) => {
                let around = set.ring.as_ref()?.from(hash);
                self.bounded(around, set, pass, wish)
            }
            (Algorithm::Maglev, Some(hash)) => {
                let around = set.maglev.as_ref()?.from(hash);
                self.bounded(around, set, pass, wish)
            }
            // Hashing without a hash: as if there were no affinity.
            (Algorithm::PeakEwma | Algorithm::RingHash | Algorithm::Maglev, _) => {
                self.better_of_two(members, pass, wish, rng, |endpoint| endpoint.cost(wish.now))
            }
        }
    }

    fn better_of_two<'s, T: Target>(
        &self,
        tier: &'s Tier<T>,
        pass: Pass,
        wish: &Wish<'_, T>,
        rng: &mut (impl Rng + ?Sized),
        cost: impl Fn(&Endpoint<T>) -> f64,
    ) -> Option<&'s Arc<Endpoint<T>>> {
        let one = tier.draw(pass, wish, rng)?;
        for _ in 0..DRAWS {
            let other = &tier.endpoints[rng.random_range(0..tier.endpoints.len())];
            if !Arc::ptr_eq(one, other) && wish.takes(other, pass) {
                let warm =
                    |endpoint: &Endpoint<T>| cost(endpoint) / self.warmth(endpoint, wish.now);
                return Some(if warm(other) < warm(one) { other } else { one });
            }
        }
        Some(one)
    }

    fn next_in_turn<'s, T: Target>(
        &self,
        tier: &'s Tier<T>,
        pass: Pass,
        wish: &Wish<'_, T>,
        rng: &mut (impl Rng + ?Sized),
    ) -> Option<&'s Arc<Endpoint<T>>> {
        for _ in 0..DRAWS {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed) as usize;
            let next = &tier.endpoints[turn % tier.endpoints.len()];
            if wish.takes(next, pass) && self.lets_in(next, wish.now, rng) {
                return Some(next);
            }
        }
        tier.draw(pass, wish, rng)
    }

    fn weighted<'s, T: Target>(
        &self,
        tier: &'s Tier<T>,
        pass: Pass,
        wish: &Wish<'_, T>,
        rng: &mut (impl Rng + ?Sized),
    ) -> Option<&'s Arc<Endpoint<T>>> {
        for _ in 0..DRAWS {
            let next = tier.weights.as_ref()?.draw(rng)?;
            if wish.takes(next, pass) && self.lets_in(next, wish.now, rng) {
                return Some(next);
            }
        }
        tier.draw(pass, wish, rng)
    }

    /// Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018): the first from
    /// the hash on that is not above its share.
    fn bounded<'s, T: Target>(
        &self,
        around: impl Iterator<Item = &'s Arc<Endpoint<T>>>,
        set: &Set<T>,
        pass: Pass,
        wish: &Wish<'_, T>,
    ) -> Option<&'s Arc<Endpoint<T>>> {
        let mean = f64::from(self.in_flight.load(Ordering::Relaxed) + 1) / set.len().max(1) as f64;
        let bound = (mean * self.settings.bounded_load).ceil();
        let mut nearest = None;
        for endpoint in around
            .filter(|endpoint| wish.takes(endpoint, pass))
            .take(STEPS)
        {
            nearest.get_or_insert(endpoint);
            if f64::from(endpoint.in_flight()) < bound {
                return Some(endpoint);
            }
        }
        nearest
    }

    /// How warm an endpoint is, from the configured minimum to 1.
    fn warmth<T: Target>(&self, endpoint: &Endpoint<T>, now: Timestamp) -> f64 {
        let age = now
            .as_nanos()
            .saturating_sub(endpoint.warm_from().as_nanos());
        if age >= self.slow_start_nanos {
            return 1.0;
        }
        let grown = age as f64 / self.slow_start_nanos as f64;
        grown.max(self.settings.slow_start_minimum)
    }

    fn lets_in<T: Target>(
        &self,
        endpoint: &Endpoint<T>,
        now: Timestamp,
        rng: &mut (impl Rng + ?Sized),
    ) -> bool {
        let warmth = self.warmth(endpoint, now);
        warmth >= 1.0 || rng.random::<f64>() < warmth
    }
}

impl<T: Target> Tier<T> {
    /// A random one that the pass takes; found by search when draws fail.
    fn draw(
        &self,
        pass: Pass,
        wish: &Wish<'_, T>,
        rng: &mut (impl Rng + ?Sized),
    ) -> Option<&Arc<Endpoint<T>>> {
        let count = self.endpoints.len();
        for _ in 0..DRAWS {
            let one = &self.endpoints[rng.random_range(0..count)];
            if wish.takes(one, pass) {
                return Some(one);
            }
        }
        let start = rng.random_range(0..count);
        let around = self
            .endpoints
            .iter()
            .skip(start)
            .chain(self.endpoints.iter().take(start));
        around
            .into_iter()
            .find(|endpoint| wish.takes(endpoint, pass))
    }

    /// Which share of the tier stands, by a sample when it is large.
    fn standing(&self, wish: &Wish<'_, T>, rng: &mut (impl Rng + ?Sized)) -> f64 {
        const SAMPLE: usize = 32;
        let count = self.endpoints.len();
        let stands = |endpoint: &&Arc<Endpoint<T>>| wish.takes(endpoint, Pass::Standing);
        if count <= SAMPLE {
            return self.endpoints.iter().filter(stands).count() as f64 / count as f64;
        }
        let sample = (0..SAMPLE).map(|_| &self.endpoints[rng.random_range(0..count)]);
        sample.filter(stands).count() as f64 / SAMPLE as f64
    }
}

impl<T: Target> Wish<'_, T> {
    fn takes(&self, endpoint: &Endpoint<T>, pass: Pass) -> bool {
        let stands = || !endpoint.is_ejected() && !self.source.ejects(endpoint.target());
        let untried = || !self.tried.contains(endpoint.target());
        match pass {
            Pass::Fresh => stands() && untried(),
            Pass::Standing => stands(),
            Pass::Untried => untried(),
            Pass::Any => true,
        }
    }
}
