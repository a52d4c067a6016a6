//! One address type for both families, in the kernel too.

#[cfg(any(feature = "user", test))]
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IP address as 16 bytes in network order; IPv4 is v4-mapped IPv6 (RFC 4291, 2.5.5.2).
///
/// The words are as they lie in memory (`user_ip6` and alike of the kernel's contexts), not numbers.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    words: [u32; 4],
}

/// Address family of a packet: a v4-mapped destination makes IPv4 packets.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4 = 4,
    /// IPv6.
    V6 = 6,
}

const MAPPED: u32 = 0xffff_u32.to_be();

impl Address {
    /// No address: `::`. No pod has it, no connection carries it.
    pub const NONE: Self = Self { words: [0; 4] };

    /// From an IPv4 address in network order, as `user_ip4`, `remote_ip4` and alike hold it.
    #[inline(always)]
    #[must_use]
    pub const fn from_v4(word: u32) -> Self {
        Self {
            words: [0, 0, MAPPED, word],
        }
    }

    /// From the four words of an IPv6 address in network order.
    #[inline(always)]
    #[must_use]
    pub const fn from_v6(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// The 16 bytes in network order.
    #[inline(always)]
    #[must_use]
    pub const fn octets(&self) -> [u8; 16] {
        let [a, b, c, d] = self.words;
        let (a, b) = (a.to_ne_bytes(), b.to_ne_bytes());
        let (c, d) = (c.to_ne_bytes(), d.to_ne_bytes());
        [
            a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1],
            d[2], d[3],
        ]
    }

    /// Which packets go to it.
    #[inline(always)]
    #[must_use]
    pub const fn family(&self) -> Family {
        if (self.words[0] | self.words[1]) == 0 && self.words[2] == MAPPED {
            Family::V4
        } else {
            Family::V6
        }
    }

    /// Whether it is 127.0.0.0/8 or `::1`.
    #[inline(always)]
    #[must_use]
    pub const fn is_loopback(&self) -> bool {
        if (self.words[0] | self.words[1]) != 0 {
            return false;
        }
        if self.words[2] == MAPPED {
            return u32::from_be(self.words[3]) >> 24 == 127;
        }
        self.words[2] == 0 && self.words[3] == 1_u32.to_be()
    }

    /// Whether it is in 169.254.0.0/16 or fe80::/10.
    #[inline(always)]
    #[must_use]
    pub const fn is_link_local(&self) -> bool {
        match self.family() {
            Family::V4 => u32::from_be(self.words[3]) >> 16 == 0xa9fe,
            Family::V6 => u32::from_be(self.words[0]) >> 22 == 0xfe80 >> 6,
        }
    }

    /// Whether it is in 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16, 100.64.0.0/10 or fc00::/7.
    #[inline(always)]
    #[must_use]
    pub const fn is_private(&self) -> bool {
        match self.family() {
            Family::V4 => {
                let number = u32::from_be(self.words[3]);
                number >> 24 == 10
                    || number >> 20 == 0xac1
                    || number >> 16 == 0xc0a8
                    || number >> 22 == 0x6440 >> 6
            }
            Family::V6 => u32::from_be(self.words[0]) >> 25 == 0xfc >> 1,
        }
    }

    /// Whether it is `0.0.0.0` or `::`: that of a socket that is not bound.
    #[inline(always)]
    #[must_use]
    pub const fn is_unspecified(&self) -> bool {
        let [a, b, c, d] = self.words;
        (a | b | d) == 0 && (c == 0 || c == MAPPED)
    }

    /// Equality without a call: the derived one may become `bcmp`, which eBPF does not have.
    #[inline(always)]
    #[must_use]
    pub const fn is(&self, other: &Self) -> bool {
        let [a, b, c, d] = self.words;
        let [w, x, y, z] = other.words;
        ((a ^ w) | (b ^ x) | (c ^ y) | (d ^ z)) == 0
    }
}

#[cfg(any(feature = "user", test))]
impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        let octets = match ip {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        };
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(octets.chunks_exact(4)) {
            *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        Self { words }
    }
}

#[cfg(any(feature = "user", test))]
impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        let mut octets = [0; 16];
        for (bytes, word) in octets.chunks_exact_mut(4).zip(address.words) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        Ipv6Addr::from(octets).to_canonical()
    }
}

#[cfg(any(feature = "user", test))]
impl From<Ipv4Addr> for Address {
    fn from(ip: Ipv4Addr) -> Self {
        IpAddr::V4(ip).into()
    }
}

#[cfg(any(feature = "user", test))]
impl From<Ipv6Addr> for Address {
    fn from(ip: Ipv6Addr) -> Self {
        IpAddr::V6(ip).into()
    }
}

#[cfg(feature = "user")]
mod plain {
    #![allow(unsafe_code)]
    use super::Address;

    // SAFETY: repr(C), integers only, no padding.
    unsafe impl aya::Pod for Address {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn the_word_of_an_ipv4_context_is_the_mapped_address() {
        let word = u32::from_ne_bytes([10, 96, 0, 10]);
        assert_eq!(Address::from_v4(word), address("10.96.0.10"));
        assert_eq!(Address::from_v4(word), address("::ffff:10.96.0.10"));
    }

    #[test]
    fn addresses_survive_the_way_through_the_kernel_form() {
        for text in ["10.0.0.1", "255.255.255.255", "fd00::1", "::1", "::"] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(IpAddr::from(Address::from(ip)), ip);
        }
    }

    #[test]
    fn mapped_addresses_are_of_family_four() {
        assert_eq!(address("::ffff:1.2.3.4").family(), Family::V4);
        assert_eq!(address("1.2.3.4").family(), Family::V4);
        assert_eq!(address("fd00::1").family(), Family::V6);
        assert_eq!(Address::NONE.family(), Family::V6);
    }

    #[test]
    fn only_127_and_one_are_loopback() {
        for text in ["127.0.0.1", "127.255.255.254", "::1", "::ffff:127.0.0.9"] {
            assert!(address(text).is_loopback(), "{text}");
        }
        for text in [
            "126.255.255.255",
            "128.0.0.1",
            "::",
            "::2",
            "1::1",
            "fe80::1",
        ] {
            assert!(!address(text).is_loopback(), "{text}");
        }
    }

    #[test]
    fn an_unbound_socket_has_an_unspecified_address_of_either_family() {
        assert!(Address::from_v4(0).is_unspecified());
        assert!(Address::NONE.is_unspecified());
        for text in ["0.0.0.1", "::1", "fd00::", "127.0.0.1"] {
            assert!(!address(text).is_unspecified(), "{text}");
        }
    }

    #[test]
    fn is_agrees_with_equality() {
        let all = ["10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2", "::"];
        for a in all {
            for b in all {
                assert_eq!(address(a).is(&address(b)), a == b);
            }
        }
    }
}
