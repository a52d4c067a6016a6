//! Token buckets of a (destination, route): in all, and for each source.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use super::super::ejection::SourceId;
use super::super::sync::{AtomicU64, Mutex, Ordering};
use super::super::time::Timestamp;
use super::super::validate::{Faults, Validate, join};
use super::rate::{Rate, RateExceeded, RateLimit};

/// Shards of the table of sources: two workers seldom meet.
const SHARDS: usize = 16;
/// The most sources with a bucket of their own, per shard; beyond it new sources share one bucket,
/// which is counted.
const SOURCES_PER_SHARD: usize = 256;
/// A source that did not ask for so long makes room for another.
const IDLE: Duration = Duration::from_secs(60);

/// Rate limits on three axes. `None` is no limit. All hold at the source: per node.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RatesSettings {
    /// Each source.
    pub source: Option<Rate>,
    /// The route, all sources together.
    pub route: Option<Rate>,
    /// The destination, all routes together.
    pub total: Option<Rate>,
}

impl Validate for RatesSettings {
    fn check(&self, at: &str, faults: &mut Faults) {
        for (field, rate) in [
            ("source", &self.source),
            ("route", &self.route),
            ("total", &self.total),
        ] {
            if let Some(rate) = rate {
                rate.check(&join(at, field), faults);
            }
        }
    }
}

/// Which limit was reached; a metric label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Axis {
    /// The source's own.
    Source,
    /// The route's.
    Route,
    /// The destination's.
    Total,
}

/// A request is above a rate limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the rate limit is reached")]
pub struct Limited {
    /// Which one.
    pub axis: Axis,
    /// How long until it makes sense to ask again; `None` if never.
    pub retry_after: Option<Duration>,
}

/// The buckets of a (destination, route).
#[derive(Debug)]
pub struct Rates {
    per_source: Option<PerSource>,
    route: Option<RateLimit>,
    /// Shared by the routes of a destination.
    total: Option<Arc<RateLimit>>,
}

impl Rates {
    /// Full buckets; `total` is the destination's, made once for all its routes.
    pub fn new(settings: &RatesSettings, total: Option<Arc<RateLimit>>, now: Timestamp) -> Self {
        Self {
            per_source: settings.source.map(|rate| PerSource::new(rate, now)),
            route: settings.route.map(|rate| RateLimit::new(rate, now)),
            total,
        }
    }

    /// Takes a token on each axis. The source's own comes first, so that a source above its limit
    /// takes nothing from the others.
    ///
    /// # Errors
    /// [`Limited`], with the axis and the wait.
    pub fn take(&self, source: SourceId, now: Timestamp) -> Result<(), Limited> {
        let on = |axis| {
            move |exceeded: RateExceeded| Limited {
                axis,
                retry_after: exceeded.retry_after,
            }
        };
        if let Some(per_source) = &self.per_source {
            per_source.take(source, now).map_err(on(Axis::Source))?;
        }
        if let Some(route) = &self.route {
            route.take(NonZeroU32::MIN, now).map_err(on(Axis::Route))?;
        }
        if let Some(total) = &self.total {
            total.take(NonZeroU32::MIN, now).map_err(on(Axis::Total))?;
        }
        Ok(())
    }

    /// Requests whose source shared a bucket because there were too many sources.
    pub fn overflows(&self) -> u64 {
        self.per_source
            .as_ref()
            .map_or(0, |per_source| per_source.overflows.load(Ordering::Relaxed))
    }
}

#[derive(Debug)]
struct PerSource {
    rate: Rate,
    shards: [Mutex<HashMap<SourceId, Bucket>>; SHARDS],
    shared: RateLimit,
    overflows: AtomicU64,
}

#[derive(Debug)]
struct Bucket {
    limit: RateLimit,
    last: Timestamp,
}

impl PerSource {
    fn new(rate: Rate, now: Timestamp) -> Self {
        Self {
            rate,
            shards: std::array::from_fn(|_| Mutex::new(HashMap::new())),
            shared: RateLimit::new(rate, now),
            overflows: AtomicU64::new(0),
        }
    }

    fn take(&self, source: SourceId, now: Timestamp) -> Result<(), RateExceeded> {
        let shard = super::super::backoff::mix(source.0) as usize % SHARDS;
        let mut buckets = self.shards[shard].lock();
        if !buckets.contains_key(&source) && buckets.len() >= SOURCES_PER_SHARD {
            buckets.retain(|_, bucket| now.since(bucket.last) < IDLE);
            if buckets.len() >= SOURCES_PER_SHARD {
                self.overflows.fetch_add(1, Ordering::Relaxed);
                return self.shared.take(NonZeroU32::MIN, now);
            }
        }
        let bucket = buckets.entry(source).or_insert_with(|| Bucket {
            limit: RateLimit::new(self.rate, now),
            last: now,
        });
        bucket.last = now;
        bucket.limit.take(NonZeroU32::MIN, now)
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    const TEN: Rate = Rate {
        per_second: 10.0,
        burst: 10,
    };

    #[test]
    fn a_source_above_its_limit_takes_nothing_from_the_others() {
        let settings = RatesSettings {
            source: Some(TEN),
            route: Some(Rate {
                per_second: 10.0,
                burst: 15,
            }),
            total: None,
        };
        let rates = Rates::new(&settings, None, Timestamp::ZERO);
        let loud = (0..1000)
            .filter(|_| rates.take(SourceId(1), Timestamp::ZERO).is_ok())
            .count();
        let quiet = (0..5)
            .filter(|_| rates.take(SourceId(2), Timestamp::ZERO).is_ok())
            .count();
        assert_eq!((loud, quiet), (10, 5));
        assert_eq!(
            rates.take(SourceId(3), Timestamp::ZERO).unwrap_err().axis,
            Axis::Route
        );
    }

    #[test]
    fn routes_share_the_total() {
        let total = Arc::new(RateLimit::new(TEN, Timestamp::ZERO));
        let routes: Vec<Rates> = (0..2)
            .map(|_| {
                Rates::new(
                    &RatesSettings::default(),
                    Some(Arc::clone(&total)),
                    Timestamp::ZERO,
                )
            })
            .collect();
        let passed = (0..20)
            .filter(|n| routes[n % 2].take(SourceId(1), Timestamp::ZERO).is_ok())
            .count();
        assert_eq!(passed, 10);
    }

    #[test]
    fn sources_beyond_the_bound_share_a_bucket_and_idle_ones_make_room() {
        let rates = Rates::new(
            &RatesSettings {
                source: Some(TEN),
                ..RatesSettings::default()
            },
            None,
            Timestamp::ZERO,
        );
        for id in 0..100_000 {
            let _ = rates.take(SourceId(id), Timestamp::ZERO);
        }
        assert!(rates.overflows() > 90_000);
        let before = rates.overflows();
        assert!(
            rates
                .take(SourceId(999_999), Timestamp::ZERO + 2 * IDLE)
                .is_ok()
        );
        assert_eq!(rates.overflows(), before);
    }
}
