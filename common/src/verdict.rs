//! How a hook decided, each with a counter.

macro_rules! verdicts {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// How a hook decided. The number is the index of its counter in the per-CPU map.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Verdict {
            $($(#[$doc])* $variant,)*
        }

        impl Verdict {
            /// Every verdict, in the order of its number.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The name under which it is counted, in snake case.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

verdicts! {
    /// connect: an enrolled pod's connection goes to the agent.
    ConnectCaptured = "connect_captured",
    /// connect: not a destination of the mesh; native.
    ConnectNative = "connect_native",
    /// connect: one of the pod's own addresses or loopback; native.
    ConnectOwnAddress = "connect_own_address",
    /// connect: from an address that is not the pod's to one that is; ECONNREFUSED. `sk_lookup`
    /// cannot see that one: packets to an own address show the address's interface, not lo, unless
    /// the socket is bound to lo.
    ConnectForeignSourceRefused = "connect_foreign_source_refused",
    /// connect: one of the agent's sockets; native.
    ConnectOwnSocket = "connect_own_socket",
    /// connect: one of the agent's sockets, of which the kernel refused an option; EPERM.
    ConnectOwnSocketFailed = "connect_own_socket_failed",
    /// connect: the pod has no address of the destination's family; native.
    ConnectFamilyAbsent = "connect_family_absent",
    /// connect: the agent does not listen, the pod is permissive; native.
    ConnectAgentGonePassed = "connect_agent_gone_passed",
    /// connect: the agent does not listen, the pod is strict; ECONNREFUSED.
    ConnectAgentGoneRefused = "connect_agent_gone_refused",
    /// connect: the kernel refused mark or note, the pod is permissive; native.
    ConnectMarkFailedPassed = "connect_mark_failed_passed",
    /// connect: the kernel refused mark or note, the pod is strict; ECONNREFUSED.
    ConnectMarkFailedRefused = "connect_mark_failed_refused",
    /// connect: a probing cgroup to a declared probe port of an enrolled pod; its tuple is admitted.
    ConnectProbe = "connect_probe",
    /// connect: a probing cgroup to another port of an enrolled pod; it goes on as any connection
    /// from outside the mesh, which a strict pod refuses.
    ConnectProbeUndeclared = "connect_probe_undeclared",
    /// connect: from outside the enrolled pods, and not from a probing cgroup, to a declared probe
    /// port; it goes on as any connection from outside the mesh, which a strict pod refuses.
    ConnectProbeForeign = "connect_probe_foreign",
    /// connect: as [`Self::ConnectProbe`], and the kernel refused the note; not admitted.
    ConnectProbeFailed = "connect_probe_failed",
    /// setsockopt, sock_ops: a captured socket was to lose its mark; it keeps it.
    MarkRestored = "mark_restored",
    /// setsockopt: an MPTCP socket of an enrolled pod was to change its mark after connect(2); EPERM.
    MarkChangeRefused = "mark_change_refused",
    /// sock_ops: as above, and the kernel refused to set it.
    MarkRestoreFailed = "mark_restore_failed",
    /// sock_ops: the tuple of one of the agent's sockets was admitted.
    TupleAdmitted = "tuple_admitted",
    /// sock_ops: the admission map is full, or the kernel refused; the destination will refuse the connection.
    TupleAdmissionFailed = "tuple_admission_failed",
    /// sock_ops: an admitted connection is closed, its tuple is removed.
    TupleRemoved = "tuple_removed",
    /// sock_ops: the kernel refused to watch a pod's native connection; it is in no figure of them.
    NativeUnwatched = "native_unwatched",
    /// sk_lookup: to the outbound listener.
    LookupOutbound = "lookup_outbound",
    /// sk_lookup: to the inbound listener.
    LookupInbound = "lookup_inbound",
    /// sk_lookup: to the HBONE listener.
    LookupHbone = "lookup_hbone",
    /// sk_lookup: the pod talks to itself; passed.
    LookupSelf = "lookup_self",
    /// sk_lookup: an admitted tuple; passed to the app.
    LookupAdmitted = "lookup_admitted",
    /// sk_lookup: from outside to an address that the mesh does not know, the pod is permissive; passed.
    LookupUnknownAddressPassed = "lookup_unknown_address_passed",
    /// sk_lookup: the same, the pod is strict; refused.
    LookupUnknownAddressRefused = "lookup_unknown_address_refused",
    /// sk_lookup: over lo with a foreign source that nobody admitted; refused.
    LookupForeignSourceRefused = "lookup_foreign_source_refused",
    /// sk_lookup: the listener is missing, the pod is permissive; passed.
    LookupNoListenerPassed = "lookup_no_listener_passed",
    /// sk_lookup: the listener is missing; refused (strict, or a tunnel, which is never the app's).
    LookupNoListenerRefused = "lookup_no_listener_refused",
}

impl Verdict {
    /// How many there are: the size of the counter map.
    pub const COUNT: u32 = Self::ALL.len() as u32;
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn numbers_are_indexes_and_names_are_unique() {
        for (index, verdict) in Verdict::ALL.iter().enumerate() {
            assert_eq!(*verdict as usize, index);
        }
        let names: BTreeSet<_> = Verdict::ALL.iter().map(|verdict| verdict.name()).collect();
        assert_eq!(names.len(), Verdict::ALL.len());
    }
}
