//! A pod and a listener's place, and what the kernel's maps hold of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use undermesh_common::{Address, Family, ListenerKey, ListenerKind};

use crate::mesh::Mode;

/// An enrolled pod, as the kernel knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodRecord {
    /// Cookie of its network namespace (see [`netns_cookie`](super::netns_cookie)).
    pub netns_cookie: u64,
    /// IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// IPv6 address.
    pub v6: Option<Ipv6Addr>,
    /// How it treats what the mesh cannot secure.
    pub mode: Mode,
}

/// The place of one listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ListenerSlot {
    /// Cookie of the pod's network namespace.
    pub netns_cookie: u64,
    /// Family of the socket and of the packets.
    pub family: Family,
    /// What for.
    pub kind: ListenerKind,
}

impl PodRecord {
    pub(super) fn to_kernel(&self) -> undermesh_common::Pod {
        let mode = match self.mode {
            Mode::Strict => undermesh_common::Mode::Strict,
            Mode::Permissive => undermesh_common::Mode::Permissive,
        };
        undermesh_common::Pod::new(
            self.v4.map_or(Address::NONE, Address::from),
            self.v6.map_or(Address::NONE, Address::from),
            mode,
        )
    }

    pub(super) fn from_kernel(netns_cookie: u64, pod: &undermesh_common::Pod) -> Self {
        let v4 = match IpAddr::from(pod.v4) {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(_) => None,
        };
        let v6 = match IpAddr::from(pod.v6) {
            IpAddr::V6(ip) if !ip.is_unspecified() => Some(ip),
            _ => None,
        };
        let mode = match pod.mode() {
            undermesh_common::Mode::Strict => Mode::Strict,
            undermesh_common::Mode::Permissive => Mode::Permissive,
        };
        Self {
            netns_cookie,
            v4,
            v6,
            mode,
        }
    }
}

impl ListenerSlot {
    pub(super) fn key(&self) -> ListenerKey {
        ListenerKey::new(self.netns_cookie, self.family, self.kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_the_way_through_the_kernel_form() {
        for (v4, v6, mode) in [
            (Some(Ipv4Addr::new(10, 0, 0, 2)), None, Mode::Strict),
            (None, Some(Ipv6Addr::LOCALHOST), Mode::Permissive),
        ] {
            let record = PodRecord {
                netns_cookie: 7,
                v4,
                v6,
                mode,
            };
            assert_eq!(PodRecord::from_kernel(7, &record.to_kernel()), record);
        }
    }
}
