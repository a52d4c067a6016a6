//! The time that turns are measured by.

use std::fmt;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

/// Tells the time that turns are measured by.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// Since some moment in the past: tells how long a task waits.
    fn now(&self) -> Duration;

    /// What this thread has used of a processor: tells what a turn takes. On a node that is short of processors a
    /// thread is interrupted for longer than it runs, which is no fault of the task that it runs then.
    fn used(&self) -> Duration;
}

/// The clocks of the machine.
#[derive(Debug)]
pub struct MachineClock(Instant);

impl Default for MachineClock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for MachineClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn used(&self) -> Duration {
        // Every Linux has that clock.
        clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or_else(|_| self.now(), Duration::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_sleeps_uses_no_processor_and_one_that_works_does() {
        let clock = MachineClock::default();
        let before = (clock.now(), clock.used());
        std::thread::sleep(Duration::from_millis(50));
        let slept = clock.now() - before.0;
        assert!(slept >= Duration::from_millis(50));
        assert!(clock.used() - before.1 < slept / 2);
        let before = clock.used();
        while clock.used() - before < Duration::from_millis(5) {
            assert!(clock.now() < Duration::from_secs(60));
        }
    }
}
