//! sk_lookup: where a SYN that arrives in an enrolled pod goes. The rules are in
//! `undermesh_common::Arrival`; this reads the packet and carries the answer out.

use aya_ebpf::{
    bindings::{BPF_SK_LOOKUP_F_NO_REUSEPORT, sk_action},
    macros::sk_lookup,
    programs::SkLookupContext,
};
use undermesh_common::{
    Arrival, IPPROTO_TCP, LOOPBACK_INTERFACE, ListenerKey, ListenerKind, PodConstants, Route,
    Tuple, Verdict,
};

use crate::{
    context,
    maps::{ADMITTED, CONSTANTS, LISTENERS, count},
    trace,
};

/// One instance per pod.
#[sk_lookup]
pub fn undermesh_lookup(ctx: SkLookupContext) -> u32 {
    // UDP comes here too; a drop would break name resolution.
    // SAFETY: the kernel's context, valid while the program runs.
    let protocol = unsafe { (&raw const (*ctx.lookup).protocol).read_volatile() };
    if protocol != IPPROTO_TCP {
        return sk_action::SK_PASS;
    }
    let Some(constants) = CONSTANTS.get(0) else {
        return sk_action::SK_PASS;
    };
    let (arrival, remote_port) = arrival(&ctx);
    let route = arrival.route(&constants.pod, || {
        is_admitted(&arrival, remote_port, constants.netns_cookie)
    });
    let route = match route {
        Route::Listener(kind) => match assign(&ctx, &arrival, constants, kind) {
            Ok(verdict) => Route::Pass(verdict),
            Err(missing) => missing,
        },
        decided => decided,
    };
    let (verdict, action) = match route {
        Route::Refuse(verdict) => (verdict, sk_action::SK_DROP),
        Route::Pass(verdict) => (verdict, sk_action::SK_PASS),
        Route::Listener(_) => return sk_action::SK_PASS,
    };
    count(verdict);
    trace::decided(&ctx, constants.netns_cookie, &arrival.remote, verdict);
    action
}

/// Gives the packet to a listener, or says what happens without one.
#[inline(always)]
fn assign(
    ctx: &SkLookupContext,
    arrival: &Arrival,
    constants: &PodConstants,
    kind: ListenerKind,
) -> Result<Verdict, Route> {
    let key = ListenerKey::new(constants.netns_cookie, arrival.local.family(), kind);
    match LISTENERS.redirect_sk_lookup(ctx, key, u64::from(BPF_SK_LOOKUP_F_NO_REUSEPORT)) {
        Ok(()) => Ok(match kind {
            ListenerKind::Outbound => Verdict::LookupOutbound,
            ListenerKind::Inbound => Verdict::LookupInbound,
            ListenerKind::Hbone => Verdict::LookupHbone,
        }),
        Err(_) => Err(Arrival::without_listener(&constants.pod, kind)),
    }
}

#[inline(always)]
fn is_admitted(arrival: &Arrival, remote_port: u16, netns_cookie: u64) -> bool {
    let tuple = Tuple {
        source: arrival.remote,
        destination: arrival.local,
        source_port: remote_port,
        destination_port: arrival.local_port,
    };
    let Some(admission) = ADMITTED.get_ptr_mut(tuple) else {
        return false;
    };
    // SAFETY: aligned, and not freed before this program returns. One word is written in place, always
    // with this value here, and read by the agent alone.
    unsafe {
        let covered = (*admission).covers(netns_cookie, arrival.over_loopback);
        if covered {
            (&raw mut (*admission).arrived_in).write_volatile(netns_cookie);
        }
        covered
    }
}

/// The packet and its source port. `local_port` is in host order, `remote_port` in network order.
#[inline(always)]
fn arrival(ctx: &SkLookupContext) -> (Arrival, u16) {
    let lookup = ctx.lookup;
    // SAFETY: the kernel's context, valid while the program runs.
    unsafe {
        let family = (&raw const (*lookup).family).read_volatile();
        let arrival = Arrival {
            local: context::address(
                family,
                &raw const (*lookup).local_ip4,
                &raw const (*lookup).local_ip6,
            ),
            remote: context::address(
                family,
                &raw const (*lookup).remote_ip4,
                &raw const (*lookup).remote_ip6,
            ),
            local_port: (&raw const (*lookup).local_port).read_volatile() as u16,
            over_loopback: (&raw const (*lookup).ingress_ifindex).read_volatile()
                == LOOPBACK_INTERFACE,
        };
        let remote_port = u16::from_be((&raw const (*lookup).remote_port).read_volatile());
        (arrival, remote_port)
    }
}
