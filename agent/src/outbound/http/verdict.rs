//! What an attempt came to: for its endpoint, for retries and for the client.

use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http::header::RETRY_AFTER;
use http::{HeaderMap, Response, response};
use hyper::body::{Body as _, Frame};

use super::attempt::AttemptError;
use super::leg::Leg;
use super::refusal::Refusal;
use super::request::{Kind, Outgoing};
use crate::http::{Crowded, UpstreamBody};
use crate::mesh::TrafficPolicy;
use crate::resilience::retry::{Body, Method};
use crate::resilience::{self, Outcome, Timestamp, Unsent};
use crate::telemetry::{FailureReason, RequestEvent};

/// What an attempt came to.
pub(super) struct Ended {
    pub(super) answer: Option<Answer>,
    /// What it says about the endpoint.
    pub(super) verdict: Outcome,
    /// What it is for retries.
    pub(super) retry: Outcome,
    pub(super) retry_after: Option<Duration>,
    /// What the client is told if there is no other.
    pub(super) refusal: Refusal,
}

/// An answer that was not passed on yet.
pub(super) struct Answer {
    pub(super) head: response::Parts,
    pub(super) body: UpstreamBody,
    pub(super) first: Option<Frame<Bytes>>,
    /// None if the trailers will tell.
    pub(super) outcome: Option<Outcome>,
}

/// What an attempt came to.
pub(super) async fn judge(
    leg: &Leg,
    request: &mut Outgoing,
    sent: Result<Response<UpstreamBody>, AttemptError>,
    now: Timestamp,
) -> Ended {
    match sent {
        Ok(response) => answered(leg, request, response).await,
        Err(AttemptError::Late) => {
            let outcome = Outcome::Failure(resilience::Failure::Timeout);
            let refusal = match request.deadline.left(now) {
                Some(Duration::ZERO) => Refusal::RequestTimeout,
                _ => Refusal::Failed(outcome),
            };
            Ended::without_answer(outcome, outcome, refusal)
        }
        Err(AttemptError::Crowded(crowded)) => {
            request.record.event(match crowded {
                Crowded::Connections => RequestEvent::ShedConnections,
                Crowded::Pending => RequestEvent::ShedPending,
            });
            let refusal = match request.deadline.left(now) {
                Some(Duration::ZERO) => Refusal::RequestTimeout,
                _ => Refusal::Overload,
            };
            Ended::without_answer(Outcome::Shed, Outcome::Shed, refusal)
        }
        Err(AttemptError::Connect(failure)) => {
            request.record.detail(&failure.detail);
            let verdict = failure.outcome();
            let refusal = match failure.reason {
                FailureReason::Denied => Refusal::Denied,
                FailureReason::Overload => Refusal::Overload,
                _ => Refusal::Failed(Outcome::Unsent(Unsent::ConnectFailed)),
            };
            let retry = match failure.may_go_elsewhere() {
                true => Outcome::Unsent(Unsent::ConnectFailed),
                false => verdict,
            };
            Ended::without_answer(verdict, retry, refusal)
        }
        Err(AttemptError::Send { error, reused }) => {
            request
                .record
                .detail(&crate::telemetry::error_chain(&error));
            let outcome = error.outcome();
            // A connection that others had used before may have been closed by the server just as
            // this request came: RFC 9110 section 9.2.2 lets what is idempotent be sent again then,
            // and nobody has failed.
            let crossed = reused
                && outcome == Outcome::Failure(resilience::Failure::Reset)
                && request.method() != Method::Other
                && request.body.nature() != Body::Streaming;
            let verdict = match crossed {
                true => Outcome::Unsent(Unsent::GoingAway),
                false => outcome,
            };
            Ended::without_answer(verdict, verdict, Refusal::Failed(outcome))
        }
    }
}

async fn answered(leg: &Leg, request: &mut Outgoing, response: Response<UpstreamBody>) -> Ended {
    let policy = &leg.policy;
    let (head, mut body) = response.into_parts();
    let mut first = None;
    let mut outcome = match request.kind {
        Kind::Http => Some(policy.settings.http.classify(head.status.as_u16())),
        Kind::Grpc => of_grpc_head(policy, &head),
    };
    if outcome.is_none() {
        // An error mostly comes as trailers right behind the head. What is there is looked at, and
        // nothing is waited for: a client may wait for the head before it says any more.
        match look(&mut body).await {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(trailers) = frame.trailers_ref() {
                    outcome = Some(of_grpc_trailers(policy, Some(trailers)));
                }
                first = Some(frame);
            }
            Poll::Ready(None) => outcome = Some(of_grpc_trailers(policy, None)),
            Poll::Ready(Some(Err(error))) => {
                request
                    .record
                    .detail(&crate::telemetry::error_chain(&error));
                let outcome = Outcome::Failure(resilience::Failure::Reset);
                return Ended::without_answer(outcome, outcome, Refusal::Failed(outcome));
            }
            Poll::Pending => {}
        }
    }
    // A stream that has not said how it ends goes well so far.
    let known = outcome.unwrap_or(Outcome::Success);
    Ended {
        verdict: known,
        retry: known,
        retry_after: retry_after(&head.headers),
        refusal: Refusal::Failed(known),
        answer: Some(Answer {
            head,
            body,
            first,
            outcome,
        }),
    }
}

/// `grpc-status` in the head is a trailers-only answer. None if the trailers are still to come.
fn of_grpc_head(policy: &TrafficPolicy, head: &response::Parts) -> Option<Outcome> {
    match grpc_status(&head.headers) {
        Some(status) => Some(policy.settings.grpc.classify(status)),
        None if head.status != http::StatusCode::OK => {
            Some(policy.settings.http.classify(head.status.as_u16()))
        }
        None => None,
    }
}

/// What the end of a gRPC answer says. One without a status is UNKNOWN to every client.
pub(super) fn of_grpc_trailers(policy: &TrafficPolicy, trailers: Option<&HeaderMap>) -> Outcome {
    let status = trailers.and_then(grpc_status);
    let status = status.unwrap_or(resilience::outcome::grpc::UNKNOWN);
    policy.settings.grpc.classify(status)
}

pub(super) fn grpc_status(headers: &HeaderMap) -> Option<u8> {
    let status = headers.get("grpc-status")?;
    // What is no number is no status that anybody knows.
    let number = status.to_str().ok().and_then(|text| text.parse().ok());
    Some(number.unwrap_or(resilience::outcome::grpc::UNKNOWN))
}

/// `Retry-After`, in seconds or as a date (RFC 9110 section 10.2.3).
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?;
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(
        date.duration_since(std::time::SystemTime::now())
            .unwrap_or_default(),
    )
}

/// The next frame of a body, if it is there.
async fn look(
    body: &mut UpstreamBody,
) -> Poll<Option<Result<Frame<Bytes>, crate::http::BodyError>>> {
    std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut *body).poll_frame(cx))).await
}

impl Ended {
    fn without_answer(verdict: Outcome, retry: Outcome, refusal: Refusal) -> Self {
        Self {
            answer: None,
            verdict,
            retry,
            retry_after: None,
            refusal,
        }
    }
}
