//! What the kernel knows about an enrolled pod, and about the agent's own sockets.

use crate::{Address, Family};

/// What happens to traffic that the mesh cannot secure (design: failure modes).
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// It passes, and is counted.
    Permissive = 0,
    /// It is refused, and counted.
    Strict = 1,
}

/// Value of the pod map; its key is the cookie of the pod's network namespace.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pod {
    /// IPv4 address, [`Address::NONE`] if it has none.
    pub v4: Address,
    /// IPv6 address, [`Address::NONE`] if it has none.
    pub v6: Address,
    /// [`Mode`] as number; anything but 0 is strict.
    pub mode: u32,
    /// Always 0.
    pub reserved: u32,
}

impl Pod {
    /// A pod with these addresses.
    #[must_use]
    pub const fn new(v4: Address, v6: Address, mode: Mode) -> Self {
        Self {
            v4,
            v6,
            mode: mode as u32,
            reserved: 0,
        }
    }

    /// How it treats what the mesh cannot secure.
    #[inline(always)]
    #[must_use]
    pub const fn mode(&self) -> Mode {
        if self.mode == Mode::Permissive as u32 {
            Mode::Permissive
        } else {
            Mode::Strict
        }
    }

    /// Whether the address is one of the pod's.
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, address: &Address) -> bool {
        self.v4.is(address) || self.v6.is(address)
    }

    /// Whether the address is one of the pod's, or loopback.
    #[inline(always)]
    #[must_use]
    pub const fn owns(&self, address: &Address) -> bool {
        self.has(address) || address.is_loopback()
    }

    /// Whether the pod has an address of this family: without one it has no route over lo either.
    #[inline(always)]
    #[must_use]
    pub const fn speaks(&self, family: Family) -> bool {
        match family {
            Family::V4 => !self.v4.is(&Address::NONE),
            Family::V6 => !self.v6.is(&Address::NONE),
        }
    }
}

/// Constants of one `sk_lookup` instance: that hook sees no cookie of its network namespace.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodConstants {
    /// Cookie of the pod's network namespace.
    pub netns_cookie: u64,
    /// The pod.
    pub pod: Pod,
}

/// Why the agent connects. It notes that itself, in the storage of its socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Intent {
    /// The agent's own upstream socket: never captured.
    Own,
    /// Own, and its tuple is admitted at the destination pod from before its SYN until it is closed.
    Admitted,
    /// Admitted, and to the app of the socket's own pod over lo, as from its client: it bears the mark.
    Delivery,
}

impl Intent {
    /// How it is noted.
    #[must_use]
    pub const fn note(self) -> Note {
        match self {
            Self::Own => Note::Own,
            Self::Admitted => Note::Admitted,
            Self::Delivery => Note::Delivery,
        }
    }
}

/// What a socket's storage says about it to the hooks: written by the connect hook, or by the agent before it
/// connects. Only who has the map and the socket can write it, so it cannot be forged as a mark can. It goes
/// with the socket, so a connect that fails before its SYN leaves nothing behind.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Note {
    /// A pod's connection to the mesh: it bears the mark when its SYN is routed.
    Captured = 1,
    /// A probing cgroup's connection to a declared probe port: its tuple is admitted.
    Probe = 2,
    /// The agent's: see [`Intent::Own`].
    Own = 3,
    /// The agent's: see [`Intent::Admitted`].
    Admitted = 4,
    /// The agent's: see [`Intent::Delivery`].
    Delivery = 5,
}

/// When the agent's connections ask a silent peer whether it is there.
pub mod keepalive {
    /// After so many seconds without a word from the peer …
    pub const IDLE_SECONDS: u32 = 30;
    /// … so often …
    pub const INTERVAL_SECONDS: u32 = 10;
    /// … and it is given up after so many unanswered questions.
    pub const RETRIES: u32 = 3;
}

impl Note {
    /// The note of this number.
    #[inline(always)]
    #[must_use]
    pub const fn of(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::Captured),
            2 => Some(Self::Probe),
            3 => Some(Self::Own),
            4 => Some(Self::Admitted),
            5 => Some(Self::Delivery),
            _ => None,
        }
    }

    /// The agent's intent, if it wrote it: the hooks write the others.
    #[inline(always)]
    #[must_use]
    pub const fn intent(self) -> Option<Intent> {
        match self {
            Self::Captured | Self::Probe => None,
            Self::Own => Some(Intent::Own),
            Self::Admitted => Some(Intent::Admitted),
            Self::Delivery => Some(Intent::Delivery),
        }
    }
}

#[cfg(feature = "user")]
mod plain {
    #![allow(unsafe_code)]
    use super::{Pod, PodConstants};

    // SAFETY: repr(C), integers only, no padding (see the test of sizes in `layout`).
    unsafe impl aya::Pod for Pod {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PodConstants {}
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn an_unknown_mode_is_strict() {
        let mut pod = Pod::new(Address::NONE, Address::NONE, Mode::Permissive);
        assert_eq!(pod.mode(), Mode::Permissive);
        pod.mode = 99;
        assert_eq!(pod.mode(), Mode::Strict);
    }

    #[test]
    fn a_note_is_known_by_its_number_and_what_the_agent_intends_is_noted_as_its_own() {
        for note in [
            Note::Captured,
            Note::Probe,
            Note::Own,
            Note::Admitted,
            Note::Delivery,
        ] {
            assert_eq!(Note::of(note as u32), Some(note));
        }
        assert_eq!(Note::of(0), None);
        assert_eq!(Note::of(99), None);
        for intent in [Intent::Own, Intent::Admitted, Intent::Delivery] {
            assert_eq!(intent.note().intent(), Some(intent));
        }
        assert_eq!(Note::Captured.intent(), None);
        assert_eq!(Note::Probe.intent(), None);
    }

    #[test]
    fn a_pod_owns_its_addresses_and_loopback() {
        let pod = Pod::new(address("10.0.0.2"), address("fd00::2"), Mode::Strict);
        for own in ["10.0.0.2", "fd00::2", "127.0.0.53", "::1"] {
            assert!(pod.owns(&address(own)), "{own}");
        }
        for foreign in ["10.0.0.3", "fd00::3", "169.254.0.1"] {
            assert!(!pod.owns(&address(foreign)), "{foreign}");
        }
    }

    #[test]
    fn a_pod_speaks_the_families_it_has_addresses_of() {
        let pod = Pod::new(address("10.0.0.2"), Address::NONE, Mode::Strict);
        assert!(pod.speaks(Family::V4));
        assert!(!pod.speaks(Family::V6));
    }
}
