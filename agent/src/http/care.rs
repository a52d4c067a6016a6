//! What looks after a downstream connection while it is served: its timeouts, its drain, its end.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
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
use super::refused::Refusals;
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
    pub(super) refusals: &'a Refusals,
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
                // One of its own: waiting on a token that many share takes its lock at each poll.
                let stop = self.stop.child_token();
                let ended = upgrade::relay(io, parts.read_buf, upstream, counts, &stop).await;
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
        let mut bell: Option<Bell> = None;
        let mut head: Option<Head> = None;
        let mut drain_ends: Option<Instant> = None;
        let ended = poll_fn(|cx| {
            let bell = Bell::of(&mut bell, cx.waker());
            let rung = bell.has_rung();
            let bell_cx = &mut Context::from_waker(&bell.waker);
            let mut close = false;
            if rung {
                if stopped.as_mut().poll(bell_cx).is_ready() {
                    return Poll::Ready(Err(Interruption::Stopped));
                }
                if drain_ends.is_none() && draining.as_mut().poll(bell_cx).is_ready() {
                    drain_ends = Some(Instant::now() + self.limits.drain);
                    close = closing.replace(Closing::Draining).is_none();
                }
            }
            loop {
                if let Poll::Ready(ended) = connection(cx, close) {
                    return Poll::Ready(Ok(ended));
                }
                close = false;
                let began = match self.look(&mut head) {
                    Err(interruption) => return Poll::Ready(Err(interruption)),
                    Ok(began) => began,
                };
                // The alarm is set for the earliest end of all that had begun then, and all but a head ends later
                // if it begins later.
                if !rung && !began {
                    return Poll::Pending;
                }
                let now = Instant::now();
                let next = match self.next(head, drain_ends, now) {
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
                if alarm.as_mut().poll(bell_cx).is_pending() {
                    return Poll::Pending;
                }
            }
        })
        .await;
        (ended, closing)
    }

    /// Sees what the connection came to: whether another head has begun to arrive, and not ended.
    fn look(&self, head: &mut Option<Head>) -> Result<bool, Interruption> {
        let active = {
            let usage = self.shared.usage.lock();
            if usage.abandoned >= ABANDONED_MIN && usage.abandoned * 2 > self.shared.requests() {
                return Err(Interruption::Resets);
            }
            usage.active > 0
        };
        let request = {
            let framing = self.shared.framing.lock();
            (!active && framing.is_in_head()).then(|| framing.request())
        };
        if request == head.map(|head| head.request) {
            return Ok(false);
        }
        *head = request.map(|request| Head {
            request,
            since: Instant::now(),
        });
        Ok(head.is_some())
    }

    /// When it has to be looked after again.
    fn next(
        &self,
        head: Option<Head>,
        drain_ends: Option<Instant>,
        now: Instant,
    ) -> Result<Instant, Interruption> {
        if drain_ends.is_some_and(|end| now >= end) {
            return Err(Interruption::DrainOver);
        }
        let idle_ends = {
            let usage = self.shared.usage.lock();
            let since = if usage.active > 0 { now } else { usage.since };
            since + self.limits.idle
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
        self.refusals.unread(bad);
        tracing::debug!(%error, "request not read");
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

/// Wakes the task of a connection in the name of what the connection itself knows nothing of: its timers and the tokens
/// that end it. These are polled when it has rung, and not whenever bytes have come.
struct Bell {
    rope: Arc<Rope>,
    /// Of the rope.
    waker: Waker,
}

struct Rope {
    pulled: AtomicBool,
    task: Waker,
}

impl Bell {
    fn new(task: Waker) -> Self {
        let rope = Arc::new(Rope {
            pulled: AtomicBool::new(true),
            task,
        });
        Self {
            waker: rope.clone().into(),
            rope,
        }
    }

    /// The one of this task. Another has nothing to tell it, and a new one has rung.
    fn of<'a>(bell: &'a mut Option<Self>, task: &Waker) -> &'a Self {
        let known = bell.take().filter(|bell| bell.rope.task.will_wake(task));
        bell.insert(known.unwrap_or_else(|| Self::new(task.clone())))
    }

    /// Whether it has rung since it was asked.
    fn has_rung(&self) -> bool {
        let pulled = &self.rope.pulled;
        pulled.load(Ordering::Relaxed) && pulled.swap(false, Ordering::AcqRel)
    }
}

impl Wake for Rope {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.pulled.store(true, Ordering::Release);
        self.task.wake_by_ref();
    }
}

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
