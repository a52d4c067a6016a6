//! One downstream connection, from its first request to its end.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::header::CONNECTION;
use http::{HeaderValue, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::body::{Body, Frame, SizeHint};
use serde::Serialize;
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use super::body::{BodyError, ProxyBody};
use super::care::Care;
use super::counters::HttpCounters;
use super::guard::{self, BadRequest};
use super::io::HttpIo;
use super::refused::Refusals;
use super::upgrade::Switched;
use super::watch::{Active, Shared, Watched};
use crate::relay::{Ended, Peer};
use crate::telemetry::{ByteCount, Requester};

/// Which HTTP is spoken on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub enum Wire {
    /// HTTP/1.0 and 1.1.
    #[serde(rename = "http/1.1")]
    Http1,
    /// HTTP/2.
    #[serde(rename = "http/2")]
    Http2,
}

/// Bounds of a downstream connection.
#[derive(Debug, Clone)]
pub struct ServerLimits {
    /// Bytes of a request's head; beyond it 431, in HTTP/2 too. Default 64 KiB. In HTTP/1 there may be
    /// 100 fields, as in Envoy: hyper's own bound, for which it keeps room on the stack, where any
    /// other costs four allocations for each request. HTTP/2 has no such bound of its own.
    pub header_bytes: usize,
    /// How long a head may take from its first byte to its last; a connection that takes longer is
    /// reset. Default 10 s.
    pub header_timeout: Duration,
    /// How long a connection may be without a request; then it is closed in order. Default 1 h.
    pub idle: Duration,
    /// Requests on one connection; then it is closed in order. Default none.
    pub requests: Option<u64>,
    /// Streams of one HTTP/2 connection at a time; a further one is refused. Default 128.
    pub streams: u32,
    /// How long requests that are under way at a drain may go on; then they are reset. Default 30 s.
    pub drain: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            header_bytes: 64 * 1024,
            header_timeout: Duration::from_secs(10),
            idle: Duration::from_secs(3600),
            requests: None,
            streams: 128,
            drain: Duration::from_secs(30),
        }
    }
}

/// A service's wish to end a request by a reset: HTTP/1 resets the connection, HTTP/2 the stream.
#[derive(Debug, Error)]
#[error("the request is reset")]
pub struct ResetNow;

/// How a downstream connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Served {
    /// Requests that reached the service.
    pub requests: u64,
    /// How it ended.
    pub end: ServedEnd,
}

/// See [`Served`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServedEnd {
    /// In order: one side said so after its last message.
    InOrder,
    /// Nobody used it for too long.
    Idle,
    /// The client broke it, or was reset because of what it sent.
    Downstream,
    /// An answer could not be brought to its end, so the client was reset.
    Upstream,
    /// It was told to stop.
    Stopped,
    /// A request's head did not come to its end in time.
    SlowHead,
    /// It switched to another protocol, which ended so.
    Switched(Ended),
}

/// Serves a connection: each request that passes the guards goes to `service`.
///
/// `drain` lets requests end and takes no new ones: `connection: close`, or GOAWAY. `stop` resets
/// the connection at once. Unless it ends in order, the connection is reset.
pub async fn serve_http<S, F>(
    io: HttpIo,
    wire: Wire,
    context: ServerContext<'_>,
    service: S,
    drain: &CancellationToken,
    stop: &CancellationToken,
) -> Served
where
    S: Fn(Request<Incoming>) -> F + Send + 'static,
    F: Future<Output = Result<Response<ProxyBody>, ResetNow>> + Send + 'static,
{
    let shared = Shared::new(context.bytes);
    context.counters.connection();
    let refusals = Refusals {
        counters: context.counters.clone(),
        requester: context.requester,
    };
    let desk = Desk {
        shared: shared.clone(),
        counters: context.counters.clone(),
        refusals: refusals.clone(),
        requests: context.limits.requests,
        service,
    };
    let watched = Watched::new(io, shared.clone(), wire);
    let care = Care {
        shared: &shared,
        limits: context.limits,
        counters: context.counters,
        refusals: &refusals,
        drain,
        stop,
    };
    let end = match wire {
        Wire::Http1 => care.serve_http1(watched, desk).await,
        Wire::Http2 => care.serve_http2(watched, desk).await,
    };
    Served {
        requests: shared.requests(),
        end,
    }
}

/// What a connection is served with.
pub struct ServerContext<'a> {
    /// Its bounds.
    pub limits: &'a ServerLimits,
    /// Where refusals are counted.
    pub counters: &'a Arc<HttpCounters>,
    /// Where its bytes are counted.
    pub bytes: Arc<ByteCount>,
    /// Whose requests these are: where those are told of that never reach the service.
    pub requester: Option<Arc<Requester>>,
}

/// Where requests arrive.
pub(super) struct Desk<S> {
    shared: Arc<Shared>,
    counters: Arc<HttpCounters>,
    refusals: Refusals,
    requests: Option<u64>,
    service: S,
}

impl<S, F> Desk<S>
where
    S: Fn(Request<Incoming>) -> F,
    F: Future<Output = Result<Response<ProxyBody>, ResetNow>>,
{
    /// Guards a request, has it served, and keeps an upstream that switched protocols.
    pub(super) fn take(&self, request: Request<Incoming>) -> Exchange<F> {
        let active = self.shared.begin();
        let number = self.shared.requests.load(Ordering::Relaxed);
        let (mut head, body) = request.into_parts();
        let violation = self
            .shared
            .framing
            .lock()
            .found()
            .filter(|found| found.request <= number);
        let checked = match violation {
            Some(found) => Err(BadRequest::from(found.violation)),
            None => guard::check(&mut head),
        };
        self.shared.requests.store(number + 1, Ordering::Relaxed);
        let last = self.requests.is_some_and(|most| number + 1 >= most);
        let http1 = head.version != http::Version::HTTP_2;
        self.counters.request();
        let step = match checked {
            // Boxed, so that a connection without a request has no room for one, and nothing of it is moved on its way.
            Ok(()) => Step::Serving(Box::pin((self.service)(Request::from_parts(head, body)))),
            Err(bad) => Step::Refused(self.refusals.refuse(bad, &head)),
        };
        // After one that was refused nobody knows where the next begins.
        let close = http1 && (last || matches!(step, Step::Refused(_)));
        Exchange {
            step,
            close,
            active: Some(active),
        }
    }
}

/// A request that is being answered.
pub(super) struct Exchange<F> {
    step: Step<F>,
    /// Whether the client is told that the connection takes no other.
    close: bool,
    /// Until there is an answer.
    active: Option<Active>,
}

enum Step<F> {
    Serving(Pin<Box<F>>),
    Refused(Response<ProxyBody>),
}

impl<F> Future for Exchange<F>
where
    F: Future<Output = Result<Response<ProxyBody>, ResetNow>>,
{
    type Output = Result<Response<Answer>, ResetNow>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let answer = match &mut this.step {
            Step::Serving(serving) => ready!(serving.as_mut().poll(cx)),
            Step::Refused(answer) => Ok(std::mem::take(answer)),
        };
        match this.active.take() {
            Some(active) => {
                Poll::Ready(answer.and_then(|answer| active.answer(answer, this.close)))
            }
            // It was answered before, and nobody asks twice.
            None => Poll::Pending,
        }
    }
}

impl Active {
    /// Hands an answer over, and keeps an upstream that switched protocols.
    fn answer(
        mut self,
        mut answer: Response<ProxyBody>,
        close: bool,
    ) -> Result<Response<Answer>, ResetNow> {
        if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
            let switched = answer.extensions_mut().remove::<Switched>();
            let raw = switched.and_then(|switched| switched.take());
            // A 101 with nobody behind it is no answer.
            *self.shared().switched.lock() = Some(raw.ok_or(ResetNow)?);
            self.shared().framing.lock().stop();
        } else if close {
            let close = HeaderValue::from_static("close");
            answer.headers_mut().insert(CONNECTION, close);
        }
        self.answered();
        Ok(answer.map(|body| Answer {
            body,
            _active: self,
        }))
    }
}

/// An answer's body, which is under way until it is dropped.
pub(super) struct Answer {
    body: ProxyBody,
    _active: Active,
}

impl Body for Answer {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Pin::new(&mut self.get_mut().body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl From<ServedEnd> for crate::telemetry::End {
    fn from(end: ServedEnd) -> Self {
        match end {
            ServedEnd::InOrder | ServedEnd::Idle => Self::Complete,
            ServedEnd::Downstream | ServedEnd::SlowHead => Ended::Reset(Peer::Downstream).into(),
            ServedEnd::Upstream => Ended::Reset(Peer::Upstream).into(),
            ServedEnd::Stopped => Ended::Stopped.into(),
            ServedEnd::Switched(ended) => ended.into(),
        }
    }
}
