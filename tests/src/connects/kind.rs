//! The kinds of connect that there are.

use clap::ValueEnum;
use serde::Serialize;

/// How a connection is made, or to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Kind {
    /// connect(2) that waits.
    Blocking,
    /// connect(2) that does not.
    NonBlocking,
    /// `IORING_OP_CONNECT`.
    IoUring,
    /// `TCP_FASTOPEN_CONNECT`: the SYN goes with the first write.
    FastOpenConnect,
    /// `MSG_FASTOPEN`: no connect at all.
    FastOpenSend,
    /// `IPPROTO_MPTCP`.
    Mptcp,
    /// From an IPv6 socket to `::ffff:a.b.c.d`.
    V4Mapped,
    /// Bound to the pod's address.
    BoundSource,
    /// Bound to eth0 before connect.
    BoundDevice,
    /// Bound to eth0 after a deferred connect.
    BoundDeviceLate,
    /// The same by a process without any capability.
    BoundDeviceUnprivileged,
    /// Bound to eth0 while its SYN is under way for the second time.
    BoundDeviceRetransmit,
    /// With a mark of the app's own, which it must keep.
    Marked,
    /// All marks taken off after a deferred connect.
    UnmarkedLate,
    /// All marks taken off while its SYN is under way for the second time.
    UnmarkedRetransmit,
    /// All marks but one of the app's own taken off in the middle of the connection.
    UnmarkedOpen,
    /// `SO_DONTROUTE`.
    DontRoute,
    /// Connected to something that refuses, dissolved with `AF_UNSPEC`, connected again.
    Reconnected,
    /// From one source port to one destination again, while the first is in TIME_WAIT.
    PortReuse,
    /// By a process that moved to another cgroup.
    MovedCgroup,
    /// By a thread that went to another network namespace: the socket stays where it is.
    MovedThread,
    /// With sockets that were made before the pod was in the mesh.
    MadeBefore,
    /// With a socket that came from another process.
    Passed,
    /// To a server in the same pod, over `lo`.
    ToLoopback,
    /// To a server in the same pod, at the pod's address.
    ToOwnAddress,
    /// To a server in the same pod, through its Service.
    Hairpin,
    /// To a second address of the own pod, which the mesh does not know.
    ToSecondary,
    /// To the own link-local address.
    ToLinkLocal,
    /// From a second address of the own pod: the mesh cannot vouch for it, and it must not pass.
    FromSecondary,
    /// Where every SYN is answered with a cookie (`tcp_syncookies=2`).
    SynCookies,
    /// To a port of the mesh at which no app listens: it must be told so, and soon.
    ToClosedPort,
    /// Closed by the client, again and again.
    Many,
    /// Open at once.
    Concurrent,
    /// Open at once, more than the node has room for: those beyond are reset and counted.
    PastTheLimit,
}

/// What must happen to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// It goes through the agents.
    Captured,
    /// It works and the agent has nothing to do with it.
    Native,
    /// It fails at once and reaches nobody.
    Refused,
    /// It goes through the agents, or is reset and counted as one too many.
    Bounded,
}

impl Kind {
    /// What must happen to it.
    #[must_use]
    pub fn expected(self) -> Expected {
        match self {
            Self::ToLoopback | Self::ToOwnAddress | Self::ToSecondary | Self::ToLinkLocal => {
                Expected::Native
            }
            Self::FromSecondary | Self::ToClosedPort => Expected::Refused,
            Self::PastTheLimit => Expected::Bounded,
            _ => Expected::Captured,
        }
    }

    /// As on the command line and in reports.
    #[must_use]
    pub fn name(self) -> String {
        self.to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }
}
