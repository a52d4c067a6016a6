//! Addresses out of the kernel's contexts, in loads that the verifier takes.

use undermesh_common::Address;

const AF_INET: u32 = 2;

/// The address of this family. Both fields are read before one is chosen, because of a load in each
/// branch LLVM makes one from a computed address ("dereference of modified ctx ptr"). The kernel
/// allows both for either family.
///
/// # Safety
/// Both point into the context of the hook.
#[inline(always)]
pub unsafe fn address(family: u32, v4: *const u32, v6: *const [u32; 4]) -> Address {
    // SAFETY: as the caller promises.
    let (v4, v6) = unsafe { (v4.read_volatile(), words(v6)) };
    if family == AF_INET {
        Address::from_v4(v4)
    } else {
        Address::from_v6(v6)
    }
}

/// The four words, one load for each: the verifier takes no wider one.
///
/// # Safety
/// It points into the context of the hook.
#[inline(always)]
pub unsafe fn words(v6: *const [u32; 4]) -> [u32; 4] {
    let first = v6.cast::<u32>();
    // SAFETY: as the caller promises.
    unsafe {
        [
            first.read_volatile(),
            first.add(1).read_volatile(),
            first.add(2).read_volatile(),
            first.add(3).read_volatile(),
        ]
    }
}
