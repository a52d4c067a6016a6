//! The maps, all but [`CONSTANTS`] pinned and shared by every program.
//!
//! Every one is bounded, none is allocated before it is used, and only the agent fills the ones
//! that a pod's traffic could otherwise exhaust.

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_F_RDONLY_PROG},
    btf_maps::SkStorage,
    helpers::{bpf_map_lookup_elem, bpf_sk_release},
    macros::{btf_map, map},
    maps::{Array, HashMap, PerCpuArray, PerCpuHashMap, SockHash},
};
use undermesh_common::{
    Address, Admission, ListenerKey, NativeConnection, NativeKey, NativeTraffic, Pod, PodConstants,
    Target, Tuple, Verdict, bounds,
};

/// Enrolled pods by the cookie of their network namespace.
#[map]
pub static PODS: HashMap<u64, Pod> = HashMap::with_max_entries(bounds::PODS, BPF_F_NO_PREALLOC);

/// Destinations of the mesh.
#[map]
pub static TARGETS: HashMap<Target, u32> =
    HashMap::with_max_entries(bounds::TARGETS, BPF_F_NO_PREALLOC);

/// Connections that pass to the app.
#[map]
pub static ADMITTED: HashMap<Tuple, Admission> =
    HashMap::with_max_entries(bounds::ADMITTED, BPF_F_NO_PREALLOC);

/// The agent's listeners. An entry vanishes with its socket.
#[map]
pub static LISTENERS: SockHash<ListenerKey> = SockHash::with_max_entries(bounds::LISTENERS, 0);

/// Addresses of enrolled pods (port 0) and their declared probe ports; the value is the cookie of
/// the pod's network namespace. The agent makes and removes the entries.
#[map]
pub static PROBES: HashMap<Target, u64> =
    HashMap::with_max_entries(bounds::PROBES, BPF_F_NO_PREALLOC);

/// Cgroups of which the tasks may probe, by id.
#[map]
pub static PROBERS: HashMap<u64, u32> =
    HashMap::with_max_entries(bounds::PROBERS, BPF_F_NO_PREALLOC);

/// One counter per verdict and CPU.
#[map]
pub static VERDICTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Verdict::COUNT, 0);

/// Native traffic of enrolled pods; the agent makes and removes the entries.
#[map]
pub static NATIVE: PerCpuHashMap<NativeKey, NativeTraffic> =
    PerCpuHashMap::with_max_entries(bounds::NATIVE, BPF_F_NO_PREALLOC);

/// Native connections that are watched, in their sockets' storage.
#[btf_map]
pub static WATCHED: SkStorage<NativeConnection> = SkStorage::new();

/// The node's own addresses.
#[map]
pub static NODE_ADDRESSES: HashMap<Address, u32> =
    HashMap::with_max_entries(bounds::NODE_ADDRESSES, BPF_F_NO_PREALLOC);

/// What the connect hook, or the agent, noted on a socket: a `Note`.
#[btf_map]
pub static NOTES: SkStorage<u32> = SkStorage::new();

/// The pod of one `sk_lookup` instance; a map of its own for each.
#[map]
pub static CONSTANTS: Array<PodConstants> = Array::with_max_entries(1, BPF_F_RDONLY_PROG);

/// Adds one to the verdict's counter.
#[inline(always)]
pub fn count(verdict: Verdict) {
    if let Some(counter) = VERDICTS.get_ptr_mut(verdict as u32) {
        // SAFETY: the slot of this CPU, which no other program writes before this one returns;
        // aligned, and never freed.
        unsafe { *counter += 1 }
    }
}

/// Whether the agent has this listener open at this moment.
#[inline(always)]
pub fn listens(key: &ListenerKey) -> bool {
    // SAFETY: map and key are valid for the call; a socket that is found is released at once.
    unsafe {
        let socket = bpf_map_lookup_elem(
            (&raw const LISTENERS).cast_mut().cast(),
            core::ptr::from_ref(key).cast(),
        );
        if socket.is_null() {
            return false;
        }
        bpf_sk_release(socket);
        true
    }
}

/// Whether a connection to it is to be captured: the exact port first, then every port.
#[inline(always)]
pub fn is_mesh(mut target: Target) -> bool {
    // SAFETY: only presence is asked.
    if unsafe { TARGETS.get(target) }.is_some() {
        return true;
    }
    target.port = 0;
    // SAFETY: as above.
    unsafe { TARGETS.get(target) }.is_some()
}
