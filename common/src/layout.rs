//! Bounds of the maps, and a hash of all that must agree between programs, pinned maps and agent.

use core::mem::size_of;

use crate::{
    Address, Admission, CAPTURE_MARK, DestinationClass, ListenerKey, NativeConnection, NativeKey,
    NativeTraffic, Pod, PodConstants, Target, Tuple, Verdict,
};

/// How many entries each map holds at most. None is allocated before it is used.
pub mod bounds {
    /// Enrolled pods of one node. At the bound enrolment of a further pod fails, with this as reason.
    pub const PODS: u32 = 4096;
    /// Destinations of the mesh. At the bound the agent keeps the former set, with this as reason.
    pub const TARGETS: u32 = 1 << 18;
    /// Admitted connections, as long as they are open. At the bound a connection is not admitted
    /// and its destination refuses it.
    pub const ADMITTED: u32 = 1 << 18;
    /// Listeners: three of each family for each pod.
    pub const LISTENERS: u32 = PODS * 6;
    /// Native traffic: every class of every pod.
    pub const NATIVE: u32 = PODS * super::DestinationClass::ALL.len() as u32;
    /// The node's own addresses. Connections to further ones count in the class of their range.
    pub const NODE_ADDRESSES: u32 = 1024;
    /// Declared probe ports of one pod; probes of further ones are not admitted, and its status
    /// names them.
    pub const PROBE_PORTS_PER_POD: u32 = 31;
    /// Probe ports of all pods, and one entry for each address: no pod can take another's room.
    pub const PROBES: u32 = PODS * 2 * (PROBE_PORTS_PER_POD + 1);
    /// Cgroups that may probe. More are refused at start.
    pub const PROBERS: u32 = 64;
}

/// Meaning of the ABI; raised by hand when the same bytes come to mean something else.
const VERSION: u64 = 3;

/// Hash over version, sizes, bounds, and the names of the verdicts. Pins lie below a directory of
/// this name, so that an agent never takes over maps of another shape.
pub const LAYOUT: u64 = {
    let numbers = [
        VERSION,
        size_of::<ListenerKey>() as u64,
        size_of::<Target>() as u64,
        size_of::<Tuple>() as u64,
        size_of::<Admission>() as u64,
        size_of::<Pod>() as u64,
        size_of::<PodConstants>() as u64,
        size_of::<Address>() as u64,
        size_of::<NativeKey>() as u64,
        size_of::<NativeConnection>() as u64,
        size_of::<NativeTraffic>() as u64,
        bounds::PODS as u64,
        bounds::TARGETS as u64,
        bounds::ADMITTED as u64,
        bounds::LISTENERS as u64,
        bounds::NATIVE as u64,
        bounds::NODE_ADDRESSES as u64,
        bounds::PROBES as u64,
        bounds::PROBERS as u64,
        CAPTURE_MARK as u64,
        Verdict::COUNT as u64,
    ];
    let mut hash = FNV_OFFSET;
    let mut index = 0;
    while index < numbers.len() {
        hash = fnv(hash, &numbers[index].to_le_bytes());
        index += 1;
    }
    let mut index = 0;
    while index < Verdict::ALL.len() {
        hash = fnv(hash, Verdict::ALL[index].name().as_bytes());
        index += 1;
    }
    hash
};

/// What the object of the kernel programs bears in a section of its own, by which a build of the
/// agent sees whether it fits.
pub const LAYOUT_TAG: [u8; 24] = {
    let mut tag = *b"undermesh layout........";
    let hash = LAYOUT.to_le_bytes();
    let mut index = 0;
    while index < hash.len() {
        tag[16 + index] = hash[index];
        index += 1;
    }
    tag
};

/// FNV-1a, 64 bits.
const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

const fn fnv(mut hash: u64, bytes: &[u8]) -> u64 {
    let mut index = 0;
    while index < bytes.len() {
        hash ^= bytes[index] as u64;
        hash = hash.wrapping_mul(0x0000_0100_0000_01b3);
        index += 1;
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_key_or_value_has_padding() {
        assert_eq!(size_of::<ListenerKey>(), 8 + 4 + 4);
        assert_eq!(size_of::<Target>(), 16 + 4);
        assert_eq!(size_of::<Tuple>(), 16 + 16 + 2 + 2);
        assert_eq!(size_of::<Admission>(), 8 + 8 + 8 + 4 + 4);
        assert_eq!(size_of::<Pod>(), 16 + 16 + 4 + 4);
        assert_eq!(size_of::<PodConstants>(), 8 + 40);
        assert_eq!(size_of::<NativeKey>(), 8 + 4 + 4);
        assert_eq!(size_of::<NativeConnection>(), 8 + 4 + 4);
        assert_eq!(size_of::<NativeTraffic>(), 8 * 8);
    }

    #[test]
    fn the_tag_ends_with_the_hash() {
        assert!(LAYOUT_TAG.starts_with(b"undermesh layout"));
        assert!(LAYOUT_TAG.ends_with(&LAYOUT.to_le_bytes()));
    }

    #[test]
    fn fnv_agrees_with_its_published_vector() {
        assert_eq!(fnv(FNV_OFFSET, b"foobar"), 0x8594_4171_f739_67e8);
    }
}
