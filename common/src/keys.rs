//! Keys and values of the maps.

use crate::{Address, Family};

/// Which of a pod's three listeners.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ListenerKind {
    /// Connections that the pod opens to the mesh.
    Outbound = 0,
    /// Plaintext connections that come from outside the pod.
    Inbound = 1,
    /// Tunnels to [`crate::HBONE_PORT`].
    Hbone = 2,
}

/// Key of the listener map, a SockHash: its entries vanish with their sockets, so a lookup says
/// whether the agent is alive at that moment.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ListenerKey {
    /// Cookie of the pod's network namespace.
    pub netns_cookie: u64,
    /// [`Family`] as number.
    pub family: u32,
    /// [`ListenerKind`] as number.
    pub kind: u32,
}

impl ListenerKey {
    /// The key of one listener.
    #[inline(always)]
    #[must_use]
    pub const fn new(netns_cookie: u64, family: Family, kind: ListenerKind) -> Self {
        Self {
            netns_cookie,
            family: family as u32,
            kind: kind as u32,
        }
    }
}

/// Key of the mesh map: an address and a port, or all ports.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Target {
    /// Service address or pod address.
    pub address: Address,
    /// Port in host order; 0 is every port.
    pub port: u32,
}

/// A TCP connection as the kernel sees it from its client's side. Key of the admission map.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tuple {
    /// Address of the client.
    pub source: Address,
    /// Address of the server.
    pub destination: Address,
    /// Port of the client, host order.
    pub source_port: u16,
    /// Port of the server, host order.
    pub destination_port: u16,
}

/// Value of the admission map.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    /// The socket that published it: only its end removes the entry.
    pub socket_cookie: u64,
    /// Network namespace of that socket.
    pub netns_cookie: u64,
    /// Network namespace in which its SYN was let through, 0 before: an address may belong to another
    /// pod by the time that a connection is opened to it.
    pub arrived_in: u64,
    /// [`Scope`] as number.
    pub scope: u32,
    /// Always 0: no byte of a map value is undefined.
    pub reserved: u32,
}

/// Over which way an admitted connection may arrive. Without it a stranger who guesses the tuple
/// of a delivery could send its SYN through the network and pass.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// From another network namespace: not over `lo`.
    Network = 0,
    /// Opened in the pod's own network namespace (the agent delivers to the app): only over `lo`, and only there.
    Loopback = 1,
}

impl Admission {
    /// Whether a SYN that arrives in this network namespace, over `lo` or not, is the admitted one.
    #[inline(always)]
    #[must_use]
    pub const fn covers(&self, netns_cookie: u64, over_loopback: bool) -> bool {
        if self.scope == Scope::Loopback as u32 {
            over_loopback && self.netns_cookie == netns_cookie
        } else {
            !over_loopback
        }
    }
}

#[cfg(feature = "user")]
mod plain {
    #![allow(unsafe_code)]
    use super::{Admission, ListenerKey, Target, Tuple};

    // SAFETY: repr(C), integers only, no padding (see the test of sizes in `layout`).
    unsafe impl aya::Pod for ListenerKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Target {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Tuple {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Admission {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(scope: Scope) -> Admission {
        Admission {
            socket_cookie: 1,
            netns_cookie: 7,
            arrived_in: 0,
            scope: scope as u32,
            reserved: 0,
        }
    }

    #[test]
    fn a_delivery_is_admitted_only_over_lo_of_its_own_namespace() {
        let delivery = admission(Scope::Loopback);
        assert!(delivery.covers(7, true));
        assert!(!delivery.covers(7, false));
        assert!(!delivery.covers(8, true));
    }

    #[test]
    fn a_connection_from_another_namespace_is_admitted_only_from_the_network() {
        let same_node = admission(Scope::Network);
        assert!(same_node.covers(8, false));
        assert!(!same_node.covers(8, true));
    }
}
