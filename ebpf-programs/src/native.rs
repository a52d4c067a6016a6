//! sock_ops: what the native connections of a pod carried, added up when they are closed.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, BPF_TCP_SYN_SENT, bpf_sock},
    helpers::{bpf_get_netns_cookie, bpf_ktime_get_ns, bpf_sk_storage_delete, bpf_sk_storage_get},
    programs::SockOpsContext,
};
use undermesh_common::{DestinationClass, NativeConnection, NativeKey, Target, Verdict};

use crate::{
    maps::{NATIVE, NODE_ADDRESSES, PODS, WATCHED, count, is_mesh},
    tuples::{call_at_close, tuple},
};

/// Begins to watch a connection that an enrolled pod opens, unless it opens it to itself. `sk` is
/// the hook's own socket, not null.
#[inline(always)]
pub fn watch(ctx: &SockOpsContext, sk: *mut bpf_sock) {
    // SAFETY: the helper takes this hook's context.
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: a pod's entry may be replaced meanwhile; its memory stays until the program returns.
    let Some(pod) = (unsafe { PODS.get(netns_cookie) }) else {
        return;
    };
    let tuple = tuple(ctx);
    let destination = tuple.destination;
    if pod.owns(&destination) || destination.is(&tuple.source) {
        return;
    }
    let target = Target {
        address: destination,
        port: u32::from(tuple.destination_port),
    };
    let class = DestinationClass::of(
        &destination,
        || is_mesh(target),
        // SAFETY: only presence is asked.
        || unsafe { NODE_ADDRESSES.get(destination) }.is_some(),
    );
    let connection = NativeConnection {
        // SAFETY: takes nothing.
        opened: unsafe { bpf_ktime_get_ns() },
        class: class as u32,
        reserved: 0,
    };
    if !remember(sk, connection) || call_at_close(ctx, true).is_err() {
        count(Verdict::NativeUnwatched);
    }
}

/// In place of what a former connection of the socket may have left.
#[inline(always)]
fn remember(sk: *mut bpf_sock, mut connection: NativeConnection) -> bool {
    // SAFETY: `sk` is the hook's own socket and not null; the helper copies the value if it makes
    // the storage.
    let stored = unsafe {
        bpf_sk_storage_get(
            (&raw const WATCHED).cast_mut().cast(),
            sk.cast(),
            (&raw mut connection).cast(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        )
    }
    .cast::<NativeConnection>();
    if stored.is_null() {
        return false;
    }
    // SAFETY: the socket's own storage, checked not to be null; it lives as long as the socket.
    unsafe { *stored = connection };
    true
}

/// Adds a connection that is closed, if it was watched. Its former state is the hook's first
/// argument.
#[inline(always)]
pub fn add(ctx: &SockOpsContext) {
    // SAFETY: the kernel's context, valid while the program runs.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if sk.is_null() {
        return;
    }
    let Some(connection) = take(sk) else {
        return;
    };
    // SAFETY: the helper takes this hook's context.
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let key = NativeKey::new(netns_cookie, connection.class);
    let Some(traffic) = NATIVE.get_ptr_mut(key) else {
        return;
    };
    // SAFETY: takes nothing.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: the slot of this CPU, aligned; the kernel's context, valid while the program runs.
    unsafe {
        let traffic = &mut *traffic;
        let ops = ctx.ops;
        // The kernel keeps it eightfold.
        let rtt = u64::from((&raw const (*ops).srtt_us).read_volatile()) >> 3;
        traffic.connections += 1;
        traffic.failed += u64::from(ctx.arg(0) == BPF_TCP_SYN_SENT);
        traffic.from_pod_bytes += (&raw const (*ops).bytes_acked).read_volatile();
        traffic.to_pod_bytes += (&raw const (*ops).bytes_received).read_volatile();
        traffic.retransmits += u64::from((&raw const (*ops).total_retrans).read_volatile());
        traffic.rtt_sum += rtt;
        traffic.rtt_samples += u64::from(rtt != 0);
        traffic.duration_sum += now - connection.opened;
    }
}

/// What is remembered of the socket's connection, which is over.
#[inline(always)]
fn take(sk: *mut bpf_sock) -> Option<NativeConnection> {
    // SAFETY: `sk` is the hook's own socket and not null; without the flag the helper only reads.
    let stored = unsafe {
        bpf_sk_storage_get(
            (&raw const WATCHED).cast_mut().cast(),
            sk.cast(),
            core::ptr::null_mut(),
            0,
        )
    }
    .cast::<NativeConnection>();
    if stored.is_null() {
        return None;
    }
    // SAFETY: the socket's own storage, checked not to be null; it lives as long as the socket.
    let connection = unsafe { *stored };
    // SAFETY: as above. It was there.
    let _ = unsafe { bpf_sk_storage_delete((&raw const WATCHED).cast_mut().cast(), sk.cast()) };
    Some(connection)
}
