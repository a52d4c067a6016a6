//! The breakers of one destination, one per route, looked up without a lock.

use std::hash::Hash;
use std::sync::Arc;

use arc_swap::ArcSwap;
use imbl::HashMap;

use super::backoff::mix;
use super::breaker::{Breaker, BreakerSettings, Permit, Rejected};
use super::event::EventSink;
use super::sync::{AtomicU64, Ordering};
use super::time::Timestamp;

/// Breakers by route. At the bound, routes that are new share the breaker of all that are too many.
#[derive(Debug)]
pub struct Breakers<R> {
    destination: Arc<str>,
    seed: u64,
    most: usize,
    by_route: ArcSwap<HashMap<R, Arc<Breaker>>>,
    shared: Arc<Breaker>,
    overflows: AtomicU64,
    sink: Arc<dyn EventSink>,
}

impl<R: Clone + Eq + Hash + std::fmt::Display> Breakers<R> {
    /// No breakers yet, and at most `most`.
    pub fn new(
        destination: Arc<str>,
        most: usize,
        settings: BreakerSettings,
        seed: u64,
        sink: Arc<dyn EventSink>,
    ) -> Self {
        let name = format!("{destination}/*").into();
        Self {
            shared: Breaker::new(name, settings, seed, Arc::clone(&sink)),
            by_route: ArcSwap::default(),
            overflows: AtomicU64::new(0),
            destination,
            seed,
            most,
            sink,
        }
    }

    /// The breaker of a route, made at its first request with the route's settings.
    pub fn of(&self, route: &R, settings: &BreakerSettings) -> Arc<Breaker> {
        if let Some(breaker) = self.by_route.load().get(route) {
            return Arc::clone(breaker);
        }
        let name: Arc<str> = format!("{}/{route}", self.destination).into();
        let fresh = Breaker::new(
            name,
            *settings,
            mix(self.seed ^ self.by_route.load().len() as u64),
            Arc::clone(&self.sink),
        );
        let mut chosen = None;
        self.by_route.rcu(|breakers| {
            let mut breakers = HashMap::clone(breakers);
            if let Some(there) = breakers.get(route) {
                chosen = Some(Arc::clone(there));
            } else if breakers.len() < self.most {
                breakers.insert(route.clone(), Arc::clone(&fresh));
                chosen = Some(Arc::clone(&fresh));
            } else {
                chosen = None;
            }
            breakers
        });
        chosen.unwrap_or_else(|| {
            self.overflows.fetch_add(1, Ordering::Relaxed);
            Arc::clone(&self.shared)
        })
    }

    /// Asks the route's breaker to let a request through.
    ///
    /// # Errors
    /// [`Rejected`], with the time until the next try.
    pub fn admit(
        &self,
        route: &R,
        settings: &BreakerSettings,
        now: Timestamp,
    ) -> Result<Permit, Rejected> {
        self.of(route, settings).admit(now)
    }

    /// A route is gone, or its settings changed: its breaker starts anew. Requests under way keep
    /// the old one.
    pub fn forget(&self, route: &R) {
        self.by_route.rcu(|breakers| breakers.without(route));
    }

    /// All breakers, for status and metrics.
    pub fn all(&self) -> Vec<(R, Arc<Breaker>)> {
        self.by_route
            .load()
            .iter()
            .map(|(route, breaker)| (route.clone(), Arc::clone(breaker)))
            .collect()
    }

    /// Requests whose route shared a breaker because there were too many routes.
    pub fn overflows(&self) -> u64 {
        self.overflows.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use crate::resilience::event::NoSink;

    #[test]
    fn a_route_keeps_its_breaker_and_routes_beyond_the_bound_share_one() {
        let breakers: Breakers<&str> = Breakers::new(
            "cart".into(),
            2,
            BreakerSettings::default(),
            1,
            Arc::new(NoSink),
        );
        let settings = BreakerSettings::default();
        let first = breakers.of(&"a", &settings);
        assert!(Arc::ptr_eq(&first, &breakers.of(&"a", &settings)));
        assert!(!Arc::ptr_eq(&first, &breakers.of(&"b", &settings)));
        assert!(Arc::ptr_eq(
            &breakers.of(&"c", &settings),
            &breakers.of(&"d", &settings)
        ));
        assert_eq!(breakers.overflows(), 2);
        assert_eq!(&**first.name(), "cart/a");
        breakers.forget(&"a");
        assert!(!Arc::ptr_eq(&first, &breakers.of(&"a", &settings)));
        assert_eq!(breakers.all().len(), 2);
    }
}
