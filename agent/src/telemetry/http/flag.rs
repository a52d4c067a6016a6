//! Why an answer is what it is, in one word.

use std::fmt;

use http::HeaderName;
use serde::Serialize;

/// The response header that says why the mesh itself answered: one of [`ResponseFlag`]'s words.
pub const REASON_HEADER: HeaderName = HeaderName::from_static("x-undermesh-reason");

/// Why the mesh answered, cut, or changed the way of a request. The same word stands in the header
/// [`REASON_HEADER`], in the access log and in the metrics' label `flag`. A request that a server
/// answered as it should has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ResponseFlag {
    /// The destination's circuit breaker is open.
    CircuitOpen,
    /// No rule of the attached routes matches.
    NoRoute,
    /// The destination has no endpoint.
    NoEndpoint,
    /// The rule leads to something that is not there or may not be referred to.
    InvalidBackend,
    /// Above a rate limit.
    RateLimited,
    /// Shed: a limit of connections, requests or memory is reached, or a queue stands too long.
    Overload,
    /// Delayed or failed on purpose.
    FaultInjected,
    /// A filter of the route answers by itself: a redirect, a CORS preflight.
    DirectResponse,
    /// The policy's fallback answered: another backend, or a fixed response.
    Fallback,
    /// Policy denies it.
    Denied,
    /// The request is malformed, smuggled or too large.
    BadRequest,
    /// No connection to an endpoint came about.
    ConnectFailed,
    /// The upstream connection or stream broke.
    UpstreamReset,
    /// An attempt took too long.
    UpstreamTimeout,
    /// The request as a whole took too long.
    RequestTimeout,
    /// A stream was silent for too long, or lasted longer than is allowed.
    StreamTimeout,
    /// The upstream's answer was not understood.
    UpstreamMalformed,
    /// The client went away.
    ClientGone,
    /// The request's task ended without a word: the connection under it was gone.
    Cancelled,
    /// The agent could not do its part.
    Internal,
}

impl ResponseFlag {
    /// Every flag, in the order of their declaration.
    pub const ALL: [Self; 20] = [
        Self::CircuitOpen,
        Self::NoRoute,
        Self::NoEndpoint,
        Self::InvalidBackend,
        Self::RateLimited,
        Self::Overload,
        Self::FaultInjected,
        Self::DirectResponse,
        Self::Fallback,
        Self::Denied,
        Self::BadRequest,
        Self::ConnectFailed,
        Self::UpstreamReset,
        Self::UpstreamTimeout,
        Self::RequestTimeout,
        Self::StreamTimeout,
        Self::UpstreamMalformed,
        Self::ClientGone,
        Self::Cancelled,
        Self::Internal,
    ];

    /// The word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::CircuitOpen => "circuit_open",
            Self::NoRoute => "no_route",
            Self::NoEndpoint => "no_endpoint",
            Self::InvalidBackend => "invalid_backend",
            Self::RateLimited => "rate_limited",
            Self::Overload => "overload",
            Self::FaultInjected => "fault_injected",
            Self::DirectResponse => "direct_response",
            Self::Fallback => "fallback",
            Self::Denied => "denied",
            Self::BadRequest => "bad_request",
            Self::ConnectFailed => "connect_failed",
            Self::UpstreamReset => "upstream_reset",
            Self::UpstreamTimeout => "upstream_timeout",
            Self::RequestTimeout => "request_timeout",
            Self::StreamTimeout => "stream_timeout",
            Self::UpstreamMalformed => "upstream_malformed",
            Self::ClientGone => "client_gone",
            Self::Cancelled => "cancelled",
            Self::Internal => "internal",
        }
    }
}

impl fmt::Display for ResponseFlag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flag_is_one_word_that_serializes_as_itself_and_fits_a_header() {
        for (place, flag) in ResponseFlag::ALL.into_iter().enumerate() {
            assert_eq!(flag as usize, place);
            assert_eq!(serde_json::to_value(flag).unwrap(), flag.as_str());
            let word = flag.as_str();
            assert!(word.bytes().all(|c| c.is_ascii_lowercase() || c == b'_'));
        }
    }
}
