//! Which route is meant.

use std::fmt;

use super::super::ObjectName;

/// The kinds of routes, by precedence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RouteKind {
    /// `GRPCRoute`.
    Grpc,
    /// `HTTPRoute`.
    Http,
    /// `TLSRoute`.
    Tls,
    /// `TCPRoute`.
    Tcp,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteId {
    /// Its kind.
    pub kind: RouteKind,
    /// Its namespace and name.
    pub name: ObjectName,
}

impl fmt::Display for RouteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            RouteKind::Grpc => "GRPCRoute",
            RouteKind::Http => "HTTPRoute",
            RouteKind::Tls => "TLSRoute",
            RouteKind::Tcp => "TCPRoute",
        };
        write!(f, "{kind}/{}", self.name)
    }
}
