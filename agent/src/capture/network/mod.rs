//! The rule and the routes that lead marked connections of a pod over lo, in the pod's namespace.
//!
//! One rule, before all but `local`, sends the mark to a table of ours, and there
//! `local default dev lo src <pod IP> metric 1` catches everything, and
//! `local default dev <eth0> src <pod IP> metric 2` what is bound to the pod's device. A second
//! table, which no rule names, holds the kernel settings from before enrolment: it outlives the
//! agent and dies with the pod.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use rtnetlink::packet_route::AddressFamily;
use thiserror::Error;

use super::netns::NetnsError;

mod messages;
mod netlink;

pub use netlink::Network;

/// The table that marked connections are routed by.
pub const TABLE: u32 = 30_061;
/// The table that only holds the note of former kernel settings.
const NOTE_TABLE: u32 = TABLE + 1;
/// After `local` (0), before everything else.
const PRIORITY: u32 = 1;
/// lo is the first device of every namespace.
const LO: u32 = 1;

/// Why the network of a pod could not be read or changed.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The kernel refused a request.
    #[error("cannot {what}")]
    Request {
        /// What was asked for.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The netlink connection broke.
    #[error("netlink: {0}")]
    Netlink(String),
}

/// Something that capture needs in the pod's network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Entry {
    /// The rule for the mark.
    Rule(IpVersion),
    /// A route of [`TABLE`].
    Route {
        /// Index of its device.
        device: u32,
        /// Metric.
        metric: u32,
        /// The address that an unbound socket gets.
        source: IpAddr,
    },
    /// A rule or route in our table that is not as it should be.
    Other(IpVersion),
}

/// IPv4 or IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum IpVersion {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpVersion {
    fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    fn family(self) -> AddressFamily {
        match self {
            Self::V4 => AddressFamily::Inet,
            Self::V6 => AddressFamily::Inet6,
        }
    }
}

/// An address of the pod, and the device that has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceAddress {
    /// The address.
    pub address: IpAddr,
    /// Index of the device.
    pub device: u32,
}

/// A device in the pod's namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether it is switched on.
    pub is_up: bool,
    /// Whether it is `lo`.
    pub is_loopback: bool,
}

/// What a pod with these addresses needs.
#[must_use]
pub fn needed(addresses: &[DeviceAddress]) -> BTreeSet<Entry> {
    addresses
        .iter()
        .flat_map(|&DeviceAddress { address, device }| {
            let route = |device, metric| Entry::Route {
                device,
                metric,
                source: address,
            };
            [
                route(LO, 1),
                route(device, 2),
                Entry::Rule(IpVersion::of(address)),
            ]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn pod() -> Vec<DeviceAddress> {
        ["10.0.0.5", "fd00::5"]
            .into_iter()
            .map(|address| DeviceAddress {
                address: address.parse().unwrap(),
                device: 7,
            })
            .collect()
    }

    #[test]
    fn each_family_needs_its_rule_and_a_route_over_lo_and_one_over_its_device() {
        let needed = needed(&pod());
        assert_eq!(needed.len(), 6);
        for address in pod() {
            for (device, metric) in [(1, 1), (7, 2)] {
                assert!(needed.contains(&Entry::Route {
                    device,
                    metric,
                    source: address.address
                }));
            }
        }
    }
}
