//! What client and server of a measured load give back.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

const MOST_EXAMPLES: usize = 3;

/// Latencies in µs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Microseconds {
    /// How many there are.
    pub samples: u64,
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// 99.9th percentile: of few samples, so only for comparison with others of the same run.
    pub p999: f64,
}

/// What a client saw in its window.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LoadReport {
    /// Length of the window.
    pub seconds: f64,
    /// Round trips, connections or requests that were done in the window; connections that are open, of `hold`.
    pub operations: u64,
    /// What the server received in the window, by its own count.
    pub bytes: u64,
    /// Processor time of the watched processes in the window, of user and system.
    pub watched_cpu_seconds: f64,
    /// Of one operation; from when it was due where there is a rate.
    pub latency: Microseconds,
    /// Operations that failed, whenever they did.
    pub errors: u64,
    /// The first of these.
    pub examples: Vec<String>,
}

impl LoadReport {
    pub(super) fn fail(&mut self, error: impl ToString) {
        self.errors += 1;
        if self.examples.len() < MOST_EXAMPLES {
            self.examples.push(error.to_string());
        }
    }
}

/// What a server counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SinkReport {
    /// Connections.
    pub accepted: u64,
    /// Bytes received on connections that send in bulk.
    pub received: u64,
}

/// Longer ones count as this long: a minute, in nanoseconds.
const LONGEST: u64 = 60_000_000_000;

/// Nanoseconds, three digits exact.
#[derive(Debug)]
pub(super) struct Latencies(Histogram<u64>);

impl Latencies {
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self(Histogram::new_with_bounds(1, LONGEST, 3)?))
    }

    pub fn record(&mut self, latency: Duration) {
        self.0
            .saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
    }

    #[allow(clippy::cast_precision_loss)]
    pub fn summary(&self) -> Microseconds {
        let at = |quantile| self.0.value_at_quantile(quantile) as f64 / 1e3;
        Microseconds {
            samples: self.0.len(),
            p50: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_in_microseconds() {
        let mut latencies = Latencies::new().unwrap();
        for micros in 1..=1000 {
            latencies.record(Duration::from_micros(micros));
        }
        let summary = latencies.summary();
        assert_eq!(summary.samples, 1000);
        assert!((summary.p50 - 500.0).abs() < 2.0, "{summary:?}");
        assert!((summary.p99 - 990.0).abs() < 2.0, "{summary:?}");
    }
}
