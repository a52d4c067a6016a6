//! What looks after a downstream connection while it is served: its timeouts, its drain, its end.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::body::ProxyBody;
use super::counters::{Flood, HttpCounters};
use super::guard::BadRequest;
use super::h2::{SEND_BUFFER, STREAM_WINDOW};
use super::server::{Desk, ResetNow, ServedEnd, ServerLimits};
use super::upgrade;
use super::watch::{Shared, Watched};
use crate::fairness;
use crate::relay::Counts;

/// What looks after a connection while it is served.
pub(super) struct Care<'a> {
    pub(super) shared: &'a Arc<Shared>,
    pub(super) limits: &'a ServerLimits,
    pub(super) counters: &'a Arc<HttpCounters>,
    pub(super) drain: &'a CancellationToken,
    pub(super) stop: &'a CancellationToken,
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
    pub(super) async fn serve_http1<S, F>(self, watched: Watched, desk: Desk<S>) -> ServedEnd
    where
        S: Fn(Request<Incoming>) -> F + Send + 'static,
        F: Future<Output = Result<Response<ProxyBody>, ResetNow>> + Send + 'static,
    {
        let service = service_fn(|request| desk.take(request));
        let mut connection = http1::Builder::new()
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

    pub(super) async fn serve_http2<S, F>(self, watched: Watched, desk: Desk<S>) -> ServedEnd
    where
        S: Fn(Request<Incoming>) -> F + Send + 'static,
        F: Future<Output = Result<Response<ProxyBody>, ResetNow>> + Send + 'static,
    {
        let headers = u32::try_from(self.limits.header_bytes).unwrap_or(u32::MAX);
        let mut connection = pin!(
            http2::Builder::new(fairness::Executor)
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
