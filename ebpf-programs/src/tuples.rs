//! sock_ops: the mark again before the SYN; admission of the agent's and the kubelet's connections
//! from before their SYN until they are closed; what native connections of a pod carried, when they are closed.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_ANY, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
        BPF_TCP_CLOSE,
    },
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie},
    macros::sock_ops,
    programs::SockOpsContext,
};
use undermesh_common::{Admission, Note, Scope, Tuple, Verdict};

use crate::{
    context,
    maps::{ADMITTED, PODS, count},
    mark::{self, Change},
    native,
};

/// Attached at the root of the tree: the agent's sockets in the pods' namespaces are in its own cgroup.
#[sock_ops]
pub fn undermesh_sock_ops(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(&ctx),
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == BPF_TCP_CLOSE => closed(&ctx),
        _ => {}
    }
    1
}

#[inline(always)]
fn connecting(ctx: &SockOpsContext) {
    // SAFETY: the kernel's context, valid while the program runs.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if sk.is_null() {
        return;
    }
    match mark::noted(sk) {
        Some(Note::Captured) => match mark::set_bit(ctx.as_ptr(), true) {
            Ok(Change::None) => {}
            Ok(Change::Written) => count(Verdict::MarkRestored),
            Err(_) => count(Verdict::MarkRestoreFailed),
        },
        Some(Note::Probe | Note::Admitted | Note::Delivery) => admit(ctx),
        Some(Note::Own) => {}
        None => native::watch(ctx, sk),
    }
}

/// Asks the kernel to call, or not to call, when the connection is closed.
#[inline(always)]
pub fn call_at_close(ctx: &SockOpsContext, on: bool) -> Result<(), i32> {
    let flags = if on {
        ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG
    } else {
        ctx.cb_flags() & !BPF_SOCK_OPS_STATE_CB_FLAG
    };
    ctx.set_cb_flags(flags as i32)
}

#[inline(always)]
fn admit(ctx: &SockOpsContext) {
    let tuple = tuple(ctx);
    // SAFETY: the helper takes this hook's context.
    let socket_cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: the helper takes this hook's context.
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: a pod's entry may be replaced meanwhile; its memory stays until the program returns.
    let scope = match unsafe { PODS.get(netns_cookie) } {
        Some(pod) if pod.has(&tuple.destination) => Scope::Loopback,
        _ => Scope::Network,
    };
    let admission = Admission {
        socket_cookie,
        netns_cookie,
        arrived_in: 0,
        scope: scope as u32,
        reserved: 0,
    };
    // The callback first: an entry that nobody removes would admit a stranger later.
    if call_at_close(ctx, true).is_err() {
        count(Verdict::TupleAdmissionFailed);
    } else if ADMITTED
        .insert(tuple, admission, u64::from(BPF_ANY))
        .is_err()
    {
        // Nor is it anybody's native connection.
        let _ = call_at_close(ctx, false);
        count(Verdict::TupleAdmissionFailed);
    } else {
        count(Verdict::TupleAdmitted);
    }
}

#[inline(always)]
fn closed(ctx: &SockOpsContext) {
    let tuple = tuple(ctx);
    // SAFETY: read at once; the owner of an entry is never changed in place.
    let owner = unsafe { ADMITTED.get(tuple) }.map(|admission| admission.socket_cookie);
    let Some(owner) = owner else {
        return native::add(ctx);
    };
    // SAFETY: the helper takes this hook's context.
    let socket_cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // A later connection may have the same tuple: then the entry is that one's.
    if owner == socket_cookie && ADMITTED.remove(tuple).is_ok() {
        count(Verdict::TupleRemoved);
    }
}

/// The connection as its client sees it.
#[inline(always)]
pub fn tuple(ctx: &SockOpsContext) -> Tuple {
    let ops = ctx.ops;
    // SAFETY: the kernel's context, valid while the program runs. `local_port` is in host order,
    // `remote_port` in network order.
    unsafe {
        Tuple {
            source: context::address(
                ctx.family(),
                &raw const (*ops).local_ip4,
                &raw const (*ops).local_ip6,
            ),
            destination: context::address(
                ctx.family(),
                &raw const (*ops).remote_ip4,
                &raw const (*ops).remote_ip6,
            ),
            source_port: (&raw const (*ops).local_port).read_volatile() as u16,
            destination_port: u32::from_be((&raw const (*ops).remote_port).read_volatile()) as u16,
        }
    }
}
