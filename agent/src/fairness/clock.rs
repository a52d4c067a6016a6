//! The time that turns are measured by.

use std::cell::Cell;
use std::fmt;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use super::meter::Meter;

/// Tells the time that turns are measured by.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// Since some moment in the past: tells how long a task waits.
    fn now(&self) -> Duration;

    /// A turn begins on this thread: what [`Clock::took`] wants to know of it.
    fn begin(&self) -> Duration;

    /// What the turn that began then and ends now, on the same thread, has used of a processor. On a node that is short
    /// of processors a thread is interrupted for longer than it runs, which is no fault of the task that it runs then.
    fn took(&self, began: Duration) -> Duration;
}

thread_local! {
    static METER: Cell<Meter> = const { Cell::new(Meter::new()) };
}

/// The clocks of the machine.
#[derive(Debug, Default, Clone, Copy)]
pub struct MachineClock;

impl Clock for MachineClock {
    fn now(&self) -> Duration {
        read(ClockId::CLOCK_MONOTONIC)
    }

    fn begin(&self) -> Duration {
        let (now, mut meter) = (self.now(), METER.get());
        meter.begin(now, used);
        METER.set(meter);
        now
    }

    fn took(&self, began: Duration) -> Duration {
        let (now, mut meter) = (self.now(), METER.get());
        let took = meter.took(now.saturating_sub(began), now, used);
        METER.set(meter);
        took
    }
}

/// What this thread has used of a processor. A system call, unlike the time of day.
fn used() -> Duration {
    read(ClockId::CLOCK_THREAD_CPUTIME_ID)
}

/// Every Linux has both.
fn read(clock: ClockId) -> Duration {
    clock_gettime(clock).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_that_sleeps_uses_no_processor_and_one_that_works_does() {
        let clock = MachineClock;
        let began = clock.begin();
        std::thread::sleep(Duration::from_millis(50));
        assert!(clock.took(began) < (clock.now() - began) / 2);
        let (began, before) = (clock.begin(), used());
        while used() - before < Duration::from_millis(5) {
            assert!(clock.now() - began < Duration::from_secs(60));
        }
        assert!(clock.took(began) >= Duration::from_millis(5));
    }
}
