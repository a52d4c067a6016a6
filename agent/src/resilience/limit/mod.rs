//! Limits: how often, how many at once, how long in a queue, and whose turn it is.
//!
//! Each says on which side it runs. A limit at the source holds per node, so the destination sees
//! the limit times the number of nodes; one at the destination holds for all who ask.

use super::validate::{Faults, Validate, join};

mod adaptive;
mod codel;
mod concurrency;
mod fair;
mod rate;
mod rates;

pub use adaptive::{AdaptiveLimit, AdaptiveSettings};
pub use codel::{CodelQueue, CodelSettings, Popped};
pub use concurrency::{ConcurrencyLimit, Full, Slot};
pub use fair::{FairQueue, FairSettings, Refused};
pub use rate::{Rate, RateExceeded, RateLimit};
pub use rates::{Axis, Limited, Rates, RatesSettings};

/// The limits of a (destination, route).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LimitSettings {
    /// How often. Default no limit. At the source.
    pub rates: RatesSettings,
    /// How many requests at once. Default no limit. At the source; at the limit a request is shed.
    pub concurrency: Option<u32>,
    /// The same, found by measuring. Default off. At the destination, where the latency is.
    pub adaptive: Option<AdaptiveSettings>,
}

impl Validate for LimitSettings {
    fn check(&self, at: &str, faults: &mut Faults) {
        self.rates.check(&join(at, "rates"), faults);
        faults.range(
            self.concurrency.unwrap_or(1),
            1,
            1_000_000,
            at,
            "concurrency",
        );
        if let Some(adaptive) = &self.adaptive {
            adaptive.check(&join(at, "adaptive"), faults);
        }
    }
}
