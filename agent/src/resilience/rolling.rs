//! A count over the last moments, without a lock.
//!
//! Time is cut into buckets; each bucket is one atomic word holding its epoch (which bucket of all
//! time it is, modulo 2³²) and its count. A bucket that is found with an old epoch is replaced, so
//! nothing has to sweep. A late writer, whose `now` is older than the bucket's epoch, counts into
//! the newer bucket: a count is never lost.

use std::time::Duration;

use super::sync::{AtomicU64, Ordering};
use super::time::{Timestamp, nanos};

/// Counts what happened within the last `N` buckets.
#[derive(Debug)]
pub struct RollingCounter<const N: usize> {
    bucket_nanos: u64,
    slots: [AtomicU64; N],
}

/// A count that was added and may be taken back.
#[derive(Clone, Copy, Debug)]
pub struct Added {
    slot: usize,
    epoch: u32,
}

impl<const N: usize> RollingCounter<N> {
    /// A counter over `window`, cut into `N` buckets: [`Self::sum`] covers between `N-1` and `N`
    /// of them, as the newest is not full yet.
    pub fn new(window: Duration) -> Self {
        Self {
            bucket_nanos: (nanos(window) / N as u64).max(1),
            slots: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    /// Counts one.
    pub fn add(&self, now: Timestamp) -> Added {
        let epoch = self.epoch(now);
        let slot = epoch as usize % N;
        let word = &self.slots[slot];
        let mut seen = word.load(Ordering::Relaxed);
        loop {
            let (held, count) = unpack(seen);
            // Half the ring of epochs apart is how a wrapped epoch still compares right.
            let (epoch, next) = if count == 0 || is_older(held, epoch) {
                (epoch, pack(epoch, 1))
            } else {
                (held, pack(held, count.saturating_add(1)))
            };
            match word.compare_exchange_weak(seen, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return Added { slot, epoch },
                Err(now_there) => seen = now_there,
            }
        }
    }

    /// Takes one count back, unless its bucket is gone already.
    pub fn take_back(&self, added: Added) {
        let word = &self.slots[added.slot];
        let mut seen = word.load(Ordering::Relaxed);
        loop {
            let (held, count) = unpack(seen);
            if held != added.epoch || count == 0 {
                return;
            }
            match word.compare_exchange_weak(
                seen,
                pack(held, count - 1),
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(_) => return,
                Err(now_there) => seen = now_there,
            }
        }
    }

    /// How many were counted in the window that ends now.
    pub fn sum(&self, now: Timestamp) -> u64 {
        let epoch = self.epoch(now);
        self.slots
            .iter()
            .map(|word| unpack(word.load(Ordering::Acquire)))
            .filter(|(held, _)| epoch.wrapping_sub(*held) < N as u32 || is_older(epoch, *held))
            .map(|(_, count)| u64::from(count))
            .sum()
    }

    /// Forgets everything.
    pub fn reset(&self) {
        for word in &self.slots {
            word.store(0, Ordering::Release);
        }
    }

    fn epoch(&self, now: Timestamp) -> u32 {
        (now.as_nanos() / self.bucket_nanos) as u32
    }
}

const fn pack(epoch: u32, count: u32) -> u64 {
    (epoch as u64) << 32 | count as u64
}

const fn unpack(word: u64) -> (u32, u32) {
    ((word >> 32) as u32, word as u32)
}

const fn is_older(held: u32, epoch: u32) -> bool {
    let ahead = epoch.wrapping_sub(held);
    ahead != 0 && ahead < u32::MAX / 2
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn what_leaves_the_window_is_no_longer_counted() {
        let counter = RollingCounter::<10>::new(10 * SECOND);
        let mut now = Timestamp::ZERO;
        for _ in 0..20 {
            counter.add(now);
            now = now + SECOND;
        }
        assert_eq!(counter.sum(now), 9);
        assert_eq!(counter.sum(now + 100 * SECOND), 0);
    }

    #[test]
    fn what_is_taken_back_is_not_counted_and_cannot_be_taken_from_another_bucket() {
        let counter = RollingCounter::<2>::new(2 * SECOND);
        let added = counter.add(Timestamp::ZERO);
        counter.take_back(added);
        assert_eq!(counter.sum(Timestamp::ZERO), 0);
        let added = counter.add(Timestamp::ZERO);
        let later = Timestamp::ZERO + 2 * SECOND;
        counter.add(later);
        counter.take_back(added);
        assert_eq!(counter.sum(later), 1);
    }

    #[test]
    fn a_late_writer_counts_into_the_newer_bucket() {
        let counter = RollingCounter::<2>::new(2 * SECOND);
        let now = Timestamp::ZERO + 10 * SECOND;
        counter.add(now);
        counter.add(Timestamp::ZERO);
        assert_eq!(counter.sum(now), 2);
    }
}

#[cfg(test)]
#[cfg(loom)]
mod model {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    #[test]
    fn no_count_is_lost_when_two_workers_roll_a_bucket_over() {
        loom::model(|| {
            let counter = Arc::new(RollingCounter::<2>::new(Duration::from_secs(2)));
            counter.add(Timestamp::ZERO);
            let later = Timestamp::ZERO + Duration::from_secs(2);
            let other = {
                let counter = Arc::clone(&counter);
                thread::spawn(move || counter.add(later))
            };
            counter.add(later);
            other.join().unwrap();
            assert_eq!(counter.sum(later), 2);
        });
    }

    #[test]
    fn a_count_that_is_taken_back_takes_only_itself() {
        loom::model(|| {
            let counter = Arc::new(RollingCounter::<1>::new(Duration::from_secs(1)));
            let other = {
                let counter = Arc::clone(&counter);
                thread::spawn(move || counter.take_back(counter.add(Timestamp::ZERO)))
            };
            counter.add(Timestamp::ZERO);
            other.join().unwrap();
            assert_eq!(counter.sum(Timestamp::ZERO), 1);
        });
    }
}
