//! Where a request or a connection to a Service goes: routes of the Gateway API, ready to be used.
//!
//! Everything here is pure and immutable: discovery compiles routes, a request only reads them.
//! [`RouteTable::select`] and [`Rule::choose`] are on the path of every request and allocate
//! nothing, but for a regular expression that looks at a header which is there twice.

mod attached;
mod filter;
mod header;
mod matching;
mod pattern;
mod rule;
mod session;
mod status;
mod stream;
mod table;
#[cfg(test)]
mod testing;
mod view;

pub use attached::{Attached, PortRoutes, Routes, ServiceRoutes};
pub use filter::{
    Cors, Credentials, Filter, FilterVerdict, Filters, Fraction, Frontend, HeaderModifier, Mirror,
    Origin, OriginPattern, OriginPatternError, PathModifier, Redirect, Rewrite, Scheme,
};
pub use header::{HeaderMatch, HeaderMatchKind};
pub use matching::{GrpcMatch, PathMatch, QueryMatch, RequestMatch, TargetMatch, ValueMatch};
pub use pattern::{PATTERN_SIZE_MAX, Pattern, PatternError};
pub use rule::{Backend, BackendTarget, InvalidBackend, RouteRetry, RouteTimeouts, Rule};
pub use session::{CookieLifetime, Session, SessionCarrier, SessionPersistence};
pub use status::{CONTROLLER, Condition, ConditionType, ParentStatus, RouteStatus, Truth};
pub use stream::{StreamRoutes, StreamRule};
pub use table::{RouteTable, Selected};
pub use view::{BackendView, RouteView, RuleView};

use std::fmt;

use serde::Serialize;

use super::ObjectName;

/// Kinds of routes. If several kinds are attached to one port of a Service the first is in force
/// and the others are not (GEP-1294, "Route types").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum RouteKind {
    /// `GRPCRoute`.
    #[serde(rename = "GRPCRoute")]
    Grpc,
    /// `HTTPRoute`.
    #[serde(rename = "HTTPRoute")]
    Http,
    /// `TLSRoute`.
    #[serde(rename = "TLSRoute")]
    Tls,
    /// `TCPRoute`.
    #[serde(rename = "TCPRoute")]
    Tcp,
}

impl fmt::Display for RouteKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Grpc => "GRPCRoute",
            Self::Http => "HTTPRoute",
            Self::Tls => "TLSRoute",
            Self::Tcp => "TCPRoute",
        })
    }
}

/// What tells one route from all others.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteId {
    /// Its kind.
    pub kind: RouteKind,
    /// Namespace and name.
    pub name: ObjectName,
}

impl fmt::Display for RouteId {
    /// `HTTPRoute/shop/web`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind, self.name)
    }
}

impl Serialize for RouteId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
