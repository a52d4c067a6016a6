//! connect(2): is this a pod's connection to the mesh? Then mark its socket.

use aya_ebpf::{
    EbpfContext as _,
    bindings::bpf_sock,
    helpers::{bpf_get_netns_cookie, bpf_set_retval},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use undermesh_common::{
    Address, IPPROTO_TCP, Intent, ListenerKey, ListenerKind, Mode, Note, Pod, Target, Verdict,
};

use crate::{
    context,
    maps::{PODS, count, is_mesh, listens},
    mark, own, probe, trace,
};

const ALLOW: i32 = 1;
const DENY: i32 = 0;
const ECONNREFUSED: i32 = 111;

/// IPv4 sockets.
#[cgroup_sock_addr(connect4)]
pub fn undermesh_connect4(ctx: SockAddrContext) -> i32 {
    // SAFETY: the kernel's context, valid while the program runs.
    let address = unsafe { (&raw const (*ctx.sock_addr).user_ip4).read_volatile() };
    connect(&ctx, Address::from_v4(address), |sk| {
        // SAFETY: the hook's own socket, checked not to be null.
        Address::from_v4(unsafe { (&raw const (*sk).src_ip4).read_volatile() })
    })
}

/// IPv6 sockets, also towards v4-mapped addresses: their packets are IPv4.
#[cgroup_sock_addr(connect6)]
pub fn undermesh_connect6(ctx: SockAddrContext) -> i32 {
    // SAFETY: the kernel's context, valid while the program runs.
    let address = unsafe { context::words(&raw const (*ctx.sock_addr).user_ip6) };
    connect(&ctx, Address::from_v6(address), |sk| {
        // SAFETY: the hook's own socket, checked not to be null.
        Address::from_v6(unsafe { context::words(&raw const (*sk).src_ip6) })
    })
}

/// `source` reads the address that a socket is bound to.
#[inline(always)]
fn connect(
    ctx: &SockAddrContext,
    destination: Address,
    source: impl FnOnce(*mut bpf_sock) -> Address,
) -> i32 {
    // SAFETY: the kernel's context, valid while the program runs.
    let protocol = unsafe { (&raw const (*ctx.sock_addr).protocol).read_volatile() };
    if protocol != IPPROTO_TCP {
        return ALLOW;
    }
    // SAFETY: the kernel's context, valid while the program runs.
    let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
    if let Some(intent) = mark::noted(sk).and_then(Note::intent) {
        return connect_own(ctx, intent, || source(sk));
    }
    // SAFETY: the helper takes this hook's context.
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: a pod's entry may be replaced meanwhile; its memory stays until the program returns.
    let Some(pod) = (unsafe { PODS.get(netns_cookie) }) else {
        probe::connect(ctx, netns_cookie, target(ctx, &destination));
        return ALLOW;
    };
    let verdict = match decide(ctx, netns_cookie, pod, &destination, source) {
        Verdict::ConnectCaptured => capture(ctx, pod),
        verdict => {
            release(ctx);
            verdict
        }
    };
    count(verdict);
    trace::decided(ctx, netns_cookie, &destination, verdict);
    match verdict {
        Verdict::ConnectAgentGoneRefused
        | Verdict::ConnectForeignSourceRefused
        | Verdict::ConnectMarkFailedRefused => {
            // SAFETY: sets what connect(2) returns.
            unsafe { bpf_set_retval(-ECONNREFUSED) };
            DENY
        }
        _ => ALLOW,
    }
}

/// The agent's own socket: what it noted stays, and nothing is captured.
#[inline(always)]
fn connect_own(ctx: &SockAddrContext, intent: Intent, source: impl FnOnce() -> Address) -> i32 {
    // SAFETY: the helper takes this hook's context.
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: a pod's entry may be replaced meanwhile; its memory stays until the program returns.
    let pod = unsafe { PODS.get(netns_cookie) };
    if own::prepare(ctx, intent, || pod.is_some_and(|pod| pod.has(&source()))).is_err() {
        count(Verdict::ConnectOwnSocketFailed);
        return DENY;
    }
    if pod.is_some() {
        count(Verdict::ConnectOwnSocket);
    }
    ALLOW
}

#[inline(always)]
fn decide(
    ctx: &SockAddrContext,
    netns_cookie: u64,
    pod: &Pod,
    destination: &Address,
    source: impl FnOnce(*mut bpf_sock) -> Address,
) -> Verdict {
    if pod.owns(destination) {
        // SAFETY: the kernel's context, valid while the program runs.
        let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
        if sk.is_null() {
            return Verdict::ConnectOwnAddress;
        }
        let source = source(sk);
        return if source.is_unspecified() || pod.owns(&source) || source.is(destination) {
            Verdict::ConnectOwnAddress
        } else {
            Verdict::ConnectForeignSourceRefused
        };
    }
    if !is_mesh(target(ctx, destination)) {
        return Verdict::ConnectNative;
    }
    let family = destination.family();
    if !pod.speaks(family) {
        return Verdict::ConnectFamilyAbsent;
    }
    let outbound = ListenerKey::new(netns_cookie, family, ListenerKind::Outbound);
    if listens(&outbound) {
        return Verdict::ConnectCaptured;
    }
    match pod.mode() {
        Mode::Permissive => Verdict::ConnectAgentGonePassed,
        Mode::Strict => Verdict::ConnectAgentGoneRefused,
    }
}

/// The destination and its port.
#[inline(always)]
fn target(ctx: &SockAddrContext, destination: &Address) -> Target {
    // SAFETY: the kernel's context, valid while the program runs. Network order in the low half.
    let port = unsafe { (&raw const (*ctx.sock_addr).user_port).read_volatile() };
    Target {
        address: *destination,
        port: u32::from(u16::from_be(port as u16)),
    }
}

/// The note first: without it an app could take the mark off again unseen.
#[inline(always)]
fn capture(ctx: &SockAddrContext, pod: &Pod) -> Verdict {
    // SAFETY: the kernel's context, valid while the program runs.
    let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
    if mark::note(sk, Note::Captured).is_ok() && mark::set_bit(ctx.as_ptr(), true).is_ok() {
        return Verdict::ConnectCaptured;
    }
    release(ctx);
    match pod.mode() {
        Mode::Permissive => Verdict::ConnectMarkFailedPassed,
        Mode::Strict => Verdict::ConnectMarkFailedRefused,
    }
}

/// Neither note nor bit may stay from a former connect of this socket.
#[inline(always)]
fn release(ctx: &SockAddrContext) {
    // SAFETY: the kernel's context, valid while the program runs.
    mark::forget(unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk });
    // Where the bit cannot be cleared, the agent sees a connection that is not for it and resets it.
    let _ = mark::set_bit(ctx.as_ptr(), false);
}
