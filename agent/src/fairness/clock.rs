//! The time that turns are measured by.

use std::fmt;
use std::time::{Duration, Instant};

/// Tells the time that turns are measured by.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// Since some moment in the past.
    fn now(&self) -> Duration;
}

/// The monotonic clock of the machine.
#[derive(Debug)]
pub struct Monotonic(Instant);

impl Default for Monotonic {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for Monotonic {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}
