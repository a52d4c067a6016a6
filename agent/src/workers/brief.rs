//! Whether the connections of a listener come and go, and whether one worker can carry them all. Pure: times in,
//! answers out.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Connections that last for less than this are brief …
const BRIEF: Duration = Duration::from_millis(100);
/// … and those to come are taken for brief if so many in a row were …
const RUN: u32 = 32;
/// … of which the last has ended within this.
const RECENT: Duration = Duration::from_secs(1);

/// How long the connections of one listener last. Counters that race may miss one of many.
#[derive(Debug)]
pub(super) struct Briefs {
    start: Instant,
    /// How many in a row were brief, up to [`RUN`].
    run: AtomicU32,
    /// When the last of them has ended, in nanoseconds since the start.
    last: AtomicU64,
}

impl Briefs {
    pub fn new(now: Instant) -> Self {
        Self {
            start: now,
            run: AtomicU32::new(0),
            last: AtomicU64::new(0),
        }
    }

    /// A connection has ended.
    pub fn ended(&self, lasted: Duration, now: Instant) {
        if lasted >= BRIEF {
            return self.run.store(0, Ordering::Relaxed);
        }
        let run = self.run.load(Ordering::Relaxed);
        if run < RUN {
            self.run.store(run + 1, Ordering::Relaxed);
        }
        let since_start = now.saturating_duration_since(self.start).as_nanos();
        let since_start = u64::try_from(since_start).unwrap_or(u64::MAX);
        self.last.store(since_start, Ordering::Relaxed);
    }

    /// Whether the next one will be brief, as far as can be told.
    pub fn expected(&self, now: Instant) -> bool {
        let last = Duration::from_nanos(self.last.load(Ordering::Relaxed));
        self.run.load(Ordering::Relaxed) >= RUN
            && now.saturating_duration_since(self.start + last) < RECENT
    }
}

/// How often it is looked how busy a worker was: what it says of itself may be some milliseconds old.
const LOOK: Duration = Duration::from_millis(50);

/// A worker that had something to do for so many percent of the time has no time left, whether it ran or others kept
/// it from its processor: another worker's thread may find one that is free.
const FULL_PERCENT: u32 = 90;

/// Whether a worker has no time left, as of the last look.
#[derive(Debug)]
pub(super) struct Pressure(Mutex<Look>);

#[derive(Debug)]
struct Look {
    at: Instant,
    busy: Duration,
    is_full: bool,
}

impl Pressure {
    pub fn new(now: Instant) -> Self {
        Self(Mutex::new(Look {
            at: now,
            busy: Duration::ZERO,
            is_full: false,
        }))
    }

    /// `busy` is for how long the worker has had something to do, since some moment in the past.
    pub fn is_full(&self, now: Instant, busy: impl FnOnce() -> Duration) -> bool {
        let mut look = self.0.lock();
        let passed = now.saturating_duration_since(look.at);
        if passed >= LOOK {
            let busy = busy();
            let lately = busy.saturating_sub(look.busy);
            *look = Look {
                at: now,
                busy,
                is_full: lately * 100 >= passed * FULL_PERCENT,
            };
        }
        look.is_full
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_taken_for_brief_while_a_run_of_them_goes_on() {
        let start = Instant::now();
        let briefs = Briefs::new(start);
        for _ in 0..RUN {
            assert!(!briefs.expected(start));
            briefs.ended(BRIEF / 2, start);
        }
        assert!(briefs.expected(start));
        assert!(briefs.expected(start + RECENT / 2));
        assert!(!briefs.expected(start + RECENT), "they were, long ago");
        briefs.ended(Duration::ZERO, start + RECENT);
        assert!(briefs.expected(start + RECENT));
        briefs.ended(BRIEF, start + RECENT);
        assert!(!briefs.expected(start + RECENT), "one was not");
    }

    #[test]
    fn a_worker_is_full_when_it_was_busy_nearly_all_the_time_since_the_last_look() {
        let mut now = Instant::now();
        let pressure = Pressure::new(now);
        let unasked = || panic!("it was looked just now");
        assert!(!pressure.is_full(now + LOOK / 2, unasked));
        let mut busy = Duration::from_secs(7);
        // What was before the first look tells nothing.
        now += 1_000 * LOOK;
        assert!(!pressure.is_full(now, || busy));
        for (share, expected) in [(95, true), (50, false), (100, true), (0, false)] {
            now += LOOK;
            busy += LOOK * share / 100;
            assert_eq!(pressure.is_full(now, || busy), expected, "{share} %");
            assert_eq!(pressure.is_full(now + LOOK / 2, unasked), expected);
        }
    }
}
