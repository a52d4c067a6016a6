//! Waiting longer each time, and not all at the same time.

use std::time::Duration;

use rand::Rng;

use super::time::nanos;
use super::validate::{Faults, Validate};

/// An exponential wait: `base` doubled with each round, at most `cap`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Backoff {
    /// The first wait. Range 1 ms to 1 h.
    pub base: Duration,
    /// The longest wait. Range `base` to 24 h.
    pub cap: Duration,
    /// How much of a wait is left to chance, from 0 (none) to 1 (all of it: "full jitter").
    pub jitter: f64,
}

impl Backoff {
    /// The wait of a round, counted from 0: somewhere from `(1 - jitter)` of the nominal wait to
    /// all of it.
    pub fn wait(&self, round: u32, rng: &mut (impl Rng + ?Sized)) -> Duration {
        let nominal = self.nominal(round);
        nominal.mul_f64(1.0 - self.jitter * rng.random::<f64>())
    }

    /// The same, for a place that has no dice at hand: the chance is drawn from a seed.
    pub(super) fn wait_seeded(&self, round: u32, seed: u64) -> Duration {
        // The top 53 bits are what an f64 holds exactly.
        let chance = (mix(seed) >> 11) as f64 / (1u64 << 53) as f64;
        self.nominal(round).mul_f64(1.0 - self.jitter * chance)
    }

    /// The wait of a round before jitter.
    pub fn nominal(&self, round: u32) -> Duration {
        let factor = 1u64.checked_shl(round).unwrap_or(u64::MAX);
        Duration::from_nanos(nanos(self.base).saturating_mul(factor)).min(self.cap)
    }
}

impl Validate for Backoff {
    fn check(&self, at: &str, faults: &mut Faults) {
        const HOUR: Duration = Duration::from_secs(3600);
        faults.duration(self.base, Duration::from_millis(1), HOUR, at, "base");
        faults.duration(self.cap, self.base, 24 * HOUR, at, "cap");
        faults.share(self.jitter, at, "jitter");
    }
}

/// SplitMix64's finalizer (Steele, Lea, Flood 2014): every bit of the input moves every bit of the
/// output.
pub(super) const fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    #[test]
    fn waits_double_to_the_cap_and_never_overflow() {
        let backoff = Backoff {
            base: Duration::from_millis(25),
            cap: Duration::from_millis(250),
            jitter: 0.0,
        };
        let mut rng = SmallRng::seed_from_u64(1);
        let waits: Vec<u128> = [0, 1, 2, 3, 4, 63, 64, u32::MAX]
            .map(|n| backoff.wait(n, &mut rng).as_millis())
            .into();
        assert_eq!(waits, [25, 50, 100, 200, 250, 250, 250, 250]);
    }

    #[test]
    fn full_jitter_spreads_waits_over_the_whole_range() {
        let backoff = Backoff {
            base: Duration::from_millis(100),
            cap: Duration::from_millis(100),
            jitter: 1.0,
        };
        let mut rng = SmallRng::seed_from_u64(1);
        let waits: Vec<Duration> = (0..1000).map(|_| backoff.wait(0, &mut rng)).collect();
        assert!(waits.iter().any(|wait| wait.as_millis() < 5));
        assert!(waits.iter().any(|wait| wait.as_millis() > 95));
        let seeded: Vec<Duration> = (0..1000).map(|n| backoff.wait_seeded(0, n)).collect();
        assert!(seeded.iter().any(|wait| wait.as_millis() < 5));
        assert!(seeded.iter().any(|wait| wait.as_millis() > 95));
    }
}
