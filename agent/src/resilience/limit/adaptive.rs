//! A concurrency limit that is measured, not guessed: the gradient of Netflix's concurrency-limits
//! (`Gradient2Limit`).
//!
//! Latency of the last moments is compared with latency over a long time. As long as both are alike
//! the limit grows by a small queue; when latency rises a queue is building up somewhere, and the
//! limit shrinks in proportion.

use std::sync::Arc;
use std::time::Duration;

use super::super::outcome::Outcome;
use super::super::sync::{AtomicU32, AtomicU64, Mutex, Ordering};
use super::super::time::{Timestamp, nanos};
use super::super::validate::{Faults, Validate};
use super::concurrency::{ConcurrencyLimit, Full, Slot};

/// How the limit moves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdaptiveSettings {
    /// Where it starts. Range `least` to `most`, default 100.
    pub initial: u32,
    /// Never below this. Range 1 to 1,000,000, default 10.
    pub least: u32,
    /// Never above this. Range `least` to 1,000,000, default 1,000.
    pub most: u32,
    /// Latency may be so many times the long-term one before the limit shrinks. Range 1 to 10,
    /// default 4: a defence against overload and not a wish for low latency. At 1.5, Netflix's, a
    /// destination that lost a third of its endpoints and could still serve everything is shed.
    pub tolerance: f64,
    /// By how much the limit grows in a calm window. Range 0 to 1,000, default 4.
    pub queue: u32,
    /// How much of each step is taken. Range 0.01 to 1, default 0.2.
    pub smoothing: f64,
    /// Latency is averaged over this before each step. Range 10 ms to 60 s, default 100 ms.
    pub window: Duration,
    /// Windows after which the long-term latency has forgotten. Range 10 to 100,000, default 600.
    pub memory: u32,
}

impl Default for AdaptiveSettings {
    fn default() -> Self {
        Self {
            initial: 100,
            least: 10,
            most: 1_000,
            tolerance: 4.0,
            queue: 4,
            smoothing: 0.2,
            window: Duration::from_millis(100),
            memory: 600,
        }
    }
}

impl Validate for AdaptiveSettings {
    fn check(&self, at: &str, faults: &mut Faults) {
        faults.range(self.least, 1, 1_000_000, at, "least");
        faults.range(self.most, self.least, 1_000_000, at, "most");
        faults.range(self.initial, self.least, self.most, at, "initial");
        faults.range(self.tolerance, 1.0, 10.0, at, "tolerance");
        faults.range(self.queue, 0, 1_000, at, "queue");
        faults.range(self.smoothing, 0.01, 1.0, at, "smoothing");
        faults.duration(
            self.window,
            Duration::from_millis(10),
            Duration::from_secs(60),
            at,
            "window",
        );
        faults.range(self.memory, 10, 100_000, at, "memory");
    }
}

/// The share of the limit that remains after a window in which requests ran into their timeouts.
const BACK_OFF: f64 = 0.9;

/// A limit that follows latency. Taking a place is lock-free; once a window one worker steps.
#[derive(Debug)]
pub struct AdaptiveLimit {
    settings: AdaptiveSettings,
    places: Arc<ConcurrencyLimit>,
    /// Of the present window.
    latency_sum: AtomicU64,
    samples: AtomicU32,
    timeouts: AtomicU32,
    busiest: AtomicU32,
    next_step: AtomicU64,
    long: Mutex<Long>,
}

#[derive(Debug)]
struct Long {
    latency: f64,
    windows: u32,
    limit: f64,
}

impl AdaptiveLimit {
    /// Starts at the initial limit.
    pub fn new(settings: AdaptiveSettings, now: Timestamp) -> Arc<Self> {
        Arc::new(Self {
            places: ConcurrencyLimit::new(settings.initial),
            latency_sum: AtomicU64::new(0),
            samples: AtomicU32::new(0),
            timeouts: AtomicU32::new(0),
            busiest: AtomicU32::new(0),
            next_step: AtomicU64::new((now + settings.window).as_nanos()),
            long: Mutex::new(Long {
                latency: 0.0,
                windows: 0,
                limit: f64::from(settings.initial),
            }),
            settings,
        })
    }

    /// Takes a place.
    ///
    /// # Errors
    /// [`Full`]; counted.
    pub fn take(&self) -> Result<Slot, Full> {
        let slot = self.places.take()?;
        self.busiest
            .fetch_max(self.places.taken(), Ordering::Relaxed);
        Ok(slot)
    }

    /// A request that held a place has ended.
    pub fn sample(&self, latency: Duration, outcome: Outcome, now: Timestamp) {
        match outcome {
            Outcome::Success | Outcome::CallerError(_) => {
                self.latency_sum
                    .fetch_add(nanos(latency), Ordering::Relaxed);
                self.samples.fetch_add(1, Ordering::Relaxed);
            }
            Outcome::Failure(super::super::outcome::Failure::Timeout) => {
                self.timeouts.fetch_add(1, Ordering::Relaxed);
            }
            // Fast errors say nothing about queues, and would make latency look good.
            _ => {}
        }
        let due = self.next_step.load(Ordering::Relaxed);
        if now.as_nanos() >= due {
            let next = (now + self.settings.window).as_nanos();
            if self
                .next_step
                .compare_exchange(due, next, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
            {
                self.step();
            }
        }
    }

    /// The limit now.
    pub fn limit(&self) -> u32 {
        self.places.limit()
    }

    /// The places, for status.
    pub const fn places(&self) -> &Arc<ConcurrencyLimit> {
        &self.places
    }

    fn step(&self) {
        let samples = self.samples.swap(0, Ordering::Relaxed);
        let sum = self.latency_sum.swap(0, Ordering::Relaxed);
        let timeouts = self.timeouts.swap(0, Ordering::Relaxed);
        let busiest = self.busiest.swap(self.places.taken(), Ordering::Relaxed);
        let mut long = self.long.lock();
        let settings = &self.settings;
        let target = if timeouts > samples {
            long.limit * BACK_OFF
        } else if samples == 0 {
            return;
        } else {
            let short = sum as f64 / f64::from(samples);
            long.add(short, settings.memory);
            // The long-term latency must not stay high once an overload is over.
            if long.latency > 2.0 * short {
                long.latency *= 0.95;
            }
            if f64::from(busiest) < long.limit / 2.0 {
                // Nobody came near the limit: latency says nothing about it.
                return;
            }
            let gradient = (settings.tolerance * long.latency / short.max(1.0)).clamp(0.5, 1.0);
            let target = long.limit * gradient + f64::from(settings.queue);
            long.limit * (1.0 - settings.smoothing) + target * settings.smoothing
        };
        long.limit = target.clamp(f64::from(settings.least), f64::from(settings.most));
        self.places.set(long.limit as u32);
    }
}

impl Long {
    fn add(&mut self, short: f64, memory: u32) {
        const WARM_UP: u32 = 10;
        if self.windows < WARM_UP {
            self.windows += 1;
            self.latency += (short - self.latency) / f64::from(self.windows);
        } else {
            self.latency += (short - self.latency) * 2.0 / f64::from(memory + 1);
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    /// Runs windows in which `busy` places are taken and each request takes `latency`.
    fn run(
        limit: &Arc<AdaptiveLimit>,
        now: &mut Timestamp,
        windows: u32,
        latency: impl Fn(u32) -> Duration,
    ) {
        for _ in 0..windows {
            let slots: Vec<Slot> = (0..limit.limit())
                .filter_map(|_| limit.take().ok())
                .collect();
            let taken = slots.len() as u32;
            *now = *now + Duration::from_millis(100);
            for _ in &slots {
                limit.sample(latency(taken), Outcome::Success, *now);
            }
        }
    }

    #[test]
    fn it_finds_the_knee_of_a_server_that_queues() {
        let mut now = Timestamp::ZERO;
        let limit = AdaptiveLimit::new(
            AdaptiveSettings {
                initial: 20,
                tolerance: 1.5,
                ..AdaptiveSettings::default()
            },
            now,
        );
        // 50 are served at once in 10 ms; more wait.
        let server =
            |taken: u32| Duration::from_millis(10).mul_f64(f64::from(taken.max(50)) / 50.0);
        run(&limit, &mut now, 300, server);
        assert!((50..160).contains(&limit.limit()), "{}", limit.limit());
    }

    #[test]
    fn a_server_that_slows_down_lowers_it_and_timeouts_do_too() {
        let mut now = Timestamp::ZERO;
        let limit = AdaptiveLimit::new(AdaptiveSettings::default(), now);
        run(&limit, &mut now, 50, |_| Duration::from_millis(10));
        let before = limit.limit();
        run(&limit, &mut now, 20, |_| Duration::from_millis(100));
        assert!(limit.limit() < before / 2, "{} of {before}", limit.limit());
        for _ in 0..200 {
            now = now + Duration::from_millis(100);
            limit.sample(
                Duration::from_secs(1),
                Outcome::Failure(super::super::super::outcome::Failure::Timeout),
                now,
            );
        }
        assert_eq!(limit.limit(), 10, "never below the least");
    }

    #[test]
    fn idle_times_and_fast_errors_leave_it_alone() {
        let mut now = Timestamp::ZERO;
        let limit = AdaptiveLimit::new(AdaptiveSettings::default(), now);
        for _ in 0..100 {
            now = now + Duration::from_millis(100);
            limit.sample(
                Duration::from_micros(1),
                Outcome::Failure(super::super::super::outcome::Failure::Reset),
                now,
            );
            limit.sample(Duration::from_millis(10), Outcome::Success, now);
        }
        assert_eq!(limit.limit(), 100);
    }
}
