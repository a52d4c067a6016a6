//! Connections that pass the mesh by: opened by an enrolled pod, not captured, not to itself.

use crate::Address;

/// Where such a connection goes.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DestinationClass {
    /// A destination of the mesh: the agent was not there, and the pod is permissive, or has no
    /// address of the family.
    Mesh = 0,
    /// 169.254.0.0/16 and fe80::/10: metadata services, a name server on the node.
    LinkLocal = 1,
    /// An address of the node itself, outside of its pods.
    Node = 2,
    /// 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16 (RFC 1918), 100.64.0.0/10 (RFC 6598), fc00::/7
    /// (RFC 4193): pods outside of the mesh, Services without one of its pods, other networks of
    /// the organisation.
    Private = 3,
    /// Everything else.
    Public = 4,
}

impl DestinationClass {
    /// Every class, in the order of its number.
    pub const ALL: [Self; 5] = [
        Self::Mesh,
        Self::LinkLocal,
        Self::Node,
        Self::Private,
        Self::Public,
    ];

    /// Value of the label `destination_class`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mesh => "mesh",
            Self::LinkLocal => "link_local",
            Self::Node => "node",
            Self::Private => "private",
            Self::Public => "public",
        }
    }

    /// The first that fits, in the order of their numbers.
    #[inline(always)]
    pub fn of(
        address: &Address,
        is_mesh: impl FnOnce() -> bool,
        is_node: impl FnOnce() -> bool,
    ) -> Self {
        if is_mesh() {
            Self::Mesh
        } else if address.is_link_local() {
            Self::LinkLocal
        } else if is_node() {
            Self::Node
        } else if address.is_private() {
            Self::Private
        } else {
            Self::Public
        }
    }
}

/// Key of the map of native traffic.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NativeKey {
    /// Cookie of the pod's network namespace.
    pub netns_cookie: u64,
    /// [`DestinationClass`] as number.
    pub class: u32,
    /// Always 0.
    pub reserved: u32,
}

impl NativeKey {
    /// The key of one class of one pod.
    #[inline(always)]
    #[must_use]
    pub const fn new(netns_cookie: u64, class: u32) -> Self {
        Self {
            netns_cookie,
            class,
            reserved: 0,
        }
    }
}

/// In the storage of a socket from its SYN until it is closed.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NativeConnection {
    /// When its SYN was sent, in nanoseconds of the monotonic clock.
    pub opened: u64,
    /// [`DestinationClass`] as number, as it was then.
    pub class: u32,
    /// Always 0.
    pub reserved: u32,
}

/// What native connections carried in all, added when they are closed. Value of a per-CPU map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NativeTraffic {
    /// Connections that were closed, also those that never stood.
    pub connections: u64,
    /// Those that never stood.
    pub failed: u64,
    /// Bytes that the pod sent and the peers acknowledged; as in the kernel's own counter, a FIN is
    /// one.
    pub from_pod_bytes: u64,
    /// Bytes that the peers sent; a FIN is one here too.
    pub to_pod_bytes: u64,
    /// Segments that the pod sent again, SYNs too.
    pub retransmits: u64,
    /// Sum of the connections' last smoothed round-trip times, in microseconds.
    pub rtt_sum: u64,
    /// Connections that had one.
    pub rtt_samples: u64,
    /// Sum of the times from the SYN to the end, in nanoseconds.
    pub duration_sum: u64,
}

impl NativeTraffic {
    /// Adds what another CPU counted.
    pub fn add(&mut self, other: &Self) {
        self.connections += other.connections;
        self.failed += other.failed;
        self.from_pod_bytes += other.from_pod_bytes;
        self.to_pod_bytes += other.to_pod_bytes;
        self.retransmits += other.retransmits;
        self.rtt_sum += other.rtt_sum;
        self.rtt_samples += other.rtt_samples;
        self.duration_sum += other.duration_sum;
    }
}

#[cfg(feature = "user")]
mod plain {
    #![allow(unsafe_code)]
    use super::{NativeKey, NativeTraffic};

    // SAFETY: repr(C), integers only, no padding (see the test of sizes in `layout`).
    unsafe impl aya::Pod for NativeKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for NativeTraffic {}
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    fn class(text: &str) -> DestinationClass {
        let address = text.parse::<IpAddr>().unwrap().into();
        DestinationClass::of(&address, || false, || false)
    }

    #[test]
    fn addresses_have_the_class_of_their_range_up_to_its_edges() {
        for (text, expected) in [
            ("169.254.169.254", DestinationClass::LinkLocal),
            ("169.253.255.255", DestinationClass::Public),
            ("169.255.0.0", DestinationClass::Public),
            ("fe80::1", DestinationClass::LinkLocal),
            ("febf::1", DestinationClass::LinkLocal),
            ("fec0::1", DestinationClass::Public),
            ("10.0.0.1", DestinationClass::Private),
            ("9.255.255.255", DestinationClass::Public),
            ("11.0.0.0", DestinationClass::Public),
            ("172.16.0.0", DestinationClass::Private),
            ("172.31.255.255", DestinationClass::Private),
            ("172.15.255.255", DestinationClass::Public),
            ("172.32.0.0", DestinationClass::Public),
            ("192.168.0.1", DestinationClass::Private),
            ("192.169.0.0", DestinationClass::Public),
            ("100.64.0.0", DestinationClass::Private),
            ("100.127.255.255", DestinationClass::Private),
            ("100.63.255.255", DestinationClass::Public),
            ("100.128.0.0", DestinationClass::Public),
            ("::ffff:10.0.0.1", DestinationClass::Private),
            ("fc00::1", DestinationClass::Private),
            ("fdff::1", DestinationClass::Private),
            ("fbff::1", DestinationClass::Public),
            ("fe00::1", DestinationClass::Public),
            ("2001:db8::1", DestinationClass::Public),
            ("8.8.8.8", DestinationClass::Public),
        ] {
            assert_eq!(class(text), expected, "{text}");
        }
    }

    #[test]
    fn the_mesh_goes_before_all_ranges_and_the_node_before_private_ones() {
        let address = |text: &str| text.parse::<IpAddr>().unwrap().into();
        let of = |text: &str, mesh, node| DestinationClass::of(&address(text), || mesh, || node);
        assert_eq!(of("10.0.0.1", true, true), DestinationClass::Mesh);
        assert_eq!(of("10.0.0.1", false, true), DestinationClass::Node);
        assert_eq!(of("8.8.8.8", false, true), DestinationClass::Node);
        assert_eq!(of("fe80::1", false, true), DestinationClass::LinkLocal);
    }

    #[test]
    fn numbers_are_indexes() {
        for (index, class) in DestinationClass::ALL.into_iter().enumerate() {
            assert_eq!(class as usize, index);
        }
    }
}
