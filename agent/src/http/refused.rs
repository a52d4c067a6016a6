//! Requests that are refused before they reach the service: each is counted, told of like any other
//! request, and answered with the reason.

use std::sync::Arc;

use bytes::{Buf, Bytes};
use http::header::HOST;
use http::{Method, Response, StatusCode, Version, request};

use super::body::ProxyBody;
use super::counters::HttpCounters;
use super::framing::Found;
use super::guard::BadRequest;
use super::headers::RequestId;
use super::respond::{Dialect, REASON, own_response};
use crate::telemetry::{HttpProtocol, RequestEnd, RequestInfo, Requester, ResponseFlag};

/// Where the refusals of one connection are told.
#[derive(Clone)]
pub(super) struct Refusals {
    pub(super) counters: Arc<HttpCounters>,
    pub(super) requester: Option<Arc<Requester>>,
}

impl Refusals {
    /// Refuses a request by its head.
    pub(super) fn refuse(&self, bad: BadRequest, head: &request::Parts) -> Response<ProxyBody> {
        let answer = own_response(&head.headers, bad.status(), bad.as_str());
        let id = RequestId::of(&head.headers);
        let info = request_info(head, Dialect::of(&head.headers), &id);
        self.tell(bad, info, answer.status());
        answer
    }

    /// Tells of one that could not be read, and that hyper has answered.
    pub(super) fn unread(&self, bad: BadRequest) {
        let info = RequestInfo {
            // Label `other`: nobody knows.
            method: Method::from_bytes(b"UNKNOWN").unwrap_or_default(),
            protocol: HttpProtocol::Http11,
            host: None,
            path: None,
            request_id: None,
        };
        self.tell(bad, info, bad.status());
    }

    fn tell(&self, bad: BadRequest, info: RequestInfo, status: StatusCode) {
        self.counters.bad_request(bad);
        if let Some(requester) = &self.requester {
            let mut record = requester.request(info);
            record.flag(ResponseFlag::BadRequest);
            record.detail(&bad.as_str());
            record.answered(status);
            record.close(RequestEnd::Complete);
        }
        tracing::debug!(reason = bad.as_str(), "request refused");
    }
}

/// What is told of a request by its head.
#[must_use]
pub fn request_info(head: &request::Parts, dialect: Dialect, id: &RequestId) -> RequestInfo {
    let host = match head.version {
        Version::HTTP_2 => head.uri.authority().map(|host| host.as_str().into()),
        _ => head
            .headers
            .get(HOST)
            .and_then(|host| host.to_str().ok())
            .map(Into::into),
    };
    RequestInfo {
        method: head.method.clone(),
        protocol: match (head.version, dialect) {
            (Version::HTTP_2, Dialect::Grpc) => HttpProtocol::Grpc,
            (Version::HTTP_2, Dialect::Http) => HttpProtocol::Http2,
            (Version::HTTP_10, _) => HttpProtocol::Http10,
            _ => HttpProtocol::Http11,
        },
        host,
        path: head.uri.path_and_query().cloned(),
        request_id: Some(id.as_str().into()),
    }
}

/// Our refusal of a request of HTTP/1 that hyper could not read, in place of hyper's, as bytes.
pub(super) struct OwnWords(Bytes);

impl OwnWords {
    /// None unless this is such a refusal, from its first byte.
    pub(super) fn in_place_of(bytes: &[u8], found: Option<Found>) -> Option<Self> {
        let end = bytes.iter().position(|byte| *byte == b'\r')?;
        let line = std::str::from_utf8(&bytes[..end]).ok()?;
        let status = line.strip_prefix("HTTP/1.1 ")?.split(' ').next()?;
        let status = StatusCode::from_bytes(status.as_bytes()).ok()?;
        if !status.is_client_error() {
            return None;
        }
        let bad = found.map_or_else(
            || BadRequest::of_status(status),
            |found| found.violation.into(),
        );
        let reason = bad.as_str();
        let length = reason.len() + 1;
        Some(Self(Bytes::from(format!(
            "{line}\r\n{REASON}: {reason}\r\ncontent-type: text/plain\r\n\
             content-length: {length}\r\nconnection: close\r\n\r\n{reason}\n"
        ))))
    }

    /// What is still to be written.
    pub(super) fn left(&self) -> &[u8] {
        &self.0
    }

    /// So much was written.
    pub(super) fn advance(&mut self, written: usize) {
        self.0.advance(written);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::framing::Violation;

    const HYPER: &[u8] = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n";

    #[test]
    fn a_refusal_of_hypers_gets_the_reason_that_was_found() {
        let words = |found| OwnWords::in_place_of(HYPER, found).map(|own| own.left().to_vec());
        let said = String::from_utf8(words(None).unwrap()).unwrap();
        assert!(said.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{said}");
        assert!(
            said.contains("\r\nx-undermesh-reason: unparsable\r\n"),
            "{said}"
        );
        assert!(said.ends_with("\r\ncontent-length: 11\r\nconnection: close\r\n\r\nunparsable\n"));
        let found = Found {
            request: 0,
            violation: Violation::BothLengths,
        };
        let said = String::from_utf8(words(Some(found)).unwrap()).unwrap();
        assert!(
            said.contains("\r\nx-undermesh-reason: both_lengths\r\n"),
            "{said}"
        );
    }

    #[test]
    fn nothing_else_is_taken_for_one() {
        for other in [
            &b"HTTP/1.1 200 OK\r\n\r\n"[..],
            b"HTTP/1.1 100 Continue\r\n\r\n",
            b"HTTP/1.1 4x0 Odd\r\n\r\n",
            b"a body",
            b"",
        ] {
            assert!(OwnWords::in_place_of(other, None).is_none());
        }
    }
}
