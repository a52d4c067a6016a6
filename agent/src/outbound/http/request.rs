//! A request on its way: what all its attempts share.

use std::sync::Arc;

use http::header::HOST;
use http::{HeaderName, HeaderValue, Request, Version, request};
use hyper::body::{Body, Incoming};

use super::deadline;
use super::leg::Leg;
use super::{Client, Network};
use crate::fairness::Quota;
use crate::http::{Replay, ReplayBody, RequestId, is_grpc, to_upstream};
use crate::outbound::clock::Clock;
use crate::resilience::Timestamp;
use crate::resilience::limit::Slot;
use crate::resilience::retry;
use crate::resilience::timeout::Deadline;
use crate::telemetry::{HttpProtocol, RequestInfo, RequestRecord};

/// Which attempt of its request this is, counted from 1: a server that sees another number than 1
/// knows that it may have seen the request before.
const ATTEMPT: HeaderName = HeaderName::from_static("x-undermesh-attempt");

/// A request that has come in.
pub(super) struct Arrived {
    /// Its head, fit for the next hop.
    pub(super) head: request::Parts,
    pub(super) body: Incoming,
    pub(super) kind: Kind,
    pub(super) record: RequestRecord,
}

/// A request that goes on.
pub(super) struct Outgoing {
    pub(super) head: request::Parts,
    pub(super) body: Replay,
    pub(super) kind: Kind,
    pub(super) deadline: Deadline,
    pub(super) record: RequestRecord,
    /// Its place among the requests of its pod.
    pub(super) place: Slot,
}

/// How a request's answers are judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Http,
    Grpc,
}

impl Arrived {
    /// Takes a request in: makes its head fit for the next hop, and announces it.
    pub(super) fn receive<N: Network>(client: &Client<N>, request: Request<Incoming>) -> Self {
        let (mut head, body) = request.into_parts();
        let id = RequestId::of(&head.headers);
        to_upstream(&mut head, &client.caller.view, &id);
        head.headers.remove(ATTEMPT);
        let kind = match head.version == Version::HTTP_2 && is_grpc(&head.headers) {
            true => Kind::Grpc,
            false => Kind::Http,
        };
        let host = match head.uri.authority() {
            Some(authority) => Some(authority.as_str()),
            None => head.headers.get(HOST).and_then(|host| host.to_str().ok()),
        };
        let record = client.caller.requester.request(RequestInfo {
            method: head.method.clone(),
            protocol: match (head.version, kind) {
                (_, Kind::Grpc) => HttpProtocol::Grpc,
                (Version::HTTP_2, Kind::Http) => HttpProtocol::Http2,
                (Version::HTTP_10, Kind::Http) => HttpProtocol::Http10,
                _ => HttpProtocol::Http11,
            },
            host: host.map(Into::into),
            path: head.uri.path_and_query().cloned(),
            request_id: Some(id.as_str().into()),
        });
        if head.version == Version::HTTP_10 {
            upgrade_version(&mut head, client);
        }
        Self {
            head,
            body,
            kind,
            record,
        }
    }

    /// It goes on over this leg, by whose policy so much of its body is kept to send it again, if
    /// its pod has room for that, and it has so much time.
    pub(super) fn over(
        self,
        leg: &Leg,
        quota: &Arc<Quota>,
        place: Slot,
        now: Timestamp,
    ) -> Outgoing {
        Outgoing {
            deadline: deadline::deadline(&leg.timeouts, &self.head.headers, now),
            body: keep(self.body, leg.retry.replay_bytes, quota),
            head: self.head,
            kind: self.kind,
            record: self.record,
            place,
        }
    }
}

/// The body, of which at most so much is kept. A body that is known to be smaller needs no more room
/// than that.
fn keep(body: Incoming, most: usize, quota: &Arc<Quota>) -> Replay {
    if body.is_end_stream() {
        return Replay::empty();
    }
    let size = body.size_hint().exact();
    let size = size.and_then(|size| usize::try_from(size).ok());
    let bytes = size.map_or(most, |size| size.min(most));
    Replay::within(body, quota.reserve(bytes))
}

impl Outgoing {
    /// The request as this attempt sends it.
    pub(super) fn attempt(
        &self,
        body: ReplayBody,
        number: u32,
        clock: Clock,
    ) -> Request<ReplayBody> {
        let mut request = Request::new(body);
        *request.method_mut() = self.head.method.clone();
        *request.uri_mut() = self.head.uri.clone();
        *request.version_mut() = self.head.version;
        let headers = request.headers_mut();
        headers.clone_from(&self.head.headers);
        headers.insert(ATTEMPT, attempt_number(number));
        if self.kind == Kind::Grpc {
            deadline::tell(self.deadline, headers, clock.now());
        }
        request
    }

    pub(super) fn method(&self) -> retry::Method {
        retry::Method::named(self.head.method.as_str())
    }
}

fn attempt_number(number: u32) -> HeaderValue {
    match number {
        1 => HeaderValue::from_static("1"),
        number => number.into(),
    }
}

/// HTTP/1.0 goes on as 1.1, which must name the host (RFC 9112 §3.2): the address that was dialled,
/// if the client named none.
fn upgrade_version<N: Network>(head: &mut request::Parts, client: &Client<N>) {
    head.version = Version::HTTP_11;
    if !head.headers.contains_key(HOST)
        && let Ok(host) = HeaderValue::try_from(client.caller.local.to_string())
    {
        head.headers.insert(HOST, host);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_are_counted_from_one() {
        assert_eq!(attempt_number(1), "1");
        assert_eq!(attempt_number(3), "3");
    }
}
