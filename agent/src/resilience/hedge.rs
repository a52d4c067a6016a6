//! A second attempt of a read that takes too long, beside the first: whichever answers first wins,
//! the other is cancelled, which is no verdict on its endpoint. A hedge is a retry to the budget.

use std::time::Duration;

use super::validate::{Faults, Validate};

/// When a read is sent a second time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hedge {
    /// How long the first attempt may take. Range 1 ms to 60 s. A good value is the route's p95:
    /// then one request in twenty is hedged.
    pub after: Duration,
    /// The most attempts beside the first. Range 1 to 3.
    pub attempts: u32,
}

impl Validate for Hedge {
    fn check(&self, at: &str, faults: &mut Faults) {
        faults.duration(
            self.after,
            Duration::from_millis(1),
            Duration::from_secs(60),
            at,
            "after",
        );
        faults.range(self.attempts, 1, 3, at, "attempts");
    }
}
