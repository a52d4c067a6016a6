//! connect(2) from outside the enrolled pods: is this the kubelet at a declared probe port? Then
//! its tuple is to be admitted at the pod.
//!
//! The proof is the cgroup of the task that connects, which only root on the node can choose. Such
//! a task connects in its own context with io_uring too: its workers are threads of the process,
//! in the same cgroup.

use aya_ebpf::{helpers::bpf_get_current_ancestor_cgroup_id, programs::SockAddrContext};
use undermesh_common::{Note, Target, Verdict};

use crate::{
    maps::{PROBERS, PROBES, count},
    mark, trace,
};

/// How deep below the root of the cgroup2 tree a probing cgroup may be: the kubelet of a node that
/// is itself a container of a user's session is at 8.
const DEEPEST: i32 = 16;

/// Notes on the socket what it may do; a note of a former connect does not stay. Nothing is refused
/// here: what is not admitted meets the pod's own rules.
#[inline(always)]
pub fn connect(ctx: &SockAddrContext, netns_cookie: u64, target: Target) {
    // SAFETY: the kernel's context, valid while the program runs.
    let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
    let Some(verdict) = decide(target) else {
        return mark::forget(sk);
    };
    let verdict = match verdict {
        Verdict::ConnectProbe if mark::note(sk, Note::Probe).is_err() => {
            Verdict::ConnectProbeFailed
        }
        verdict => verdict,
    };
    if !matches!(verdict, Verdict::ConnectProbe) {
        mark::forget(sk);
    }
    count(verdict);
    trace::decided(ctx, netns_cookie, &target.address, verdict);
}

/// None where no enrolled pod is concerned.
#[inline(always)]
fn decide(target: Target) -> Option<Verdict> {
    let any = Target { port: 0, ..target };
    // SAFETY: only presence is asked.
    if unsafe { PROBES.get(any) }.is_none() {
        return None;
    }
    // SAFETY: as above. Port 0 is every pod's and no probe's.
    let declared = target.port != 0 && unsafe { PROBES.get(target) }.is_some();
    match (declared, is_prober()) {
        (true, true) => Some(Verdict::ConnectProbe),
        (true, false) => Some(Verdict::ConnectProbeForeign),
        (false, true) => Some(Verdict::ConnectProbeUndeclared),
        (false, false) => None,
    }
}

/// Whether the task is in a probing cgroup or below one. Level 0 is the root of the tree, which
/// holds everything.
#[inline(always)]
fn is_prober() -> bool {
    for level in 1..=DEEPEST {
        // SAFETY: asks about the current task; 0 where it has no cgroup at this level.
        let id = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if id == 0 {
            return false;
        }
        // SAFETY: only presence is asked.
        if unsafe { PROBERS.get(id) }.is_some() {
            return true;
        }
    }
    false
}
