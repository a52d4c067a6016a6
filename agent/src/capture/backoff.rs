//! How long to wait before something that failed is tried again.

use std::time::Duration;

/// Exponential, jittered, capped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// After the first failure.
    pub first: Duration,
    /// At most.
    pub most: Duration,
}

impl Backoff {
    /// The wait after so many failures in a row. `jitter` is from 0 to 1: the wait is between half
    /// and the whole of what the failures ask for, so that pods that failed together do not return
    /// together.
    #[must_use]
    pub fn wait(&self, failures: u32, jitter: f64) -> Duration {
        let doublings = failures.saturating_sub(1).min(20);
        let whole = self.first.saturating_mul(1 << doublings).min(self.most);
        whole.mul_f64(0.5 + 0.5 * jitter.clamp(0.0, 1.0))
    }
}

/// A period, spread by a fifth to both sides. `jitter` is from 0 to 1.
#[must_use]
pub fn spread(period: Duration, jitter: f64) -> Duration {
    period.mul_f64(0.8 + 0.4 * jitter.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BACKOFF: Backoff = Backoff {
        first: Duration::from_millis(200),
        most: Duration::from_secs(30),
    };

    #[test]
    fn waits_double_up_to_the_cap() {
        let waits: Vec<u64> = (1..=10)
            .map(|failures| BACKOFF.wait(failures, 1.0).as_millis() as u64)
            .collect();
        assert_eq!(
            waits,
            [200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000, 30000]
        );
    }

    proptest! {
        #[test]
        fn no_wait_is_shorter_than_half_the_first_or_longer_than_the_cap(
            failures in 0_u32..,
            jitter in -1.0_f64..2.0,
        ) {
            let wait = BACKOFF.wait(failures, jitter);
            prop_assert!(wait >= BACKOFF.first / 2 && wait <= BACKOFF.most);
        }
    }
}
