//! A HTTP/2 connection to an upstream, shared by many requests of one source.

use std::future::poll_fn;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Builder, Connection, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Request, Response};
use hyper::body::{Body, Frame, SizeHint};
use parking_lot::{Mutex, MutexGuard};
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};

use super::body::BodyError;
use super::client::{Kind, Lease, NeverSent, SendError, UpstreamBody, UpstreamBodyKind};
use super::io::HttpIo;
use super::places::Places;
use super::pool::Terms;
use super::replay::ReplayBody;
use super::upstreams::{Connected, Upstreams};
use crate::fairness;

/// Receive window of one stream, and what an unread answer may hold here: 256 KiB carry 2 Gbit/s at
/// a round trip of 1 ms.
pub(super) const STREAM_WINDOW: u32 = 256 * 1024;

/// Streams that one connection carries; beyond it, another connection.
pub(super) const STREAMS: usize = 100;

/// No smaller than all streams' windows together: an unread answer must not stop its neighbours.
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * STREAMS as u32;

/// Bytes of one stream that wait in this process for the socket.
pub(super) const SEND_BUFFER: usize = 256 * 1024;

/// Header list of an answer, in bytes as HPACK counts them.
const HEADER_LIST: u32 = 64 * 1024;

/// So much of a body is handed to h2 at once.
const CHUNK: usize = 64 * 1024;

/// How long the end of a connection may take to be written.
const LINGER: Duration = Duration::from_secs(1);

/// A connection, driven by a task of its own.
pub(super) struct H2 {
    requests: SendRequest<Bytes>,
    usage: Mutex<Usage>,
    task: AbortHandle,
    /// Who hears of streams that fall free, where connections are limited.
    line: Option<(Arc<Places>, Weak<Upstreams>)>,
}

struct Usage {
    streams: usize,
    /// Streams so far.
    served: u32,
    idle_since: Instant,
    retired: bool,
    /// Requests that it carries at most, as the last one had it.
    most: u32,
    /// How long it may idle, if the last one said so.
    idle: Option<Duration>,
}

/// A place for one stream.
pub(super) struct H2Place {
    connection: Arc<H2>,
    reused: bool,
}

impl Drop for H2Place {
    fn drop(&mut self) {
        {
            let mut usage = self.connection.usage.lock();
            usage.streams -= 1;
            if usage.streams == 0 {
                usage.idle_since = Instant::now();
            }
        }
        if let Some((places, home)) = &self.connection.line
            && places.has_line()
            && let Some(home) = home.upgrade()
        {
            home.serve_line(&self.connection, places);
        }
    }
}

impl Drop for H2 {
    fn drop(&mut self) {
        // The last place is gone, and nobody can come for another. The end of one that is retired
        // goes out in order, which a peer that does not read it cannot put off.
        let task = self.task.clone();
        match Handle::try_current() {
            Ok(runtime) if self.usage.get_mut().retired => drop(runtime.spawn(async move {
                sleep(LINGER).await;
                task.abort();
            })),
            _ => task.abort(),
        }
    }
}

/// How well a connection would serve one more stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fitness {
    Room,
    Full,
    Dead,
}

impl H2 {
    pub(super) async fn new(
        connected: Connected,
        line: Option<(Arc<Places>, Weak<Upstreams>)>,
    ) -> Result<Arc<Self>, h2::Error> {
        let Connected { io, held } = connected;
        let (requests, connection) = Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(HEADER_LIST)
            .max_send_buffer_size(SEND_BUFFER)
            .enable_push(false)
            .handshake::<_, Bytes>(io)
            .await?;
        let task = fairness::spawn(async move {
            drive(connection).await;
            drop(held);
        });
        Ok(Arc::new(Self {
            requests,
            usage: Mutex::new(Usage {
                streams: 0,
                served: 0,
                idle_since: Instant::now(),
                retired: false,
                most: u32::MAX,
                idle: None,
            }),
            task: task.abort_handle(),
            line,
        }))
    }

    pub(super) fn fitness(&self) -> Fitness {
        let usage = self.usage.lock();
        if usage.retired || self.task.is_finished() {
            return Fitness::Dead;
        }
        let mut cx = Context::from_waker(Waker::noop());
        match self.requests.clone().poll_ready(&mut cx) {
            Poll::Ready(Err(_)) => Fitness::Dead,
            _ if usage.streams >= self.capacity() => Fitness::Full,
            _ => Fitness::Room,
        }
    }

    /// What the peer allows, at most [`STREAMS`].
    fn capacity(&self) -> usize {
        self.requests.current_max_send_streams().min(STREAMS)
    }

    /// A place for a stream, if the connection has not carried as many as this request wants at most
    /// on one. The last one retires it.
    pub(super) fn claim(self: &Arc<Self>, terms: &Terms<'_>) -> Option<H2Place> {
        let mut usage = self.usage.lock();
        usage.most = terms.requests.unwrap_or(u32::MAX);
        usage.idle = terms.idle;
        self.claim_within(usage)
    }

    fn claim_within(self: &Arc<Self>, mut usage: MutexGuard<'_, Usage>) -> Option<H2Place> {
        let most = usage.most;
        if usage.retired || usage.served >= most {
            usage.retired = true;
            return None;
        }
        let reused = usage.served > 0;
        usage.served += 1;
        usage.retired = usage.served >= most;
        usage.streams += 1;
        Some(H2Place {
            connection: self.clone(),
            reused,
        })
    }

    /// A place under the terms of the last one, if there is room.
    pub(super) fn claim_again(self: &Arc<Self>) -> Option<H2Place> {
        match self.fitness() {
            Fitness::Room => self.claim_within(self.usage.lock()),
            Fitness::Full | Fitness::Dead => None,
        }
    }

    /// Whose connection it is, where those are limited.
    pub(super) fn is_of(&self, places: &Arc<Places>) -> bool {
        let line = self.line.as_ref();
        line.is_some_and(|(own, _)| Arc::ptr_eq(own, places))
    }

    /// Whether it has had no stream for too long: for longer than this, if no request said otherwise.
    pub(super) fn is_expired(&self, now: Instant, limit: Duration) -> bool {
        let own = self.usage.lock().idle;
        let since = self.idle_since();
        since.is_some_and(|since| now.duration_since(since) >= own.unwrap_or(limit))
    }

    /// Since when it has had no stream.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let usage = self.usage.lock();
        (usage.streams == 0).then_some(usage.idle_since)
    }

    pub(super) fn streams(&self) -> usize {
        self.usage.lock().streams
    }

    /// Takes no new streams.
    pub(super) fn retire(&self) {
        self.usage.lock().retired = true;
    }

    /// Ends it at once, streams and all.
    pub(super) fn abort(&self) {
        self.retire();
        self.task.abort();
    }
}

async fn drive(connection: Connection<HttpIo, Bytes>) {
    if let Err(error) = connection.await {
        tracing::debug!(%error, "upstream HTTP/2 connection ended");
    }
}

impl H2Place {
    pub(super) fn is_reused(&self) -> bool {
        self.reused
    }

    pub(super) async fn send(
        self,
        request: Request<ReplayBody>,
    ) -> Result<Response<UpstreamBody>, SendError> {
        let (head, body) = request.into_parts();
        let ends = body.is_end_stream();
        let mut requests = self.connection.requests.clone();
        poll_fn(|cx| requests.poll_ready(cx))
            .await
            .map_err(not_opened)?;
        let (answer, stream) = requests
            .send_request(Request::from_parts(head, ()), ends)
            .map_err(not_opened)?;
        let mut sending = (!ends).then(|| Box::pin(pump(body, stream)));
        let mut answer = std::pin::pin!(answer);
        let answer = poll_fn(|cx| {
            if let Some(pump) = &mut sending
                && let Poll::Ready(pumped) = pump.as_mut().poll(cx)
            {
                sending = None;
                if let Err(error) = pumped {
                    return Poll::Ready(Err(SendError::BodyEnded(error.into())));
                }
            }
            answer.as_mut().poll(cx).map_err(failure)
        })
        .await?;
        // The answer began before the request ended: from here on they do not wait for each other.
        let sending = sending.map(|pump| AbortOnDrop(fairness::spawn(pump).abort_handle()));
        let (head, receive) = answer.into_parts();
        Ok(Response::from_parts(
            head,
            UpstreamBody(UpstreamBodyKind::H2(H2Body {
                receive,
                unreleased: 0,
                data_ended: false,
                _sending: sending,
                _place: self,
            })),
        ))
    }
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Sends the body as far as the upstream makes room for it. An error is the body's own; that the
/// upstream does not want more of it shows in its answer.
async fn pump(mut body: ReplayBody, mut stream: SendStream<Bytes>) -> Result<(), BodyError> {
    loop {
        let frame = tokio::select! {
            biased;
            frame = poll_fn(|cx| std::pin::Pin::new(&mut body).poll_frame(cx)) => frame,
            _ = poll_fn(|cx| stream.poll_reset(cx)) => return Ok(()),
        };
        let frame = match frame {
            None => {
                let _ = stream.send_data(Bytes::new(), true);
                return Ok(());
            }
            Some(Err(error)) => {
                stream.send_reset(Reason::CANCEL);
                return Err(error);
            }
            Some(Ok(frame)) => frame,
        };
        let frame = match frame.into_data() {
            Ok(data) => {
                let ends = body.is_end_stream();
                if send_all(&mut stream, data, ends).await.is_err() || ends {
                    return Ok(());
                }
                continue;
            }
            Err(frame) => frame,
        };
        if let Ok(trailers) = frame.into_trailers() {
            let _ = stream.send_trailers(trailers);
            return Ok(());
        }
    }
}

async fn send_all(
    stream: &mut SendStream<Bytes>,
    mut data: Bytes,
    ends: bool,
) -> Result<(), h2::Error> {
    loop {
        let wanted = data.len().min(CHUNK);
        stream.reserve_capacity(wanted);
        let room = if wanted == 0 {
            0
        } else {
            poll_fn(|cx| poll_room(stream, cx)).await?
        };
        let chunk = data.split_to(room.min(wanted));
        let last = data.is_empty();
        stream.send_data(chunk, last && ends)?;
        if last {
            return Ok(());
        }
    }
}

fn poll_room(
    stream: &mut SendStream<Bytes>,
    cx: &mut Context<'_>,
) -> Poll<Result<usize, h2::Error>> {
    // poll_capacity tells of increases only.
    if stream.capacity() > 0 {
        return Poll::Ready(Ok(stream.capacity()));
    }
    match ready!(stream.poll_capacity(cx)) {
        Some(room) => Poll::Ready(room),
        None => Poll::Ready(Err(Reason::CANCEL.into())),
    }
}

/// No stream was opened, so nothing was sent.
fn not_opened(error: h2::Error) -> SendError {
    SendError::NeverSent(if error.is_go_away() {
        NeverSent::GoingAway
    } else {
        NeverSent::ClosedBeforeSent
    })
}

fn failure(error: h2::Error) -> SendError {
    if error.is_remote() && error.is_go_away() {
        // h2 fails only those streams by it that are above the last one that the peer names.
        SendError::NeverSent(NeverSent::GoingAway)
    } else if error.is_remote() && error.reason() == Some(Reason::REFUSED_STREAM) {
        SendError::NeverSent(NeverSent::StreamRefused)
    } else if error.is_library() {
        SendError::Malformed(error.into())
    } else {
        SendError::Reset(error.into())
    }
}

/// The body of an answer.
pub(super) struct H2Body {
    receive: RecvStream,
    /// Handed on, and not yet given back to the upstream as room.
    unreleased: usize,
    data_ended: bool,
    _sending: Option<AbortOnDrop>,
    _place: H2Place,
}

impl H2Body {
    pub(super) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        // Who asks for more has passed on what it got: only now may the upstream send more.
        let unreleased = std::mem::take(&mut self.unreleased);
        if unreleased > 0
            && let Err(error) = self.receive.flow_control().release_capacity(unreleased)
        {
            return Poll::Ready(Some(Err(BodyError::Reset(error))));
        }
        if !self.data_ended {
            match ready!(self.receive.poll_data(cx)) {
                Some(Ok(data)) => {
                    self.unreleased = data.len();
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(BodyError::Reset(error)))),
                None => self.data_ended = true,
            }
        }
        let trailers: Result<Option<HeaderMap>, _> = ready!(self.receive.poll_trailers(cx));
        Poll::Ready(match trailers {
            Ok(trailers) => trailers.map(|trailers| Ok(Frame::trailers(trailers))),
            Err(error) => Some(Err(BodyError::Reset(error))),
        })
    }

    pub(super) fn is_end_stream(&self) -> bool {
        self.receive.is_end_stream()
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

impl From<H2Place> for Lease {
    fn from(place: H2Place) -> Self {
        Self(Kind::H2(place))
    }
}

/// How long a connection without streams is kept.
pub(super) const IDLE: Duration = Duration::from_secs(60);
