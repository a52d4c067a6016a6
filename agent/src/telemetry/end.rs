//! How connections end.

use std::fmt;

use serde::Serialize;

/// One side of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The client.
    Source,
    /// The server.
    Destination,
}

/// How the owner of a connection says that it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum End {
    /// Both sides ended their streams in order.
    Complete,
    /// One side ended abnormally, and the other was told by a reset.
    Reset {
        /// Which side began.
        by: Side,
    },
    /// The mesh did not make the connection, or ended it.
    Failed(FailureReason),
}

/// Value of the field `close_reason`: every connection ends with exactly one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CloseReason {
    /// Both sides ended their streams in order.
    Complete,
    /// The client ended abnormally.
    ResetBySource,
    /// The server ended abnormally.
    ResetByDestination,
    /// The mesh did not make the connection, or ended it.
    Failed,
    /// The task that owned the connection ended without saying why: cancelled, or a fault of the
    /// agent.
    Aborted,
}

impl CloseReason {
    /// Every reason, in the order of their declaration.
    pub const ALL: [Self; 5] = [
        Self::Complete,
        Self::ResetBySource,
        Self::ResetByDestination,
        Self::Failed,
        Self::Aborted,
    ];

    /// Value of the label `close_reason`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::ResetBySource => "reset_by_source",
            Self::ResetByDestination => "reset_by_destination",
            Self::Failed => "failed",
            Self::Aborted => "aborted",
        }
    }

    pub(super) fn index(self) -> usize {
        self as usize
    }
}

impl From<End> for CloseReason {
    fn from(end: End) -> Self {
        match end {
            End::Complete => Self::Complete,
            End::Reset { by: Side::Source } => Self::ResetBySource,
            End::Reset {
                by: Side::Destination,
            } => Self::ResetByDestination,
            End::Failed(_) => Self::Failed,
        }
    }
}

/// Why the mesh did not make a connection, or ended it: label `reason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureReason {
    /// The destination means nothing to the mesh, or no route leads to it.
    NoRoute,
    /// The Service has no ready endpoint.
    NoEndpoint,
    /// The destination's circuit breaker is open.
    CircuitOpen,
    /// The endpoint refused the TCP connection.
    ConnectRefused,
    /// No endpoint answered within the connect timeout.
    ConnectTimeout,
    /// No way to the endpoint: no route in the network, or the host is down.
    Unreachable,
    /// All source ports towards the endpoint are in use.
    NoSourcePort,
    /// The TLS handshake failed.
    Tls,
    /// The peer proved another identity than the one that belongs to the endpoint, or none.
    PeerIdentity,
    /// This node has no certificate for the pod yet, or its certificate expired.
    NoCertificate,
    /// Policy denied it.
    Denied,
    /// The peer has no mesh identity, and the pod is STRICT.
    PlaintextRefused,
    /// The endpoint's pod is of this node and not in the mesh yet, and one of both is STRICT.
    NotEnrolled,
    /// The peer's proxy refused the tunnel for a reason of its own (HTTP 503 and others).
    TunnelRefused,
    /// The tunnel under the connection was lost.
    TunnelLost,
    /// The request for a tunnel was malformed, or was for an address that is not the pod's.
    BadRequest,
    /// The socket did not come by the way that its listener is for.
    WrongRole,
    /// The pod left the mesh or the agent was stopped, and the time to finish was over.
    Drained,
    /// Nothing was sent for longer than is allowed.
    Idle,
    /// A limit was reached: connections, memory or streams.
    Overload,
    /// The pod ended.
    PodGone,
    /// The agent could not do its part: an error of the operating system, or its own.
    Internal,
}

impl FailureReason {
    /// Every reason, in the order of their declaration.
    pub const ALL: [Self; 22] = [
        Self::NoRoute,
        Self::NoEndpoint,
        Self::CircuitOpen,
        Self::ConnectRefused,
        Self::ConnectTimeout,
        Self::Unreachable,
        Self::NoSourcePort,
        Self::Tls,
        Self::PeerIdentity,
        Self::NoCertificate,
        Self::Denied,
        Self::PlaintextRefused,
        Self::NotEnrolled,
        Self::TunnelRefused,
        Self::TunnelLost,
        Self::BadRequest,
        Self::WrongRole,
        Self::Drained,
        Self::Idle,
        Self::Overload,
        Self::PodGone,
        Self::Internal,
    ];

    /// Value of the label `reason`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoRoute => "no_route",
            Self::NoEndpoint => "no_endpoint",
            Self::CircuitOpen => "circuit_open",
            Self::ConnectRefused => "connect_refused",
            Self::ConnectTimeout => "connect_timeout",
            Self::Unreachable => "unreachable",
            Self::NoSourcePort => "no_source_port",
            Self::Tls => "tls",
            Self::PeerIdentity => "peer_identity",
            Self::NoCertificate => "no_certificate",
            Self::Denied => "denied",
            Self::PlaintextRefused => "plaintext_refused",
            Self::NotEnrolled => "not_enrolled",
            Self::TunnelRefused => "tunnel_refused",
            Self::TunnelLost => "tunnel_lost",
            Self::BadRequest => "bad_request",
            Self::WrongRole => "wrong_role",
            Self::Drained => "drained",
            Self::Idle => "idle",
            Self::Overload => "overload",
            Self::PodGone => "pod_gone",
            Self::Internal => "internal",
        }
    }

    pub(super) fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for FailureReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_stands_at_its_own_index_and_serializes_as_its_label() {
        for (place, reason) in FailureReason::ALL.into_iter().enumerate() {
            assert_eq!(reason.index(), place);
            assert_eq!(
                serde_json::to_value(reason).unwrap(),
                serde_json::Value::from(reason.as_str())
            );
        }
        for (place, reason) in CloseReason::ALL.into_iter().enumerate() {
            assert_eq!(reason.index(), place);
            assert_eq!(
                serde_json::to_value(reason).unwrap(),
                serde_json::Value::from(reason.as_str())
            );
        }
    }
}
