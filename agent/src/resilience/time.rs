//! Time as this module sees it: a number that the caller passes in.

use std::ops::Add;
use std::time::Duration;

use serde::Serialize;

/// A moment on a monotonic clock whose zero the caller chooses (usually the start of the process).
///
/// Resolution one nanosecond, range 584 years. It fits an atomic, which `std::time::Instant` does not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Timestamp(u64);

impl Timestamp {
    /// The clock's zero.
    pub const ZERO: Self = Self(0);
    /// Later than any moment: "not planned".
    pub const NEVER: Self = Self(u64::MAX);

    /// The moment this many nanoseconds after zero.
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since zero.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// How long after `earlier` this is; zero when it is not after it, as two workers may read the
    /// clock in one order and arrive in the other.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Timestamp {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(nanos(duration)))
    }
}

impl From<Duration> for Timestamp {
    fn from(since_zero: Duration) -> Self {
        Self(nanos(since_zero))
    }
}

/// A duration as nanoseconds, saturating at 584 years.
pub(super) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
