//! How many at once. Exact under any interleaving: a place is taken by compare-and-swap, so no
//! worker gets one beyond the limit (envoy#2927).

use std::sync::Arc;

use super::super::sync::{AtomicU32, AtomicU64, Ordering};

/// A bounded number of places. Lock-free.
#[derive(Debug)]
pub struct ConcurrencyLimit {
    limit: AtomicU32,
    taken: AtomicU32,
    refused: AtomicU64,
}

/// No place is free: the request is shed, which is nobody's failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the concurrency limit is reached")]
pub struct Full;

/// A place, given back when dropped.
#[derive(Debug)]
#[must_use]
pub struct Slot(Arc<ConcurrencyLimit>);

impl ConcurrencyLimit {
    /// As many free places as this.
    pub fn new(limit: u32) -> Arc<Self> {
        Arc::new(Self {
            limit: AtomicU32::new(limit),
            taken: AtomicU32::new(0),
            refused: AtomicU64::new(0),
        })
    }

    /// Takes a place.
    ///
    /// # Errors
    /// [`Full`]; counted.
    pub fn take(self: &Arc<Self>) -> Result<Slot, Full> {
        let mut seen = self.taken.load(Ordering::Relaxed);
        while seen < self.limit.load(Ordering::Relaxed) {
            match self.taken.compare_exchange_weak(
                seen,
                seen + 1,
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Ok(Slot(Arc::clone(self))),
                Err(there) => seen = there,
            }
        }
        self.refused.fetch_add(1, Ordering::Relaxed);
        Err(Full)
    }

    /// Another limit from now on. Places above it that are taken stay so until given back.
    pub fn set(&self, limit: u32) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// The limit now.
    pub fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }

    /// Places taken now.
    pub fn taken(&self) -> u32 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Refusals since the start.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_place_that_is_dropped_is_free_again() {
        let limit = ConcurrencyLimit::new(1);
        let slot = limit.take().unwrap();
        assert_eq!(limit.take().unwrap_err(), Full);
        drop(slot);
        assert!(limit.take().is_ok());
        assert_eq!(limit.refused(), 1);
    }

    #[test]
    fn a_limit_that_shrinks_takes_no_place_away() {
        let limit = ConcurrencyLimit::new(2);
        let slots = [limit.take().unwrap(), limit.take().unwrap()];
        limit.set(1);
        assert_eq!(limit.taken(), 2);
        drop(slots);
        let _one = limit.take().unwrap();
        assert!(limit.take().is_err());
    }

    #[test]
    fn workers_together_never_exceed_the_limit() {
        let limit = ConcurrencyLimit::new(3);
        let highest = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..20_000 {
                        if let Ok(_slot) = limit.take() {
                            highest.fetch_max(limit.taken(), Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert!(highest.load(Ordering::Relaxed) <= 3);
        assert_eq!(limit.taken(), 0);
    }

    proptest! {
        #[test]
        fn the_limit_holds_under_any_order_of_taking_and_giving_back(
            most in 0u32..8,
            steps in proptest::collection::vec((any::<bool>(), 0usize..8), 0..200),
        ) {
            let limit = ConcurrencyLimit::new(most);
            let mut held = Vec::new();
            for (take, index) in steps {
                if take {
                    held.extend(limit.take());
                } else if !held.is_empty() {
                    drop(held.swap_remove(index % held.len()));
                }
                prop_assert!(held.len() <= most as usize);
                prop_assert_eq!(limit.taken() as usize, held.len());
            }
        }
    }
}

#[cfg(test)]
#[cfg(loom)]
mod model {
    use super::*;
    use loom::thread;

    #[test]
    fn of_two_workers_one_gets_the_last_place() {
        loom::model(|| {
            let limit = ConcurrencyLimit::new(1);
            let other = {
                let limit = Arc::clone(&limit);
                thread::spawn(move || limit.take().ok())
            };
            let mine = limit.take().ok();
            let theirs = other.join().unwrap();
            assert!(mine.is_none() || theirs.is_none());
            assert!(mine.is_some() || theirs.is_some());
            drop((mine, theirs));
            assert_eq!(limit.taken(), 0);
        });
    }
}
