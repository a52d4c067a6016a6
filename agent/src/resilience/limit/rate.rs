//! One token bucket: governor's, with the time passed in.

use std::cell::Cell;
use std::num::NonZeroU32;
use std::time::Duration;

use governor::clock::Clock;
use governor::middleware::NoOpMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};

use super::super::sync::{AtomicU64, Ordering};
use super::super::time::Timestamp;
use super::super::validate::{Faults, Validate};

/// How often something may happen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// Tokens per second. Range 0.001 to 1,000,000,000.
    pub per_second: f64,
    /// The most at once. Range 1 to 4,294,967,295.
    pub burst: u32,
}

impl Validate for Rate {
    fn check(&self, at: &str, faults: &mut Faults) {
        faults.range(self.per_second, 0.001, 1e9, at, "perSecond");
        faults.range(self.burst, 1, u32::MAX, at, "burst");
    }
}

/// The bucket is empty, or never holds so much.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the rate limit is reached")]
pub struct RateExceeded {
    /// How long until there is enough; `None` if there never is.
    pub retry_after: Option<Duration>,
}

/// A token bucket (GCRA). Lock-free.
pub struct RateLimit {
    limiter: RateLimiter<NotKeyed, InMemoryState, PassedClock, NoOpMiddleware<Duration>>,
    refused: AtomicU64,
}

impl std::fmt::Debug for RateLimit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RateLimit")
            .field("refused", &self.refused)
            .finish_non_exhaustive()
    }
}

impl RateLimit {
    /// A full bucket.
    pub fn new(rate: Rate, now: Timestamp) -> Self {
        let period = Duration::from_secs_f64((1.0 / rate.per_second).clamp(1e-9, 1e9));
        let burst = NonZeroU32::new(rate.burst).unwrap_or(NonZeroU32::MIN);
        let quota = Quota::with_period(period)
            .unwrap_or(Quota::per_second(burst))
            .allow_burst(burst);
        let limiter = at(now, || RateLimiter::direct_with_clock(quota, PassedClock));
        Self {
            limiter,
            refused: AtomicU64::new(0),
        }
    }

    /// Takes tokens.
    ///
    /// # Errors
    /// [`RateExceeded`] when there are too few; counted, and none is taken.
    pub fn take(&self, tokens: NonZeroU32, now: Timestamp) -> Result<(), RateExceeded> {
        let retry_after = match at(now, || self.limiter.check_n(tokens)) {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(not_until)) => Some(not_until.wait_time_from(moment(now))),
            Err(_more_than_the_burst) => None,
        };
        self.refused.fetch_add(1, Ordering::Relaxed);
        Err(RateExceeded { retry_after })
    }

    /// Refusals since the start.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

/// A clock that shows the time that was passed in. governor asks its clock on the thread that asks
/// for tokens, so the time waits there.
#[derive(Clone, Copy, Debug)]
struct PassedClock;

thread_local! {
    static NOW: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

impl Clock for PassedClock {
    type Instant = Duration;

    fn now(&self) -> Duration {
        NOW.get()
    }
}

fn at<R>(now: Timestamp, ask: impl FnOnce() -> R) -> R {
    NOW.set(moment(now));
    ask()
}

const fn moment(now: Timestamp) -> Duration {
    Duration::from_nanos(now.as_nanos())
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    const ONE: NonZeroU32 = NonZeroU32::MIN;

    #[test]
    fn a_burst_passes_then_the_rate_holds_and_says_how_long_to_wait() {
        let start = Timestamp::ZERO + Duration::from_secs(5);
        let limit = RateLimit::new(
            Rate {
                per_second: 10.0,
                burst: 5,
            },
            start,
        );
        let passed = (0..20).filter(|_| limit.take(ONE, start).is_ok()).count();
        assert_eq!(passed, 5);
        assert_eq!(limit.refused(), 15);
        let wait = limit.take(ONE, start).unwrap_err().retry_after.unwrap();
        assert_eq!(wait, Duration::from_millis(100));
        assert!(limit.take(ONE, start + wait).is_ok());
    }

    #[test]
    fn more_than_the_burst_is_never_to_be_had() {
        let limit = RateLimit::new(
            Rate {
                per_second: 10.0,
                burst: 5,
            },
            Timestamp::ZERO,
        );
        let six = NonZeroU32::new(6).unwrap();
        assert_eq!(
            limit.take(six, Timestamp::ZERO).unwrap_err().retry_after,
            None
        );
    }

    #[test]
    fn no_worker_gets_one_beyond_the_shared_limit() {
        // envoy#2927: each worker may exceed a shared limit by one.
        let limit = RateLimit::new(
            Rate {
                per_second: 0.001,
                burst: 100,
            },
            Timestamp::ZERO,
        );
        let passed: usize = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        (0..1000)
                            .filter(|_| limit.take(ONE, Timestamp::ZERO).is_ok())
                            .count()
                    })
                })
                .collect();
            workers
                .into_iter()
                .map(|worker| worker.join().unwrap())
                .sum()
        });
        assert_eq!(passed, 100);
    }
}
