//! How tunnels and their streams fail.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use h2::Reason;
use thiserror::Error;

use crate::mesh::SpiffeId;

/// What was being waited for when the time ran out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The TCP connection.
    Dial,
    /// TLS and the first frames of HTTP/2.
    Handshake,
    /// The answer to CONNECT.
    Answer,
}

impl Stage {
    fn hint(self) -> &'static str {
        match self {
            Self::Dial => " (does a NetworkPolicy block this port?)",
            Self::Handshake | Self::Answer => "",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dial => "TCP connection",
            Self::Handshake => "handshake",
            Self::Answer => "answer to CONNECT",
        })
    }
}

/// Why there is no tunnel, or no stream through it. Cheap to clone: those who waited for one
/// handshake share its error.
#[derive(Debug, Clone, Error)]
pub enum TunnelError {
    /// The TCP connection failed.
    #[error("cannot connect to {address}: {source}")]
    Dial {
        /// Where to.
        address: SocketAddr,
        /// What the dialler said.
        source: Arc<io::Error>,
    },
    /// A bounded wait came to its bound. A NetworkPolicy that does not allow port 15008 looks
    /// like this at [`Stage::Dial`].
    #[error("no {stage} from {address} within {after:?}{}", .stage.hint())]
    Timeout {
        /// The peer.
        address: SocketAddr,
        /// What was awaited.
        stage: Stage,
        /// The bound.
        after: Duration,
    },
    /// TLS failed: no common suite, an untrusted or expired certificate, none at all, …
    #[error("TLS with {address}: {source}")]
    Tls {
        /// The peer.
        address: SocketAddr,
        /// What rustls said.
        source: Arc<io::Error>,
    },
    /// The peer's certificate is valid but names no workload.
    #[error("the certificate of {address} names no workload: {reason}")]
    PeerCertificate {
        /// The peer.
        address: SocketAddr,
        /// Why.
        reason: Arc<str>,
    },
    /// The peer is a workload, but not the expected one.
    #[error("{address} is {actual}, expected {}", Expected(.expected))]
    PeerIdentity {
        /// The peer.
        address: SocketAddr,
        /// Any of these would have done.
        expected: Arc<BTreeSet<SpiffeId>>,
        /// Who answered.
        actual: SpiffeId,
    },
    /// The peer negotiated something other than HTTP/2.
    #[error("{address} does not speak HTTP/2")]
    Protocol {
        /// The peer.
        address: SocketAddr,
    },
    /// The peer answered CONNECT with this HTTP status: 401 denied by its policy, 503 the app
    /// cannot be reached, 400 not understood.
    #[error("refused with status {status}")]
    Refused {
        /// The HTTP status.
        status: u16,
    },
    /// The tunnel or the stream broke before CONNECT was answered.
    #[error("tunnel to {address} broke: {reset}")]
    Broken {
        /// The peer.
        address: SocketAddr,
        /// How.
        reset: StreamReset,
    },
    /// As many tunnels as are allowed are open, and full.
    #[error("{address}: all {bound} allowed tunnels are in use")]
    Saturated {
        /// The peer.
        address: SocketAddr,
        /// The bound that was met.
        bound: usize,
    },
    /// The source pod ended meanwhile.
    #[error("the source pod is gone")]
    SourceGone,
    /// The peer sent more streams, or more resets, than it may.
    #[error("{address} sent a flood of {what}")]
    Flood {
        /// The peer.
        address: SocketAddr,
        /// Of what.
        what: &'static str,
    },
    /// The peer did not answer PING.
    #[error("{address} has been silent for {after:?}")]
    Silent {
        /// The peer.
        address: SocketAddr,
        /// For so long.
        after: Duration,
    },
}

struct Expected<'a>(&'a BTreeSet<SpiffeId>);

impl fmt::Display for Expected<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, id) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str(" or ")?;
            }
            write!(f, "{id}")?;
        }
        Ok(())
    }
}

impl TunnelError {
    pub(super) fn broken(address: SocketAddr, error: h2::Error) -> Self {
        match error.get_io() {
            // An alert is reported as InvalidData; so the peer's verdict on our
            // certificate, which comes after our side of the handshake, keeps its name.
            Some(io) if io.kind() == io::ErrorKind::InvalidData => Self::Tls {
                address,
                source: Arc::new(io::Error::new(io.kind(), io.to_string())),
            },
            _ => Self::Broken {
                address,
                reset: StreamReset::from(error),
            },
        }
    }

    /// Whether the peer said that this stream, not the tunnel, was too much.
    pub(super) fn is_refused_stream(&self) -> bool {
        matches!(self, Self::Broken { reset, .. } if reset.is_refused_stream())
    }

    pub(super) fn tls(address: SocketAddr, error: io::Error) -> Self {
        Self::Tls {
            address,
            source: Arc::new(error),
        }
    }
}

/// Who ended a stream out of order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetBy {
    /// RST_STREAM from the peer.
    Peer,
    /// The tunnel was lost, or closed by GOAWAY, with the stream in it.
    Tunnel,
    /// This side.
    Local,
}

/// A stream ended without END_STREAM: to be passed on as a TCP RST, never as a FIN.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("stream reset by {by:?}: {detail}")]
pub struct StreamReset {
    /// Who did it.
    pub by: ResetBy,
    /// The HTTP/2 error code (RFC 9113, section 7), if one was given.
    pub code: Option<u32>,
    detail: Arc<str>,
}

impl StreamReset {
    pub(super) fn local(detail: &str) -> Self {
        Self {
            by: ResetBy::Local,
            code: None,
            detail: detail.into(),
        }
    }

    pub(super) fn by_peer(mut self) -> Self {
        self.by = ResetBy::Peer;
        self
    }

    pub(super) fn is_refused_stream(&self) -> bool {
        self.by == ResetBy::Peer && self.code == Some(Reason::REFUSED_STREAM.into())
    }
}

impl From<h2::Error> for StreamReset {
    fn from(error: h2::Error) -> Self {
        let by = if error.is_go_away() || error.is_io() {
            ResetBy::Tunnel
        } else if error.is_remote() {
            ResetBy::Peer
        } else {
            ResetBy::Local
        };
        Self {
            by,
            code: error.reason().map(u32::from),
            detail: error.to_string().into(),
        }
    }
}

/// What to tell the peer when this side ends a stream out of order. None of these is CANCEL or
/// NO_ERROR, which ztunnel takes for a clean end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetReason {
    /// The TCP connection on our side was reset (CONNECT_ERROR; RFC 9113, section 8.5).
    Connection,
    /// This agent gave up (INTERNAL_ERROR).
    Internal,
}

impl From<ResetReason> for Reason {
    fn from(reason: ResetReason) -> Self {
        match reason {
            ResetReason::Connection => Self::CONNECT_ERROR,
            ResetReason::Internal => Self::INTERNAL_ERROR,
        }
    }
}

/// Why a server does not accept a CONNECT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// 400: not CONNECT, or not for this pod.
    BadRequest,
    /// 401: denied by policy.
    Denied,
    /// 503: the app refused, or may not be reached this way.
    Unavailable,
}

impl Refusal {
    /// The HTTP status on the wire.
    #[must_use]
    pub const fn status(self) -> http::StatusCode {
        match self {
            Self::BadRequest => http::StatusCode::BAD_REQUEST,
            Self::Denied => http::StatusCode::UNAUTHORIZED,
            Self::Unavailable => http::StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}
