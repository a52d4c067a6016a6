//! A HTTP/1.1 connection to an upstream.
//!
//! It is driven by whoever uses it (the request, then the answer's body) and by nobody while it
//! idles, so that a request costs no hop between tasks. The pool looks at idle ones once in a while.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, EXPECT, TRANSFER_ENCODING};
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::body::{Body, Frame, SizeHint};
use hyper::client::conn::http1::{Builder, Connection, SendRequest};
use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::time::{Instant, sleep};

use super::body::BodyError;
use super::client::{
    Kind, Lease, NeverSent, SendError, Unanswered, UpstreamBody, UpstreamBodyKind,
};
use super::io::HttpIo;
use super::places::Places;
use super::pool::Terms;
use super::replay::{Gate, ReplayBody, Tail};
use super::upgrade::Switched;
use super::upstreams::{Connected, Held, Upstreams};
use crate::fairness;

/// How long the body of a request with `Expect: 100-continue` is held back for an upstream that
/// gives no sign (RFC 9110 §10.1.1 forbids to wait for ever); curl waits as long.
const CONTINUE_AFTER: Duration = Duration::from_secs(1);

/// Largest head of an answer, and most of a body that is read ahead. It may have 100 fields, as in
/// Envoy; hyper has room for these on the stack.
const BUFFER_BYTES: usize = 128 * 1024;

/// A connection between two requests, or in one.
pub(super) struct H1 {
    sender: SendRequest<ReplayBody>,
    connection: Connection<TokioIo<HttpIo>, ReplayBody>,
    requests: u32,
    /// Requests after which it is used no more.
    most: Option<u32>,
    /// How long it may idle, if the last request said so.
    idle: Option<Duration>,
    /// Since when it idles.
    pub(super) since: Instant,
    /// Whose connection it is, where those are limited.
    pub(super) places: Option<Arc<Places>>,
    _held: Option<Held>,
}

/// What a connection that has no request could do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Condition {
    /// Take a request.
    Free,
    /// Nothing more: one side said so, in order.
    Ended,
    /// Nothing but be reset: it broke, or is in the middle of something.
    Broken,
}

impl H1 {
    pub(super) async fn new(connected: Connected) -> Result<Box<Self>, hyper::Error> {
        let (sender, connection) = Builder::new()
            .max_buf_size(BUFFER_BYTES)
            .handshake(TokioIo::new(connected.io))
            .await?;
        Ok(Box::new(Self {
            sender,
            connection,
            requests: 0,
            most: None,
            idle: None,
            since: Instant::now(),
            places: None,
            _held: connected.held,
        }))
    }

    pub(super) fn is_reused(&self) -> bool {
        self.requests > 0
    }

    /// From now on it carries as many requests at most, with those that it has carried, and idles for as
    /// long, as these terms say.
    pub(super) fn limit(&mut self, terms: &Terms<'_>) {
        self.most = terms.requests;
        self.idle = terms.idle;
    }

    /// Whether it has idled for too long: for longer than this, if no request said otherwise.
    pub(super) fn is_expired(&self, now: Instant, limit: Duration) -> bool {
        now.duration_since(self.since) >= self.idle.unwrap_or(limit)
    }

    /// Whether it is one of these, which are limited.
    pub(super) fn is_of(&self, places: &Arc<Places>) -> bool {
        let own = self.places.as_ref();
        own.is_some_and(|own| Arc::ptr_eq(own, places))
    }

    /// Whether it has carried as many requests as it may.
    pub(super) fn is_spent(&self) -> bool {
        self.most.is_some_and(|most| self.requests >= most)
    }

    /// What it could do now.
    pub(super) fn condition(&mut self) -> Condition {
        let mut cx = Context::from_waker(Waker::noop());
        match self.poll_drive(&mut cx) {
            Poll::Ready(Ok(())) => Condition::Ended,
            Poll::Ready(Err(_)) => Condition::Broken,
            Poll::Pending if self.sender.is_ready() => Condition::Free,
            Poll::Pending => Condition::Broken,
        }
    }

    fn poll_drive(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.connection.poll_without_shutdown(cx)
    }

    /// Drives it to the end of the exchange that is under way, without a next one.
    async fn finish(self: Box<Self>) {
        let Self {
            sender,
            mut connection,
            _held,
            ..
        } = *self;
        drop(sender);
        let ended = poll_fn(|cx| connection.poll_without_shutdown(cx)).await;
        if ended.is_ok() {
            connection.into_parts().io.into_inner().close().await;
        }
    }

    /// Ends it in order.
    pub(super) async fn close(self: Box<Self>) {
        self.connection.into_parts().io.into_inner().close().await;
    }

    pub(super) async fn send(
        mut self: Box<Self>,
        home: Arc<Upstreams>,
        mut request: Request<ReplayBody>,
    ) -> Result<Response<UpstreamBody>, Unanswered> {
        self.requests = self.requests.saturating_add(1);
        let tail = request.body().tail();
        let gate = hold_back(&mut request);
        let mut patience = pin!(gate.as_ref().map(|_| sleep(CONTINUE_AFTER)));
        let answer = {
            let mut answer = pin!(self.sender.try_send_request(request));
            let connection = &mut self.connection;
            let mut ended = false;
            poll_fn(|cx| {
                loop {
                    if let Poll::Ready(answer) = answer.as_mut().poll(cx) {
                        return Poll::Ready(answer);
                    }
                    if let (Some(patience), Some(gate)) = (patience.as_mut().as_pin_mut(), &gate)
                        && patience.poll(cx).is_ready()
                    {
                        gate.open();
                    }
                    // A connection that has ended has told the one who waits for the answer.
                    if ended {
                        return Poll::Pending;
                    }
                    ended = connection.poll_without_shutdown(cx).is_ready();
                    if !ended {
                        return answer.as_mut().poll(cx);
                    }
                }
            })
            .await
        };
        let answer = answer.map_err(|mut error| match error.take_message() {
            Some(request) => Unanswered {
                error: SendError::NeverSent(NeverSent::ClosedBeforeSent),
                unsent: Some(Box::new(request)),
            },
            None => failure(error.into_error()).into(),
        })?;
        if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(self.switch(answer).await?);
        }
        // hyper goes by the chunks; another parser may go by the length.
        let headers = answer.headers();
        if headers.contains_key(TRANSFER_ENCODING) && headers.contains_key(CONTENT_LENGTH) {
            return Err(SendError::Malformed(Box::new(BothLengths)).into());
        }
        let (head, incoming) = answer.into_parts();
        let body = H1Body::new(incoming, self, home, tail.as_ref());
        Ok(Response::from_parts(
            head,
            UpstreamBody(UpstreamBodyKind::H1(body)),
        ))
    }

    /// The upstream speaks another protocol from here on.
    async fn switch(
        mut self: Box<Self>,
        answer: Response<Incoming>,
    ) -> Result<Response<UpstreamBody>, SendError> {
        let (mut head, incoming) = answer.into_parts();
        drop(incoming);
        poll_fn(|cx| self.poll_drive(cx)).await.map_err(failure)?;
        let Self {
            connection, _held, ..
        } = *self;
        let parts = connection.into_parts();
        head.extensions
            .insert(Switched::new(parts.io.into_inner(), parts.read_buf, _held));
        Ok(Response::from_parts(
            head,
            UpstreamBody(UpstreamBodyKind::H1(H1Body::none())),
        ))
    }
}

/// Holds the body back if the client waits to be told to send it. The upstream's 100 opens the gate,
/// and then hyper tells the client, whose body is asked for.
fn hold_back(request: &mut Request<ReplayBody>) -> Option<Arc<Gate>> {
    if request.body().is_end_stream() || !request.headers().contains_key(EXPECT) {
        return None;
    }
    let gate = Arc::new(Gate::default());
    request.body_mut().behind(gate.clone());
    let opened = gate.clone();
    hyper::ext::on_informational(request, move |answer| {
        if answer.status() == StatusCode::CONTINUE {
            opened.open();
        }
    });
    Some(gate)
}

/// An answer whose end two parsers could see in two places (RFC 9112 §6.3).
#[derive(Debug, Error)]
#[error("`Transfer-Encoding` and `Content-Length` in one answer")]
struct BothLengths;

fn failure(error: hyper::Error) -> SendError {
    if error.is_user() {
        SendError::BodyEnded(error.into())
    } else if error.is_parse() {
        SendError::Malformed(error.into())
    } else {
        SendError::Reset(error.into())
    }
}

/// The body of an answer.
pub(super) struct H1Body {
    incoming: Option<Incoming>,
    connection: Option<(Box<H1>, Arc<Upstreams>)>,
}

impl H1Body {
    fn none() -> Self {
        Self {
            incoming: None,
            connection: None,
        }
    }

    fn new(
        incoming: Incoming,
        connection: Box<H1>,
        home: Arc<Upstreams>,
        request: Option<&Tail>,
    ) -> Self {
        // All of a small answer has been read by now.
        if connection.sender.is_ready() {
            home.take_back(connection);
            return Self {
                incoming: Some(incoming),
                connection: None,
            };
        }
        let over = incoming.is_end_stream();
        if request.is_some_and(|tail| !tail.is_over()) && !over {
            // The answer began before the request ended. From here on they must not wait for each
            // other, so the connection gets a task of its own, and no other request after this.
            fairness::spawn(connection.finish());
            return Self {
                incoming: Some(incoming),
                connection: None,
            };
        }
        let mut body = Self {
            incoming: Some(incoming),
            connection: Some((connection, home)),
        };
        if over {
            body.release();
        }
        body
    }

    pub(super) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(incoming) = &mut self.incoming else {
            return Poll::Ready(None);
        };
        let frame = match Pin::new(&mut *incoming).poll_frame(cx) {
            Poll::Ready(frame) => frame,
            Poll::Pending => {
                let Some((connection, _)) = &mut self.connection else {
                    return Poll::Pending;
                };
                if connection.poll_drive(cx).is_ready() {
                    // It has ended, and the body knows how.
                    self.connection = None;
                }
                ready!(Pin::new(&mut *incoming).poll_frame(cx))
            }
        };
        let over = match &frame {
            Some(Ok(_)) => incoming.is_end_stream(),
            Some(Err(_)) | None => true,
        };
        match &frame {
            Some(Err(_)) => self.connection = None,
            _ if over => self.release(),
            _ => {}
        }
        Poll::Ready(frame.map(|frame| frame.map_err(BodyError::Upstream)))
    }

    /// The connection is free for others once the answer is over and it can take a request.
    fn release(&mut self) {
        let Some((mut connection, home)) = self.connection.take() else {
            return;
        };
        match connection.condition() {
            Condition::Free => home.take_back(connection),
            Condition::Ended => drop(fairness::spawn(connection.close())),
            Condition::Broken => {}
        }
    }

    pub(super) fn is_end_stream(&self) -> bool {
        self.incoming.as_ref().is_none_or(Body::is_end_stream)
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        self.incoming
            .as_ref()
            .map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

impl From<(Box<H1>, Arc<Upstreams>)> for Lease {
    fn from((connection, home): (Box<H1>, Arc<Upstreams>)) -> Self {
        Self(Kind::H1 { connection, home })
    }
}
