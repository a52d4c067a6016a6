//! Which endpoint the next attempt goes to.
//!
//! The set of endpoints is persistent: a change shares all that it does not touch, so an update is
//! O(log n), and a pick reads one immutable set without a lock. P2C, least request, round robin and
//! weighted choose in O(1), Maglev too, the ring in O(log n). Maglev's table is built anew with each
//! change: O(table), off the path of requests.

use super::validate::{Faults, Validate};
use std::time::Duration;

mod choose;
pub(super) mod ewma;
mod hash;
mod maglev;
mod ring;
mod set;
#[cfg(test)]
#[cfg(not(loom))]
mod tests;
mod weights;

pub(super) use choose::{Chooser, Wish};
pub(super) use set::Set;

/// How an endpoint is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Algorithm {
    /// The better of two at random, by peak-EWMA latency times requests in flight.
    #[default]
    PeakEwma,
    /// The better of two at random, by requests in flight.
    LeastRequest,
    /// One after the other; weights do not count.
    RoundRobin,
    /// At random, in proportion to weight.
    Weighted,
    /// Consistent hashing on a ring, with bounded load.
    RingHash,
    /// Consistent hashing by Maglev's table, with bounded load.
    Maglev,
}

/// How a destination is balanced. Runs at the source.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BalanceSettings {
    /// Default P2C by peak-EWMA.
    pub algorithm: Algorithm,
    /// A new or returned endpoint warms up over this time. Range 0 (off) to 1 h, default 10 s.
    pub slow_start: Duration,
    /// What a cold endpoint gets at first, relative to a warm one. Range 0.01 to 1, default 0.1.
    pub slow_start_minimum: f64,
    /// A tier keeps its traffic until less than `1 / overprovisioning` of it stands, then the rest
    /// overflows to the next. Range 1 to 10, default 1.4 (Envoy's).
    pub overprovisioning: f64,
    /// Hashing: no endpoint takes more than this many times the mean load. Range 1.05 to 10,
    /// default 1.25.
    pub bounded_load: f64,
    /// Ring: points per endpoint and unit of weight. Range 1 to 1,024, default 64.
    pub ring_points: u32,
    /// Maglev: entries in the table, made a prime. Range 13 to 5,000,011, default 65,537.
    pub maglev_table: u32,
}

impl Default for BalanceSettings {
    fn default() -> Self {
        Self {
            algorithm: Algorithm::default(),
            slow_start: Duration::from_secs(10),
            slow_start_minimum: 0.1,
            overprovisioning: 1.4,
            bounded_load: 1.25,
            ring_points: 64,
            maglev_table: 65_537,
        }
    }
}

impl Validate for BalanceSettings {
    fn check(&self, at: &str, faults: &mut Faults) {
        faults.duration(
            self.slow_start,
            Duration::ZERO,
            Duration::from_secs(3600),
            at,
            "slowStart",
        );
        faults.range(self.slow_start_minimum, 0.01, 1.0, at, "slowStartMinimum");
        faults.range(self.overprovisioning, 1.0, 10.0, at, "overprovisioning");
        faults.range(self.bounded_load, 1.05, 10.0, at, "boundedLoad");
        faults.range(self.ring_points, 1, 1024, at, "ringPoints");
        faults.range(self.maglev_table, 13, 5_000_011, at, "maglevTable");
    }
}
