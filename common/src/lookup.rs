//! The decision of the `sk_lookup` hook: where a SYN that arrives in a pod goes.

use crate::{Address, HBONE_PORT, ListenerKind, Mode, Pod, Verdict};

/// A TCP packet for which the kernel seeks a listener.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// Its destination.
    pub local: Address,
    /// Its source.
    pub remote: Address,
    /// Its destination port, host order.
    pub local_port: u16,
    /// Whether it came over `lo`.
    pub over_loopback: bool,
}

/// Where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// To one of the agent's listeners.
    Listener(ListenerKind),
    /// To whoever listens: the kernel goes on as if there were no hook.
    Pass(Verdict),
    /// Refused.
    Refuse(Verdict),
}

impl Arrival {
    /// The rules, in their order. `admitted` is asked only where the answer matters.
    #[inline(always)]
    pub fn route(&self, pod: &Pod, admitted: impl FnOnce() -> bool) -> Route {
        // (a) Not for the pod: what it opens itself goes to the agent. A socket that is bound to
        // the device shows that device instead of lo, hence the second condition.
        if !pod.owns(&self.local) {
            if self.local.is(&self.remote) {
                // Its own address that the mesh does not know (link-local, secondary): captured
                // packets carry the pod's address as source, so this is the pod with itself. Such
                // packets show the address's device instead of lo. From outside nobody gets further
                // than a SYN with it: the answer stays in the pod.
                return Route::Pass(Verdict::LookupSelf);
            }
            if self.over_loopback || pod.has(&self.remote) {
                return Route::Listener(ListenerKind::Outbound);
            }
            return match pod.mode() {
                Mode::Permissive => Route::Pass(Verdict::LookupUnknownAddressPassed),
                Mode::Strict => Route::Refuse(Verdict::LookupUnknownAddressRefused),
            };
        }
        // (b) The pod talks to itself.
        if pod.owns(&self.remote) {
            return Route::Pass(Verdict::LookupSelf);
        }
        // (c) A connection that was authorized where it was opened.
        if admitted() {
            return Route::Pass(Verdict::LookupAdmitted);
        }
        // (d) Nobody but an admitted delivery has a foreign source on lo.
        if self.over_loopback {
            return Route::Refuse(Verdict::LookupForeignSourceRefused);
        }
        // (e), (f)
        Route::Listener(if self.local_port == HBONE_PORT {
            ListenerKind::Hbone
        } else {
            ListenerKind::Inbound
        })
    }

    /// What happens when the listener of a [`Route::Listener`] is missing. A tunnel is never the
    /// app's, so it is refused in every mode.
    #[inline(always)]
    #[must_use]
    pub const fn without_listener(pod: &Pod, kind: ListenerKind) -> Route {
        match (kind, pod.mode()) {
            (ListenerKind::Hbone, _) | (_, Mode::Strict) => {
                Route::Refuse(Verdict::LookupNoListenerRefused)
            }
            (_, Mode::Permissive) => Route::Pass(Verdict::LookupNoListenerPassed),
        }
    }
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    const OWN: &str = "10.0.0.2";
    const PEER: &str = "10.0.0.9";
    const SERVICE: &str = "10.96.0.1";

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn pod(mode: Mode) -> Pod {
        Pod::new(address(OWN), address("fd00::2"), mode)
    }

    #[derive(Clone, Copy)]
    enum Over {
        Lo,
        Eth0,
    }

    fn arrival(remote: &str, local: &str, port: u16, over: Over) -> Arrival {
        Arrival {
            local: address(local),
            remote: address(remote),
            local_port: port,
            over_loopback: matches!(over, Over::Lo),
        }
    }

    fn route(mode: Mode, remote: &str, local: &str, over: Over) -> Route {
        arrival(remote, local, 8080, over).route(&pod(mode), || false)
    }

    #[test]
    fn captured_packets_go_to_the_outbound_listener_over_lo_and_over_a_bound_device() {
        for over in [Over::Lo, Over::Eth0] {
            assert_eq!(
                route(Mode::Strict, OWN, SERVICE, over),
                Route::Listener(ListenerKind::Outbound)
            );
            assert_eq!(
                route(Mode::Strict, "fd00::2", "fd00::99", over),
                Route::Listener(ListenerKind::Outbound)
            );
        }
    }

    #[test]
    fn an_outside_peer_does_not_reach_the_outbound_listener_through_an_unknown_address() {
        assert_eq!(
            route(Mode::Strict, PEER, "10.0.0.77", Over::Eth0),
            Route::Refuse(Verdict::LookupUnknownAddressRefused)
        );
        assert_eq!(
            route(Mode::Permissive, PEER, "fe80::2", Over::Eth0),
            Route::Pass(Verdict::LookupUnknownAddressPassed)
        );
    }

    #[test]
    fn a_pod_that_talks_to_itself_is_left_alone() {
        for (remote, local, over) in [
            (OWN, OWN, Over::Lo),
            (OWN, OWN, Over::Eth0),
            ("127.0.0.1", OWN, Over::Lo),
            (OWN, "127.0.0.1", Over::Lo),
            ("127.0.0.1", "127.0.0.1", Over::Lo),
            ("::1", "::1", Over::Lo),
            ("fd00::2", "::1", Over::Lo),
            ("10.0.0.77", "10.0.0.77", Over::Lo),
            ("10.0.0.77", "10.0.0.77", Over::Eth0),
            ("fe80::2", "fe80::2", Over::Eth0),
        ] {
            assert_eq!(
                route(Mode::Strict, remote, local, over),
                Route::Pass(Verdict::LookupSelf),
                "{remote} to {local}"
            );
        }
    }

    #[test]
    fn an_admitted_tuple_passes_to_the_app_on_every_port() {
        for port in [8080, HBONE_PORT] {
            for over in [Over::Lo, Over::Eth0] {
                assert_eq!(
                    arrival(PEER, OWN, port, over).route(&pod(Mode::Strict), || true),
                    Route::Pass(Verdict::LookupAdmitted)
                );
            }
        }
    }

    #[test]
    fn a_foreign_source_on_lo_is_refused_even_if_permissive() {
        for mode in [Mode::Strict, Mode::Permissive] {
            assert_eq!(
                route(mode, PEER, OWN, Over::Lo),
                Route::Refuse(Verdict::LookupForeignSourceRefused)
            );
        }
    }

    #[test]
    fn the_hbone_port_and_all_others_have_their_listeners() {
        let of = |port| arrival(PEER, OWN, port, Over::Eth0).route(&pod(Mode::Strict), || false);
        assert_eq!(of(HBONE_PORT), Route::Listener(ListenerKind::Hbone));
        assert_eq!(of(8080), Route::Listener(ListenerKind::Inbound));
    }

    #[test]
    fn a_missing_listener_is_a_pass_only_for_plaintext_of_a_permissive_pod() {
        let strict = pod(Mode::Strict);
        let permissive = pod(Mode::Permissive);
        for kind in [
            ListenerKind::Outbound,
            ListenerKind::Inbound,
            ListenerKind::Hbone,
        ] {
            assert!(matches!(
                Arrival::without_listener(&strict, kind),
                Route::Refuse(_)
            ));
        }
        assert!(matches!(
            Arrival::without_listener(&permissive, ListenerKind::Inbound),
            Route::Pass(_)
        ));
        assert!(matches!(
            Arrival::without_listener(&permissive, ListenerKind::Hbone),
            Route::Refuse(_)
        ));
    }
}
