//! What turns use of a processor, by two clocks: the machine's, which costs nothing to read, and the thread's, which
//! costs a system call. Pure: readings in, answers out.

use std::time::Duration;

/// A turn that was over within this was not interrupted, or not for long. Most are over far sooner.
const SHORT: Duration = Duration::from_micros(50);

/// What a thread had used is known no worse than this: the runtime's own work since then counts as the turn's.
const FRESH: Duration = Duration::from_micros(200);

/// Measures the turns of one thread.
#[derive(Debug, Clone, Copy)]
pub(super) struct Meter {
    /// When the thread's clock was read last; never, if at the beginning of all time.
    at: Duration,
    /// What it said.
    used: Duration,
    /// What turns took since then.
    turns: Duration,
}

impl Meter {
    pub const fn new() -> Self {
        Self {
            at: Duration::ZERO,
            used: Duration::ZERO,
            turns: Duration::ZERO,
        }
    }

    /// A turn begins now.
    pub fn begin(&mut self, now: Duration, used: impl FnOnce() -> Duration) {
        if now.saturating_sub(self.at) > FRESH {
            self.look(now, used());
        }
    }

    /// A turn ends now, which was begun so long ago: what it used.
    pub fn took(
        &mut self,
        passed: Duration,
        now: Duration,
        used: impl FnOnce() -> Duration,
    ) -> Duration {
        if passed <= SHORT {
            self.turns += passed;
            return passed;
        }
        let used = used();
        let since = used.saturating_sub(self.used).saturating_sub(self.turns);
        self.look(now, used);
        passed.min(since)
    }

    fn look(&mut self, now: Duration, used: Duration) {
        *self = Self {
            at: now,
            used,
            turns: Duration::ZERO,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thread's two clocks.
    struct Thread {
        meter: Meter,
        now: Duration,
        used: Duration,
        looks: u32,
    }

    const fn micros(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    impl Thread {
        fn begin() -> Self {
            Self {
                meter: Meter::new(),
                now: Duration::from_secs(1_000),
                used: Duration::from_secs(7),
                looks: 0,
            }
        }

        /// Runs, and is kept from its processor.
        fn run(&mut self, runs: Duration, waits: Duration) {
            self.used += runs;
            self.now += runs + waits;
        }

        /// A turn does so: what is reckoned for it.
        fn turn(&mut self, runs: Duration, waits: Duration) -> Duration {
            let (looks, used) = (&mut self.looks, self.used);
            let mut look = |used| {
                *looks += 1;
                used
            };
            self.meter.begin(self.now, || look(used));
            let passed = runs + waits;
            self.now += passed;
            self.used += runs;
            let used = self.used;
            self.meter.took(passed, self.now, || look(used))
        }
    }

    #[test]
    fn short_turns_take_what_passed_and_the_threads_clock_is_read_once_for_many() {
        let mut thread = Thread::begin();
        for _ in 0..1_000 {
            assert_eq!(thread.turn(micros(10), micros(0)), micros(10));
            thread.run(micros(1), micros(0));
        }
        assert!((40..=60).contains(&thread.looks), "{}", thread.looks);
    }

    #[test]
    fn a_turn_is_not_charged_for_being_interrupted() {
        let mut thread = Thread::begin();
        assert_eq!(thread.turn(micros(12), micros(4_000)), micros(12));
        // Nor for what turns before it used.
        for _ in 0..8 {
            assert_eq!(thread.turn(micros(20), micros(0)), micros(20));
        }
        assert_eq!(thread.turn(micros(12), micros(4_000)), micros(12));
        // And at most for a little of the runtime's own work.
        thread.run(FRESH / 2, micros(0));
        let took = thread.turn(micros(12), micros(4_000));
        assert_eq!(took, micros(12) + FRESH / 2);
        thread.run(FRESH * 2, micros(0));
        assert_eq!(thread.turn(micros(12), micros(4_000)), micros(12));
    }

    #[test]
    fn a_long_turn_is_charged_for_all_that_it_used() {
        let mut thread = Thread::begin();
        for _ in 0..10 {
            assert_eq!(thread.turn(micros(900), micros(0)), micros(900));
            assert_eq!(thread.turn(micros(900), micros(300)), micros(900));
            assert_eq!(thread.turn(micros(30), micros(0)), micros(30));
        }
    }
}
