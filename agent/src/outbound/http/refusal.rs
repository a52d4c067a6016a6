//! Answers of our own: why the client does not get a server's.

use std::time::Duration;

use http::header::RETRY_AFTER;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};

use crate::http::{ProxyBody, is_grpc, own_response};
use crate::resilience::limit::{Axis, Limited, Rate, RatesSettings};
use crate::resilience::outcome::grpc;
use crate::resilience::{Code, Failure, Outcome};
use crate::telemetry::ResponseFlag;

/// IETF draft-ietf-httpapi-ratelimit-headers: the quota, and what is left of it.
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// Why the mesh itself answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// No rule of the attached routes is for this request.
    NoRoute,
    /// The rule leads to nothing that requests can be sent to.
    InvalidBackend,
    /// The destination has no endpoint.
    NoEndpoint,
    /// Its breaker is open. Nobody knows for how long while an operator holds it.
    CircuitOpen { retry_after: Option<Duration> },
    /// Above a rate limit.
    RateLimited(Limited),
    /// As many requests are in flight as may be.
    Overload,
    /// A failure on purpose.
    Fault(Code),
    /// The request took too long, all attempts together.
    RequestTimeout,
    /// Policy denies it.
    Denied,
    /// The last attempt failed.
    Failed(Outcome),
}

impl Refusal {
    pub(super) fn flag(self) -> ResponseFlag {
        match self {
            Self::NoRoute => ResponseFlag::NoRoute,
            Self::InvalidBackend => ResponseFlag::InvalidBackend,
            Self::NoEndpoint => ResponseFlag::NoEndpoint,
            Self::CircuitOpen { .. } => ResponseFlag::CircuitOpen,
            Self::RateLimited(_) => ResponseFlag::RateLimited,
            Self::Overload => ResponseFlag::Overload,
            Self::Fault(_) => ResponseFlag::FaultInjected,
            Self::RequestTimeout => ResponseFlag::RequestTimeout,
            Self::Denied => ResponseFlag::Denied,
            Self::Failed(outcome) => match outcome {
                Outcome::Unsent(_) => ResponseFlag::ConnectFailed,
                Outcome::Failure(Failure::Timeout) => ResponseFlag::UpstreamTimeout,
                Outcome::Failure(Failure::Malformed) => ResponseFlag::UpstreamMalformed,
                Outcome::Failure(_) => ResponseFlag::UpstreamReset,
                Outcome::Cancelled => ResponseFlag::ClientGone,
                Outcome::Shed | Outcome::Success | Outcome::CallerError(_) => {
                    ResponseFlag::Internal
                }
            },
        }
    }

    fn status(self) -> StatusCode {
        match self {
            Self::NoRoute => StatusCode::NOT_FOUND,
            Self::InvalidBackend => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Denied => StatusCode::FORBIDDEN,
            Self::RateLimited(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::RequestTimeout => StatusCode::GATEWAY_TIMEOUT,
            Self::NoEndpoint | Self::CircuitOpen { .. } | Self::Overload => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            // Checked when the policy was read.
            Self::Fault(Code::Http(status)) => {
                StatusCode::from_u16(status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE)
            }
            Self::Fault(Code::Grpc(_)) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Failed(outcome) => match outcome {
                Outcome::Failure(Failure::Timeout) => StatusCode::GATEWAY_TIMEOUT,
                Outcome::Failure(_) => StatusCode::BAD_GATEWAY,
                _ => StatusCode::SERVICE_UNAVAILABLE,
            },
        }
    }

    /// The answer to a request with these headers. `rates` are the limits, of which the answer to
    /// one above them tells.
    pub(super) fn respond(self, request: &HeaderMap, rates: &RatesSettings) -> Response<ProxyBody> {
        let reason = self.flag().as_str();
        let mut response = own_response(request, self.status(), reason);
        let headers = response.headers_mut();
        if is_grpc(request)
            && let Some(status) = self.grpc_status()
        {
            headers.insert(GRPC_STATUS, u16::from(status).into());
        }
        match self {
            Self::CircuitOpen { retry_after } => wait(headers, retry_after),
            Self::RateLimited(limited) => {
                wait(headers, limited.retry_after);
                quota(headers, limited, rates);
            }
            _ => {}
        }
        response
    }

    /// Where it is another than the HTTP status stands for.
    fn grpc_status(self) -> Option<u8> {
        match self {
            Self::Fault(Code::Grpc(status)) => Some(status),
            // gRPC's own clients take a connection that broke for this, and try again.
            Self::InvalidBackend | Self::Failed(Outcome::Failure(Failure::Reset)) => {
                Some(grpc::UNAVAILABLE)
            }
            _ => None,
        }
    }
}

/// `retry-after`, in whole seconds: never 0, which would say "at once".
fn wait(headers: &mut HeaderMap, after: Option<Duration>) {
    if let Some(after) = after {
        headers.insert(RETRY_AFTER, seconds(after).into());
    }
}

fn seconds(duration: Duration) -> u64 {
    (duration.as_secs_f64().ceil() as u64).max(1)
}

/// Tells of the limit that was reached: so many requests in so many seconds, none of which is left.
fn quota(headers: &mut HeaderMap, limited: Limited, rates: &RatesSettings) {
    let (name, rate) = match limited.axis {
        Axis::Source => ("source", rates.source),
        Axis::Route => ("route", rates.route),
        Axis::Total => ("total", rates.total),
    };
    let Some(Rate { per_second, burst }) = rate else {
        return;
    };
    let window = seconds(Duration::from_secs_f64(
        (f64::from(burst) / per_second.max(0.001)).min(1e9),
    ));
    let policy = format!("\"{name}\";q={burst};w={window}");
    let left = match limited.retry_after {
        Some(after) => format!("\"{name}\";r=0;t={}", seconds(after)),
        None => format!("\"{name}\";r=0"),
    };
    for (header, text) in [(RATE_LIMIT_POLICY, policy), (RATE_LIMIT, left)] {
        // Digits and fixed words.
        if let Ok(value) = HeaderValue::try_from(text) {
            headers.insert(header, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use http::header::CONTENT_TYPE;

    use super::*;
    use crate::http::REASON;
    use crate::resilience::Unsent;

    fn grpc_request() -> HeaderMap {
        HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("application/grpc"))])
    }

    #[test]
    fn every_answer_of_our_own_says_why_in_the_status_of_the_clients_protocol() {
        let limited = Limited {
            axis: Axis::Source,
            retry_after: None,
        };
        let circuit = Refusal::CircuitOpen { retry_after: None };
        let unsent = Outcome::Unsent(Unsent::ConnectFailed);
        for (refusal, http, grpc, reason) in [
            (Refusal::NoRoute, 404, "12", "no_route"),
            (Refusal::InvalidBackend, 500, "14", "invalid_backend"),
            (Refusal::NoEndpoint, 503, "14", "no_endpoint"),
            (circuit, 503, "14", "circuit_open"),
            (Refusal::RateLimited(limited), 429, "8", "rate_limited"),
            (Refusal::Overload, 503, "14", "overload"),
            (Refusal::Denied, 403, "7", "denied"),
            (Refusal::RequestTimeout, 504, "4", "request_timeout"),
            (Refusal::Fault(Code::Http(418)), 418, "2", "fault_injected"),
            (Refusal::Fault(Code::Grpc(5)), 503, "5", "fault_injected"),
            (Refusal::Failed(unsent), 503, "14", "connect_failed"),
            (
                Refusal::Failed(Outcome::Failure(Failure::Reset)),
                502,
                "14",
                "upstream_reset",
            ),
            (
                Refusal::Failed(Outcome::Failure(Failure::Timeout)),
                504,
                "4",
                "upstream_timeout",
            ),
            (
                Refusal::Failed(Outcome::Failure(Failure::Malformed)),
                502,
                "14",
                "upstream_malformed",
            ),
        ] {
            let rates = RatesSettings::default();
            let answer = refusal.respond(&HeaderMap::new(), &rates);
            assert_eq!(answer.status(), http, "{refusal:?}");
            assert_eq!(answer.headers()[REASON], reason);
            let answer = refusal.respond(&grpc_request(), &rates);
            assert_eq!(answer.status(), 200, "{refusal:?}");
            assert_eq!(answer.headers()[GRPC_STATUS], grpc, "{refusal:?}");
            assert_eq!(answer.headers()[REASON], reason);
        }
    }

    #[test]
    fn who_is_above_a_limit_is_told_of_it_and_how_long_to_wait() {
        let rates = RatesSettings {
            source: Some(Rate {
                per_second: 2.0,
                burst: 10,
            }),
            ..RatesSettings::default()
        };
        let limited = Refusal::RateLimited(Limited {
            axis: Axis::Source,
            retry_after: Some(Duration::from_millis(1200)),
        });
        let answer = limited.respond(&HeaderMap::new(), &rates);
        assert_eq!(answer.headers()[RETRY_AFTER], "2");
        assert_eq!(answer.headers()[RATE_LIMIT_POLICY], "\"source\";q=10;w=5");
        assert_eq!(answer.headers()[RATE_LIMIT], "\"source\";r=0;t=2");
    }

    #[test]
    fn an_open_breaker_asks_for_a_second_at_least() {
        let open = |retry_after| {
            let refusal = Refusal::CircuitOpen { retry_after };
            let answer = refusal.respond(&HeaderMap::new(), &RatesSettings::default());
            answer.headers().get(RETRY_AFTER).cloned()
        };
        assert_eq!(open(Some(Duration::from_millis(100))).unwrap(), "1");
        assert_eq!(open(None), None);
    }
}
