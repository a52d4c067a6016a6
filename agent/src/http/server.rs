//! One downstream connection, from its first request to its end.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::CONNECTION;
use http::{HeaderValue, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::body::{Body, Frame, SizeHint};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use serde::Serialize;
use thiserror::Error;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::body::{BodyError, ProxyBody};
use super::counters::{Flood, HttpCounters};
use super::guard::{self, BadRequest};
use super::h2::{SEND_BUFFER, STREAM_WINDOW};
use super::io::HttpIo;
use super::respond::own_response;
use super::upgrade::{self, Switched};
use super::watch::{Active, Shared, Watched};
use crate::relay::{Counts, Ended, Peer};
use crate::telemetry::ByteCount;

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
    /// Bytes of a request's head; beyond it 431, in HTTP/2 too. Default 64 KiB.
    pub header_bytes: usize,
    /// Fields of a request's head; beyond it 431. HTTP/2 has no such bound of its own. Default 128.
    pub headers: usize,
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
            headers: 128,
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
    let desk = Desk {
        shared: shared.clone(),
        counters: context.counters.clone(),
        requests: context.limits.requests,
        service,
    };
    let watched = Watched::new(io, shared.clone(), wire);
    let care = Care {
        shared: &shared,
        limits: context.limits,
        counters: context.counters,
        // Tokens of its own: waiting on a token that many share takes its lock at each poll.
        drain: &drain.child_token(),
        stop: &stop.child_token(),
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
}

/// Where requests arrive.
struct Desk<S> {
    shared: Arc<Shared>,
    counters: Arc<HttpCounters>,
    requests: Option<u64>,
    service: S,
}

impl<S, F> Desk<S>
where
    S: Fn(Request<Incoming>) -> F,
    F: Future<Output = Result<Response<ProxyBody>, ResetNow>>,
{
    /// Guards a request, has it served, and keeps an upstream that switched protocols.
    fn take(
        &self,
        request: Request<Incoming>,
    ) -> impl Future<Output = Result<Response<Answer>, ResetNow>> + use<S, F> {
        let mut active = self.shared.begin();
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
        let (shared, served) = match checked {
            Ok(()) => {
                let request = Request::from_parts(head, body);
                (self.shared.clone(), Ok((self.service)(request)))
            }
            Err(bad) => {
                self.counters.bad_request(bad);
                tracing::debug!(reason = bad.as_str(), "request refused");
                let answer = own_response(&head.headers, bad.status(), bad.as_str());
                (self.shared.clone(), Err(answer))
            }
        };
        async move {
            let (mut answer, close) = match served {
                Ok(serving) => (serving.await?, last),
                // Nobody knows where the next request begins.
                Err(refused) => (refused, true),
            };
            if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
                let switched = answer.extensions_mut().remove::<Switched>();
                let raw = switched.and_then(|switched| switched.take());
                // A 101 with nobody behind it is no answer.
                *shared.switched.lock() = Some(raw.ok_or(ResetNow)?);
                shared.framing.lock().stop();
            } else if close && http1 {
                let close = HeaderValue::from_static("close");
                answer.headers_mut().insert(CONNECTION, close);
            }
            active.answered();
            Ok(answer.map(|body| Answer {
                body,
                _active: active,
            }))
        }
    }
}

/// An answer's body, which is under way until it is dropped.
struct Answer {
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

/// What looks after a connection while it is served.
struct Care<'a> {
    shared: &'a Arc<Shared>,
    limits: &'a ServerLimits,
    counters: &'a Arc<HttpCounters>,
    drain: &'a CancellationToken,
    stop: &'a CancellationToken,
}

/// Why a connection is to end that would go on by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Interruption {
    Stopped,
    DrainOver,
    SlowHead,
    /// Most of its requests were reset by the client before they were answered.
    Resets,
}

/// Why a connection takes no further requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Closing {
    Draining,
    Idle,
}

impl Care<'_> {
    async fn serve_http1<S, F>(self, watched: Watched, desk: Desk<S>) -> ServedEnd
    where
        S: Fn(Request<Incoming>) -> F + Send + 'static,
        F: Future<Output = Result<Response<ProxyBody>, ResetNow>> + Send + 'static,
    {
        let service = service_fn(|request| desk.take(request));
        let mut connection = http1::Builder::new()
            .max_headers(self.limits.headers)
            .max_header_size(self.limits.header_bytes)
            .max_buf_size(self.limits.header_bytes.max(MIN_BUFFER))
            .auto_date_header(false)
            .serve_connection(TokioIo::new(watched), service);
        let (ended, closing) = self
            .attend(|cx, close| {
                if close {
                    Pin::new(&mut connection).graceful_shutdown();
                }
                Pin::new(&mut connection).poll(cx)
            })
            .await;
        match ended {
            Err(interruption) => self.interrupted(interruption),
            Ok(Ok(())) => {
                let parts = connection.into_parts();
                let io = parts.io.into_inner().into_inner();
                let switched = self.shared.switched.lock().take();
                let Some(upstream) = switched else {
                    io.close().await;
                    return self.ended(closing);
                };
                self.counters.upgrade();
                let counts = Counts::from(&*self.shared.bytes);
                let ended = upgrade::relay(io, parts.read_buf, upstream, counts, self.stop).await;
                ServedEnd::Switched(ended)
            }
            Ok(Err(error)) => {
                let parts = connection.into_parts();
                if self.refused(&error) {
                    // hyper has answered it; the client shall see that.
                    parts.io.into_inner().into_inner().close().await;
                    return ServedEnd::Downstream;
                }
                tracing::debug!(%error, "HTTP/1 connection broke");
                broken(&error)
            }
        }
    }

    async fn serve_http2<S, F>(self, watched: Watched, desk: Desk<S>) -> ServedEnd
    where
        S: Fn(Request<Incoming>) -> F + Send + 'static,
        F: Future<Output = Result<Response<ProxyBody>, ResetNow>> + Send + 'static,
    {
        let headers = u32::try_from(self.limits.header_bytes).unwrap_or(u32::MAX);
        let mut connection = pin!(
            http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(STREAM_WINDOW.saturating_mul(self.limits.streams))
                .max_concurrent_streams(self.limits.streams)
                .max_header_list_size(headers)
                .max_send_buf_size(SEND_BUFFER)
                .auto_date_header(false)
                .serve_connection(
                    TokioIo::new(watched),
                    service_fn(move |request| desk.take(request)),
                )
        );
        let (ended, closing) = self
            .attend(|cx, close| {
                if close {
                    connection.as_mut().graceful_shutdown();
                }
                connection.as_mut().poll(cx)
            })
            .await;
        match ended {
            Err(interruption) => self.interrupted(interruption),
            Ok(Ok(())) => self.ended(closing),
            Ok(Err(error)) => {
                let calmed = source::<h2::Error>(&error).is_some_and(|error| {
                    error.reason() == Some(h2::Reason::ENHANCE_YOUR_CALM) && !error.is_remote()
                });
                if calmed {
                    self.flooded(Flood::of(self.shared.last_frame()));
                }
                tracing::debug!(%error, "HTTP/2 connection broke");
                broken(&error)
            }
        }
    }

    /// Polls a connection to its end, and sees to its timeouts.
    async fn attend<E>(
        &self,
        mut connection: impl FnMut(&mut Context<'_>, bool) -> Poll<Result<(), E>>,
    ) -> (Result<Result<(), E>, Interruption>, Option<Closing>) {
        let mut closing = None;
        let mut stopped = pin!(self.stop.cancelled());
        let mut draining = pin!(self.drain.cancelled());
        let mut alarm = pin!(sleep_until(
            Instant::now() + self.limits.idle.min(self.limits.header_timeout)
        ));
        let mut head: Option<Head> = None;
        let mut drain_ends: Option<Instant> = None;
        let ended = poll_fn(|cx| {
            if stopped.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(Interruption::Stopped));
            }
            let mut close = false;
            if drain_ends.is_none() && draining.as_mut().poll(cx).is_ready() {
                drain_ends = Some(Instant::now() + self.limits.drain);
                close = closing.replace(Closing::Draining).is_none();
            }
            loop {
                if let Poll::Ready(ended) = connection(cx, close) {
                    return Poll::Ready(Ok(ended));
                }
                close = false;
                let now = Instant::now();
                let next = match self.next(&mut head, drain_ends, now) {
                    Err(interruption) => return Poll::Ready(Err(interruption)),
                    Ok(next) => next,
                };
                if next <= now && closing.is_none() {
                    closing = Some(Closing::Idle);
                    close = true;
                    continue;
                }
                // A later moment is looked at when the earlier one has come.
                if alarm.deadline() > next || alarm.is_elapsed() {
                    alarm.as_mut().reset(next.max(now + TICK));
                }
                if alarm.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
            }
        })
        .await;
        (ended, closing)
    }

    /// When it has to be looked after again.
    fn next(
        &self,
        head: &mut Option<Head>,
        drain_ends: Option<Instant>,
        now: Instant,
    ) -> Result<Instant, Interruption> {
        if drain_ends.is_some_and(|end| now >= end) {
            return Err(Interruption::DrainOver);
        }
        let (active, since) = {
            let usage = self.shared.usage.lock();
            if usage.abandoned >= ABANDONED_MIN && usage.abandoned * 2 > self.shared.requests() {
                return Err(Interruption::Resets);
            }
            (usage.active > 0, usage.since)
        };
        let idle_ends = if active { now } else { since } + self.limits.idle;
        let framing = self.shared.framing.lock();
        *head = if active || !framing.is_in_head() {
            None
        } else {
            let request = framing.request();
            Some(head.filter(|head| head.request == request).unwrap_or(Head {
                request,
                since: now,
            }))
        };
        let head_ends = head.map(|head| head.since + self.limits.header_timeout);
        if head_ends.is_some_and(|end| now >= end) {
            return Err(Interruption::SlowHead);
        }
        Ok([head_ends, drain_ends]
            .into_iter()
            .flatten()
            .fold(idle_ends, Instant::min))
    }

    fn interrupted(&self, interruption: Interruption) -> ServedEnd {
        match interruption {
            Interruption::Stopped | Interruption::DrainOver => ServedEnd::Stopped,
            Interruption::SlowHead => {
                self.counters.slow_head();
                ServedEnd::SlowHead
            }
            Interruption::Resets => {
                self.flooded(Flood::Resets);
                ServedEnd::Downstream
            }
        }
    }

    fn flooded(&self, flood: Flood) {
        self.counters.flood(flood);
        tracing::info!(kind = flood.as_str(), "flood: connection ended");
    }

    fn ended(&self, closing: Option<Closing>) -> ServedEnd {
        match closing {
            Some(Closing::Idle) => {
                self.counters.idle_closed();
                ServedEnd::Idle
            }
            Some(Closing::Draining) | None => ServedEnd::InOrder,
        }
    }

    /// Counts what hyper refused by itself, with an answer of its own.
    fn refused(&self, error: &hyper::Error) -> bool {
        if !error.is_parse() {
            return false;
        }
        let found = self.shared.framing.lock().found();
        let bad = match found {
            Some(found) => BadRequest::from(found.violation),
            None if error.is_parse_too_large() => BadRequest::HeadTooLarge,
            None => BadRequest::Unparsable,
        };
        self.counters.bad_request(bad);
        tracing::debug!(reason = bad.as_str(), %error, "request refused");
        true
    }
}

/// A connection of HTTP/2 that resets most of its requests before they are answered, and at least so
/// many, floods (CVE-2023-44487): h2 itself counts only those that it had not handed over yet. Envoy
/// draws the line at half of 500.
const ABANDONED_MIN: u64 = 500;

/// Smallest buffer that hyper takes, in bytes.
const MIN_BUFFER: usize = 8 * 1024;

/// No timer of a connection is finer.
const TICK: Duration = Duration::from_millis(10);

/// A head that has begun.
#[derive(Debug, Clone, Copy)]
struct Head {
    request: u64,
    since: Instant,
}

/// Whose fault it is that a connection broke.
fn broken(error: &hyper::Error) -> ServedEnd {
    // Only answers and their bodies are the user's errors to hyper.
    if error.is_user() {
        ServedEnd::Upstream
    } else {
        ServedEnd::Downstream
    }
}

/// The first cause of a type.
fn source<'a, E: std::error::Error + 'static>(
    error: &'a (dyn std::error::Error + 'static),
) -> Option<&'a E> {
    let mut error = Some(error);
    while let Some(this) = error {
        if let Some(found) = this.downcast_ref::<E>() {
            return Some(found);
        }
        error = this.source();
    }
    None
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
