//! Answers of our own, which always say why.

use http::header::{CONTENT_TYPE, HeaderName};
use http::{HeaderMap, HeaderValue, Response, StatusCode};

use super::body::ProxyBody;

pub use crate::telemetry::REASON_HEADER as REASON;

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// Whether a request is gRPC, by its content type. gRPC-Web is not: it is answered like HTTP.
#[must_use]
pub fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    kind.and_then(|kind| kind.strip_prefix(b"application/grpc"))
        .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// What a client understands an error in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// A status.
    Http,
    /// `grpc-status`.
    Grpc,
}

impl Dialect {
    /// That of a request with these headers.
    #[must_use]
    pub fn of(request: &HeaderMap) -> Self {
        if is_grpc(request) {
            Self::Grpc
        } else {
            Self::Http
        }
    }
}

/// An answer of our own to a request with these headers; see [`own_response_in`].
#[must_use]
pub fn own_response(
    request: &HeaderMap,
    status: StatusCode,
    reason: &'static str,
) -> Response<ProxyBody> {
    own_response_in(Dialect::of(request), status, reason)
}

/// An answer of our own: for gRPC a 200 with its status in a trailers-only answer, for others the
/// status with a line of text. `reason` is one snake_case word.
#[must_use]
pub fn own_response_in(
    dialect: Dialect,
    status: StatusCode,
    reason: &'static str,
) -> Response<ProxyBody> {
    let mut response = if dialect == Dialect::Grpc {
        let mut response = Response::new(ProxyBody::Empty);
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(GRPC_STATUS, grpc_status(status).into());
        headers.insert(GRPC_MESSAGE, HeaderValue::from_static(reason));
        response
    } else {
        let mut response = Response::new(ProxyBody::fixed(format!("{reason}\n")));
        *response.status_mut() = status;
        let text = HeaderValue::from_static("text/plain");
        response.headers_mut().insert(CONTENT_TYPE, text);
        response
    };
    let reason = HeaderValue::from_static(reason);
    response.headers_mut().insert(REASON, reason);
    response
}

/// The gRPC status that stands for a HTTP status of ours
/// (github.com/grpc/grpc/blob/master/doc/http-grpc-status-mapping.md, and what our own 429 and 504
/// mean).
fn grpc_status(status: StatusCode) -> u16 {
    match status.as_u16() {
        400 | 431 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 => 8,
        502 | 503 => 14,
        504 => 4,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_type(kind: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(kind))])
    }

    #[test]
    fn a_grpc_client_gets_a_status_that_it_understands_and_others_a_http_one() {
        let grpc = of_type("application/grpc+proto");
        let response = own_response(&grpc, StatusCode::SERVICE_UNAVAILABLE, "circuit_open");
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()[GRPC_STATUS], "14");
        assert_eq!(response.headers()[REASON], "circuit_open");
        for kind in ["application/grpc-web", "application/json"] {
            let response = own_response(
                &of_type(kind),
                StatusCode::SERVICE_UNAVAILABLE,
                "circuit_open",
            );
            assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
            assert_eq!(response.headers()[REASON], "circuit_open");
        }
    }
}
