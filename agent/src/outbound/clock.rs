//! The clock by which requests and connections are judged.

use tokio::time::Instant;

use crate::resilience::Timestamp;

/// A monotonic clock that begins with the agent. It is tokio's, so tests can hold and move it.
#[derive(Debug, Clone, Copy)]
pub struct Clock(Instant);

impl Clock {
    /// Begins now.
    #[must_use]
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// The time.
    #[must_use]
    pub fn now(self) -> Timestamp {
        self.at(Instant::now())
    }

    /// The time at a moment that was looked at already.
    #[must_use]
    pub fn at(self, moment: Instant) -> Timestamp {
        moment.saturating_duration_since(self.0).into()
    }
}
