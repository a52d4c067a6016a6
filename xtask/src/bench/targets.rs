//! What Undermesh is to reach, as ratios within one run.

use super::rows::{Figure, Path, Proxy};

/// What a figure is held against.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Against {
    /// The same figure of another.
    Proxy(Proxy),
    /// Nothing: the figure counts as it is.
    Itself,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Bound {
    pub fn met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
        }
    }
}

/// One thing to be reached.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Target {
    pub row: &'static str,
    pub path: Path,
    pub figure: Figure,
    pub against: Against,
    pub bound: Bound,
}

impl Target {
    /// In words, such as `>= 1.1 x envoy-tcp`.
    pub fn text(&self) -> String {
        let (sign, bound) = match self.bound {
            Bound::AtLeast(bound) => (">=", bound),
            Bound::AtMost(bound) => ("<=", bound),
        };
        // Three digits: some bounds are quotients.
        let bound = (bound * 1e3).round() / 1e3;
        match self.against {
            Against::Proxy(proxy) => format!("{sign} {bound} x {}", proxy.name()),
            Against::Itself => format!("{sign} {bound} {}", self.figure.unit()),
        }
    }
}

const fn across(row: &'static str, figure: Figure, against: Proxy, bound: Bound) -> Target {
    Target {
        row,
        path: Path::CrossNode,
        figure,
        against: Against::Proxy(against),
        bound,
    }
}

const fn alone(row: &'static str, path: Path, figure: Figure, bound: Bound) -> Target {
    Target {
        row,
        path,
        figure,
        against: Against::Itself,
        bound,
    }
}

use Bound::{AtLeast, AtMost};
use Figure::{
    CpuEach, CpuPerGib, GivenBack, Missed, P50, P99, PerConnection, Programs, Rate, Resident,
    Throughput,
};
use Path::{CrossNode, SameNode};
use Proxy::{Direct, EnvoyHbone, EnvoyHttp, EnvoyTcp};

pub const TARGETS: [Target; 22] = [
    across("bulk-1", Throughput, EnvoyTcp, AtLeast(1.10)),
    across("bulk-1", CpuPerGib, EnvoyTcp, AtMost(0.78)),
    across("bulk-8", Throughput, EnvoyTcp, AtLeast(1.15)),
    across("bulk-8", CpuPerGib, EnvoyTcp, AtMost(0.80)),
    Target {
        path: SameNode,
        ..across("bulk-1", Throughput, Direct, AtLeast(0.45))
    },
    alone("bulk-1", SameNode, CpuPerGib, AtMost(0.15)),
    across("ping-pong-1-awake", P50, EnvoyTcp, AtMost(0.95)),
    across("ping-pong-64", Rate, EnvoyHbone, AtLeast(1.0)),
    across("ping-pong-64", CpuEach, EnvoyHbone, AtMost(1.0)),
    across("connect", Rate, EnvoyTcp, AtLeast(6.0)),
    across("connect", Rate, EnvoyHbone, AtLeast(1.7)),
    alone("connect", CrossNode, CpuEach, AtMost(100.0)),
    alone("memory", CrossNode, Resident(0), AtMost(30.0)),
    alone("memory", CrossNode, PerConnection, AtMost(6.0)),
    alone("memory", CrossNode, GivenBack, AtLeast(0.5)),
    // Requests per CPU second, 1.2 times as many.
    across("http-opaque", CpuEach, EnvoyTcp, AtMost(1.0 / 1.2)),
    across("http-l7", Rate, EnvoyHttp, AtLeast(1.5)),
    across("http-l7", CpuEach, EnvoyHttp, AtMost(0.66)),
    across("http-l7-5000", P50, EnvoyHttp, AtMost(0.4)),
    across("http-l7-5000", P99, EnvoyHttp, AtMost(0.4)),
    alone("capture", SameNode, Missed, AtMost(0.0)),
    alone("capture", SameNode, Programs, AtMost(3.0)),
];

#[cfg(test)]
mod tests {
    use super::super::rows::{CAPTURE, MEMORY, MEMORY_PROXIES, ROWS};
    use super::*;

    #[test]
    fn every_target_is_of_a_load_that_is_measured_with_whom_it_is_held_against() {
        for target in TARGETS {
            let proxies = if target.row == MEMORY {
                MEMORY_PROXIES
            } else {
                let mut rows = ROWS.iter().chain([&CAPTURE]);
                rows.find(|row| row.id == target.row && row.path == target.path)
                    .unwrap()
                    .proxies
            };
            assert!(proxies.contains(&Proxy::Undermesh), "{target:?}");
            if let Against::Proxy(proxy) = target.against {
                assert!(proxies.contains(&proxy), "{target:?}");
            }
        }
    }

    #[test]
    fn a_bound_holds_up_to_its_value() {
        assert!(AtLeast(1.5).met(1.5) && !AtLeast(1.5).met(1.4));
        assert!(AtMost(0.4).met(0.4) && !AtMost(0.4).met(0.41));
    }
}
