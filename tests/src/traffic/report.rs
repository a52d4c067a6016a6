//! What the traffic program counted.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Distinct peers and local addresses that a report names; more are in the totals only.
const MOST_ADDRESSES: usize = 4096;
/// Errors that a report quotes.
const MOST_EXAMPLES: usize = 10;

/// Why a connection did not do what it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    /// ECONNREFUSED.
    Refused,
    /// ECONNRESET, EPIPE or ECONNABORTED: an end that says that it is not one.
    Reset,
    /// The connection's time was up, or the kernel's.
    Timeout,
    /// An orderly end before all bytes had come: the worst, as it looks like success.
    Truncated,
    /// Wrong bytes.
    Mismatch,
    /// No route, no address to come from, or prohibited.
    Unreachable,
    /// Anything else.
    Other,
}

impl From<&io::Error> for Failure {
    fn from(error: &io::Error) -> Self {
        use io::ErrorKind as K;
        match error.kind() {
            K::ConnectionRefused => Self::Refused,
            // The last: it was reset before the client came to ask for its addresses.
            K::ConnectionReset | K::BrokenPipe | K::ConnectionAborted | K::NotConnected => {
                Self::Reset
            }
            K::TimedOut => Self::Timeout,
            K::UnexpectedEof => Self::Truncated,
            K::InvalidData => Self::Mismatch,
            // The last: no own address for a destination of this family.
            K::HostUnreachable
            | K::NetworkUnreachable
            | K::PermissionDenied
            | K::AddrNotAvailable => Self::Unreachable,
            _ => Self::Other,
        }
    }
}

/// Quantiles of a latency, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Latency {
    /// How many were measured.
    pub samples: u64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Longest.
    pub max: f64,
}

/// Collects latencies, 1 µs to 10 min, to three digits.
#[derive(Debug)]
pub struct Latencies(Option<Histogram<u64>>);

impl Default for Latencies {
    fn default() -> Self {
        // Bounds that cannot be wrong; were they, there would be no latencies, not a crash.
        Self(Histogram::new_with_bounds(1, 600_000_000, 3).ok())
    }
}

impl Latencies {
    /// Adds one; longer ones count as 10 min.
    pub fn record(&mut self, duration: Duration) {
        if let Some(histogram) = &mut self.0 {
            histogram.saturating_record(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX));
        }
    }

    /// The quantiles.
    #[must_use]
    pub fn summary(&self) -> Latency {
        let Some(histogram) = self.0.as_ref().filter(|histogram| !histogram.is_empty()) else {
            return Latency::default();
        };
        let at = |quantile| Duration::from_micros(histogram.value_at_quantile(quantile));
        let milliseconds = |duration: Duration| duration.as_secs_f64() * 1e3;
        Latency {
            samples: histogram.len(),
            p50: milliseconds(at(0.5)),
            p90: milliseconds(at(0.9)),
            p99: milliseconds(at(0.99)),
            max: milliseconds(Duration::from_micros(histogram.max())),
        }
    }
}

/// What clients saw.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct ClientReport {
    /// connect(2) calls.
    pub attempted: u64,
    /// Those that succeeded.
    pub opened: u64,
    /// Connections that did all they should.
    pub ok: u64,
    /// Connections that did not.
    pub failed: u64,
    /// Those by reason.
    pub failures: BTreeMap<Failure, u64>,
    /// The first errors, in words.
    pub examples: Vec<String>,
    /// Payload bytes sent.
    pub bytes_sent: u64,
    /// Payload bytes received and found right.
    pub bytes_received: u64,
    /// Time of connect(2).
    pub connect: Latency,
    /// Time of a round trip.
    pub operation: Latency,
    /// Own addresses, as getsockname gave them after connect.
    pub locals: BTreeMap<IpAddr, u64>,
    /// Peers, as getpeername gave them after connect.
    pub peers: BTreeMap<SocketAddr, u64>,
    /// Connections whose server sees the client itself (`--kind origin`).
    #[serde(default)]
    pub direct: u64,
    /// Connections whose server sees another port than the client's.
    #[serde(default)]
    pub proxied: u64,
    /// Longest time between two successes, in milliseconds.
    #[serde(default)]
    pub longest_gap_ms: u64,
    /// Whether it is over.
    pub finished: bool,
}

impl ClientReport {
    /// Connections that failed for `reason`.
    #[must_use]
    pub fn failed_by(&self, reason: Failure) -> u64 {
        self.failures.get(&reason).copied().unwrap_or(0)
    }

    pub(super) fn fail(&mut self, reason: Failure, text: String) {
        self.failed += 1;
        *self.failures.entry(reason).or_default() += 1;
        if self.examples.len() < MOST_EXAMPLES {
            self.examples.push(text);
        }
    }

    pub(super) fn connected(&mut self, local: IpAddr, peer: SocketAddr) {
        self.opened += 1;
        count(&mut self.locals, local);
        count(&mut self.peers, peer);
    }
}

/// What servers saw.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ServerReport {
    /// Connections accepted.
    pub accepted: u64,
    /// Of these, open now.
    pub open: u64,
    /// Ended in order, by both sides.
    pub completed: u64,
    /// Ended otherwise.
    pub failures: BTreeMap<Failure, u64>,
    /// Bytes received.
    pub bytes_received: u64,
    /// Bytes sent.
    pub bytes_sent: u64,
    /// Peers' addresses, as accept(2) gave them.
    pub peers: BTreeMap<IpAddr, u64>,
    /// Own addresses, as getsockname gave them.
    pub locals: BTreeMap<SocketAddr, u64>,
    /// Connections that come from the client itself (`--origin`).
    #[serde(default)]
    pub direct: u64,
    /// Connections that come from another port than the client's.
    #[serde(default)]
    pub proxied: u64,
    /// UDP datagrams received.
    pub datagrams: u64,
}

impl ServerReport {
    /// Connections that came from `peer`.
    #[must_use]
    pub fn accepted_from(&self, peer: IpAddr) -> u64 {
        self.peers.get(&peer).copied().unwrap_or(0)
    }

    pub(super) fn accept(&mut self, peer: SocketAddr, local: SocketAddr) {
        self.accepted += 1;
        self.open += 1;
        count(&mut self.peers, peer.ip().to_canonical());
        count(
            &mut self.locals,
            SocketAddr::new(local.ip().to_canonical(), local.port()),
        );
    }

    pub(super) fn end(&mut self, end: io::Result<()>) {
        self.open = self.open.saturating_sub(1);
        match end {
            Ok(()) => self.completed += 1,
            Err(error) => *self.failures.entry(Failure::from(&error)).or_default() += 1,
        }
    }
}

/// Bounded: addresses beyond the bound are not named (the totals still count their connections).
fn count<K: Ord>(map: &mut BTreeMap<K, u64>, key: K) {
    if let Some(value) = map.get_mut(&key) {
        *value += 1;
    } else if map.len() < MOST_ADDRESSES {
        map.insert(key, 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_survive_json() {
        let mut report = ClientReport::default();
        report.connected("10.0.0.1".parse().unwrap(), "[::1]:80".parse().unwrap());
        report.fail(Failure::Truncated, "short".into());
        let text = serde_json::to_string(&report).unwrap();
        assert!(text.contains(r#""failures":{"truncated":1}"#), "{text}");
        assert_eq!(serde_json::from_str::<ClientReport>(&text).unwrap(), report);
    }

    #[test]
    fn a_mapped_peer_counts_as_ipv4() {
        let mut report = ServerReport::default();
        report.accept(
            "[::ffff:10.0.0.9]:1".parse().unwrap(),
            "[::]:2".parse().unwrap(),
        );
        assert_eq!(report.accepted_from("10.0.0.9".parse().unwrap()), 1);
        report.end(Err(io::ErrorKind::ConnectionReset.into()));
        assert_eq!(report.failures[&Failure::Reset], 1);
        assert_eq!(report.open, 0);
    }
}
