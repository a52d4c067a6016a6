//! The hash of a target, the same in every process: two agents must agree on the ring.

use std::hash::{Hash, Hasher};

use super::super::backoff::mix;

/// FNV-1a with a strong finish. Not for keys an adversary chooses to collide: targets come from
/// discovery.
struct Stable(u64);

impl Hasher for Stable {
    fn finish(&self) -> u64 {
        mix(self.0)
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

/// A target's hash; `salt` gives independent ones.
pub(super) fn hash(target: &impl Hash, salt: u64) -> u64 {
    let mut hasher = Stable(0xcbf2_9ce4_8422_2325 ^ mix(salt));
    target.hash(&mut hasher);
    hasher.finish()
}
