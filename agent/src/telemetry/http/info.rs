//! What is known about a request.

use std::net::SocketAddr;
use std::time::Duration;

use http::Method;
use http::uri::PathAndQuery;
use serde::Serialize;

/// What a request looks like when its head was read. Cheap to make: [`Method`] and [`PathAndQuery`]
/// share the head's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestInfo {
    /// Its method.
    pub method: Method,
    /// Its protocol.
    pub protocol: HttpProtocol,
    /// `Host`, or `:authority`.
    pub host: Option<Box<str>>,
    /// Its path. The query is not logged: it may hold secrets.
    pub path: Option<PathAndQuery>,
    /// `x-request-id`.
    pub request_id: Option<Box<str>>,
}

/// What a request is spoken in: field `request_protocol`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HttpProtocol {
    /// HTTP/1.0.
    Http10,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2.
    Http2,
    /// gRPC, over HTTP/2.
    Grpc,
}

impl HttpProtocol {
    /// The field's value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Http10 => "http/1.0",
            Self::Http11 => "http/1.1",
            Self::Http2 => "http/2",
            Self::Grpc => "grpc",
        }
    }
}

/// One attempt of a request, after its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttemptView {
    /// Where it went; none if no endpoint was to be had.
    pub endpoint: Option<SocketAddr>,
    /// How it ended: the label of `resilience::Outcome`, or a status.
    pub outcome: &'static str,
    /// The status that came back.
    pub status: Option<u16>,
    /// How long it waited before: backoff, and for a place in a queue.
    pub waited: Duration,
    /// How long its connection took; zero if there was one.
    pub connect: Duration,
    /// From its sending to its answer's head, or to its failure.
    pub took: Duration,
}

/// How the exchange ended, whatever its status: field `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RequestEnd {
    /// The answer was sent to its last byte.
    Complete,
    /// The client ended it early.
    ResetBySource,
    /// The server ended it early, after its answer had begun.
    ResetByDestination,
    /// The mesh ended it after the answer had begun: a timeout of the stream, a drain.
    Cut,
    /// The task that owned it ended without saying why.
    Cancelled,
}

impl RequestEnd {
    /// The field's value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::ResetBySource => "reset_by_source",
            Self::ResetByDestination => "reset_by_destination",
            Self::Cut => "cut",
            Self::Cancelled => "cancelled",
        }
    }
}
