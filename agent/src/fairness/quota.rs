//! What one pod may hold of the agent at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use thiserror::Error;

use super::is_overdue;
use super::living::Living;
use crate::resilience::limit::{ConcurrencyLimit, Slot};

/// Bounds of one pod on its node.
#[derive(Debug, Clone, Copy)]
pub struct QuotaLimits {
    /// Requests under way; a further one is answered 503 (`overload`). Default 8,192.
    pub requests: u32,
    /// Bytes kept of request bodies so that they can be sent again; a body that finds no room streams through and is
    /// not repeated. Default 32 MiB.
    pub bytes: usize,
}

impl Default for QuotaLimits {
    fn default() -> Self {
        Self {
            requests: 8_192,
            bytes: 32 << 20,
        }
    }
}

/// The quotas of all pods. One lives as long as somebody holds it.
#[derive(Debug)]
pub struct Quotas {
    limits: QuotaLimits,
    pods: Arc<Living<u64, Quota>>,
    counters: Arc<Counters>,
}

#[derive(Debug, Default)]
struct Counters {
    too_many: AtomicU64,
    too_slow: AtomicU64,
    not_kept: AtomicU64,
}

/// Why a request is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Unserved {
    /// The pod has as many requests under way as it may have.
    #[error("the pod has as many requests under way as it may have")]
    TooMany,
    /// The pod's work waits for too long already: it asks for more than its share of the workers.
    #[error("the pod's work has been waiting for its share of the workers for too long")]
    TooSlow,
}

impl Quotas {
    /// Quotas with these bounds.
    #[must_use]
    pub fn new(limits: QuotaLimits) -> Self {
        Self {
            limits,
            pods: Arc::default(),
            counters: Arc::default(),
        }
    }

    /// The quota of the pod with this number (its netns cookie), to be kept for a connection's life.
    #[must_use]
    pub fn of(&self, pod: u64) -> Arc<Quota> {
        self.pods.get_or(pod, || Quota {
            pod,
            pods: self.pods.clone(),
            requests: ConcurrencyLimit::new(self.limits.requests),
            most: self.limits.bytes,
            reserved: AtomicUsize::new(0),
            counters: self.counters.clone(),
        })
    }

    /// How often each bound was met, by name.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("request_quota_full", read(&self.counters.too_many)),
            ("request_queue_delay", read(&self.counters.too_slow)),
            ("body_not_kept", read(&self.counters.not_kept)),
        ]
    }
}

/// What one pod holds.
#[derive(Debug)]
pub struct Quota {
    pod: u64,
    pods: Arc<Living<u64, Quota>>,
    requests: Arc<ConcurrencyLimit>,
    most: usize,
    reserved: AtomicUsize,
    counters: Arc<Counters>,
}

impl Quota {
    /// Takes a place for a request until the slot is dropped. To be called by a task that takes turns for the pod.
    ///
    /// # Errors
    /// The pod has too many under way, or its work is late; counted.
    pub fn admit(&self) -> Result<Slot, Unserved> {
        if is_overdue() {
            self.counters.too_slow.fetch_add(1, Ordering::Relaxed);
            return Err(Unserved::TooSlow);
        }
        self.requests.take().map_err(|_| {
            self.counters.too_many.fetch_add(1, Ordering::Relaxed);
            Unserved::TooMany
        })
    }

    /// Reserves memory until it is dropped; none, and counted, if there is not that much left.
    pub fn reserve(self: &Arc<Self>, bytes: usize) -> Option<Reserved> {
        let fits = |held: usize| held.checked_add(bytes).filter(|all| *all <= self.most);
        let reserved = &self.reserved;
        match reserved.fetch_update(Ordering::AcqRel, Ordering::Relaxed, fits) {
            Ok(_) => Some(Reserved {
                quota: self.clone(),
                bytes,
            }),
            Err(_) => {
                self.counters.not_kept.fetch_add(1, Ordering::Relaxed);
                None
            }
        }
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        self.pods.forget(&self.pod);
    }
}

/// Memory that is spoken for.
#[derive(Debug)]
#[must_use]
pub struct Reserved {
    quota: Arc<Quota>,
    bytes: usize,
}

impl Reserved {
    /// How much, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.quota.reserved.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quotas() -> Quotas {
        Quotas::new(QuotaLimits {
            requests: 2,
            bytes: 100,
        })
    }

    #[test]
    fn a_pod_that_is_full_takes_nothing_from_another() {
        let quotas = quotas();
        let (loud, quiet) = (quotas.of(1), quotas.of(2));
        let slots = [loud.admit(), loud.admit()];
        assert_eq!(loud.admit().err(), Some(Unserved::TooMany));
        assert!(quiet.admit().is_ok());
        drop(slots);
        assert!(loud.admit().is_ok());
        assert_eq!(quotas.counters()[0], ("request_quota_full", 1));
    }

    #[test]
    fn memory_is_given_back_and_never_beyond_the_bound() {
        let quotas = quotas();
        let quota = quotas.of(1);
        let first = quota.reserve(60);
        assert!(first.is_some());
        assert!(quota.reserve(41).is_none());
        assert!(quota.reserve(usize::MAX).is_none());
        let second = quota.reserve(40);
        assert!(second.is_some());
        drop(first);
        assert!(quota.reserve(60).is_some());
        assert_eq!(quotas.counters()[2], ("body_not_kept", 2));
    }

    #[test]
    fn the_quota_of_a_pod_is_one_for_all_its_connections_and_goes_with_the_last() {
        let quotas = quotas();
        let (one, same) = (quotas.of(1), quotas.of(1));
        assert!(Arc::ptr_eq(&one, &same));
        drop((one, same));
        let _other = quotas.of(2);
        assert_eq!(quotas.pods.len(), 1);
    }
}
