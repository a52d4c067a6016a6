//! setsockopt(2): a captured socket keeps its mark.
//!
//! A process with NET_RAW, which containers have by default, may change its sockets' marks at any
//! time, and the kernel then looks for another way for what the socket sends next: a lost SYN would
//! go to the mesh's destination past the agent, and the next bytes of a connection that stands would
//! leave the pod in plaintext.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{SO_MARK, SOL_SOCKET, bpf_sock},
    helpers::bpf_get_netns_cookie,
    macros::cgroup_sockopt,
    programs::SockoptContext,
};
use undermesh_common::{CAPTURE_MARK, Note, Verdict};

use crate::{
    maps::{PODS, count},
    mark,
};

const ALLOW: i32 = 1;
/// The caller gets EPERM.
const DENY: i32 = 0;
/// What the kernel shows of a longer value.
const PAGE: i32 = 4096;
const IPPROTO_MPTCP: u32 = 262;
/// `TCP_CLOSE` of include/net/tcp_states.h: neither connected nor on its way.
const TCP_CLOSE: u32 = 7;

/// Attached at the root of the tree, like the connect programs.
#[cgroup_sockopt(setsockopt)]
pub fn undermesh_setsockopt(ctx: SockoptContext) -> i32 {
    // SAFETY: the kernel's context, valid while the program runs.
    let (level, option) = unsafe {
        (
            (&raw const (*ctx.sockopt).level).read_volatile(),
            (&raw const (*ctx.sockopt).optname).read_volatile(),
        )
    };
    if level == SOL_SOCKET as i32 && option == SO_MARK as i32 {
        return keep_mark(&ctx);
    }
    // SAFETY: as above; the length may be written. 0 leaves the value to the kernel as it came,
    // which before 6.5 is an error where only a page of it was shown.
    unsafe {
        if (&raw const (*ctx.sockopt).optlen).read_volatile() > PAGE {
            (&raw mut (*ctx.sockopt).optlen).write_volatile(0);
        }
    }
    ALLOW
}

#[inline(always)]
fn keep_mark(ctx: &SockoptContext) -> i32 {
    // SAFETY: the kernel's context, valid while the program runs.
    let sk = unsafe { (*ctx.sockopt).__bindgen_anon_1.sk };
    if sk.is_null() {
        return ALLOW;
    }
    if mark::noted(sk) == Some(Note::Captured) {
        return add_bit(ctx);
    }
    if is_connecting_mptcp(sk) {
        // SAFETY: the helper takes this hook's context.
        let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
        // SAFETY: only presence is asked.
        if unsafe { PODS.get(netns_cookie) }.is_some() {
            count(Verdict::MarkChangeRefused);
            return DENY;
        }
    }
    ALLOW
}

/// The option's value with the bit.
#[inline(always)]
fn add_bit(ctx: &SockoptContext) -> i32 {
    // SAFETY: the kernel's context, valid while the program runs.
    let (start, end) = unsafe {
        (
            (*ctx.sockopt).__bindgen_anon_2.optval as usize,
            (*ctx.sockopt).__bindgen_anon_3.optval_end as usize,
        )
    };
    if start + size_of::<u32>() > end {
        // Too short for a mark: the kernel says so itself.
        return ALLOW;
    }
    let value = start as *mut u32;
    // SAFETY: within the value, as was just looked at; the verifier sees to alignment.
    unsafe {
        if *value & CAPTURE_MARK == 0 {
            *value |= CAPTURE_MARK;
            count(Verdict::MarkRestored);
        }
    }
    ALLOW
}

/// The note is on its first subflow, which is not to be seen from here, and the change would be
/// handed on to it.
#[inline(always)]
fn is_connecting_mptcp(sk: *mut bpf_sock) -> bool {
    // SAFETY: the hook's own socket, checked by the caller not to be null.
    let (protocol, state) = unsafe {
        (
            (&raw const (*sk).protocol).read_volatile(),
            (&raw const (*sk).state).read_volatile(),
        )
    };
    protocol == IPPROTO_MPTCP && state != TCP_CLOSE
}
