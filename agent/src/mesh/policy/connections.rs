//! Connections and streams to a destination: how many, and how long.

use std::time::Duration;

use crate::resilience::validate::{Faults, Validate};

/// Limits of connections to a Service's port. All hold at the source, for all pods of a node
/// together: the destination sees each limit times the number of nodes that have clients of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Upstream connections of this node, of all its pods and to all endpoints. Range 1 to
    /// 1,000,000, default none: the pool's own bounds hold. Requests and opaque TCP connections that
    /// come at the limit wait in one line; the latter for as long as a connection may take.
    pub connections: Option<u32>,
    /// Requests and opaque TCP connections of this node that may wait for a connection. Range 0 to
    /// 1,000,000, default 1,024. One more is answered with 503 (`overload`), or reset.
    pub pending: u32,
    /// Requests after which an upstream connection is used no more. Range 1 to 4,294,967,295,
    /// default no limit.
    pub requests_per_connection: Option<u32>,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            connections: None,
            pending: 1_024,
            requests_per_connection: None,
        }
    }
}

impl Validate for ConnectionLimits {
    fn check(&self, at: &str, faults: &mut Faults) {
        const MOST: u32 = 1_000_000;
        faults.range(self.connections.unwrap_or(1), 1, MOST, at, "connections");
        faults.range(self.pending, 0, MOST, at, "pending");
        faults.range(
            self.requests_per_connection.unwrap_or(1),
            1,
            u32::MAX,
            at,
            "requestsPerConnection",
        );
    }
}

/// How long connections and streams may be silent, and last. All hold at the source, for each
/// connection or stream by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamTimeouts {
    /// A connection to an endpoint, and how long an opaque one waits for its place where connections
    /// are limited. Range 1 ms to 1 min; none: what the mesh says
    /// ([`crate::mesh::MeshConfig::connect_timeout`]).
    pub connect: Option<Duration>,
    /// An upstream HTTP connection without a request, or an opaque TCP connection on which nothing
    /// moves in either direction, is closed after this. Range 1 ms to 24 h; none: the pool's own
    /// time for HTTP, and no limit for opaque TCP.
    pub idle: Option<Duration>,
    /// A request on which nothing moves in either direction, after its answer has begun, is reset
    /// after this. Range 1 ms to 24 h, default 5 min (Envoy's); none is no limit.
    pub stream_idle: Option<Duration>,
    /// A request, or an opaque TCP connection, is reset after this, whatever moves. Range 1 ms to
    /// 24 h, default no limit.
    pub max_duration: Option<Duration>,
}

impl Default for StreamTimeouts {
    fn default() -> Self {
        Self {
            connect: None,
            idle: None,
            stream_idle: Some(Duration::from_secs(300)),
            max_duration: None,
        }
    }
}

impl Validate for StreamTimeouts {
    fn check(&self, at: &str, faults: &mut Faults) {
        const LEAST: Duration = Duration::from_millis(1);
        const MOST: Duration = Duration::from_secs(86_400);
        const MINUTE: Duration = Duration::from_secs(60);
        let connect = self.connect.unwrap_or(LEAST);
        faults.duration(connect, LEAST, MINUTE, at, "connect");
        for (field, value) in [
            ("idle", self.idle),
            ("streamIdle", self.stream_idle),
            ("maxDuration", self.max_duration),
        ] {
            faults.duration(value.unwrap_or(LEAST), LEAST, MOST, at, field);
        }
    }
}
