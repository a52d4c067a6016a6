//! The two halves of a connection inside a tunnel.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use parking_lot::Mutex;
use tokio::time::Sleep;

use super::error::{ResetReason, StreamReset};
use super::limits::MAX_CHUNK;

/// A sender that got no capacity for this long counts as stalled: its reader does not read.
const STALLED_AFTER: Duration = Duration::from_millis(250);

/// The half that carries bytes to the peer.
///
/// Dropped before [`TunnelSend::finish`], it resets the whole stream, so that no end looks
/// orderly that was not.
pub struct TunnelSend {
    stream: Arc<Stream>,
    ended: bool,
    /// A write that waits for room, for the poll function; none while bytes flow.
    waiting: Option<Box<Waiting>>,
}

/// Since when a write waits, until it counts as stalled.
struct Waiting {
    patience: Pin<Box<Sleep>>,
    counted: Option<Counted>,
}

/// The half that brings bytes from the peer.
///
/// Dropped before its end was seen, it resets the whole stream.
pub struct TunnelReceive {
    stream: Arc<Stream>,
    receive: RecvStream,
    ended: bool,
}

/// Counts the senders of one tunnel that wait for a reader.
pub(super) type Stalled = Arc<AtomicUsize>;

/// What both halves need: only the sending half of h2 can reset a stream.
struct Stream {
    send: Mutex<SendStream<Bytes>>,
    stalled: Stalled,
    /// Released when both halves are gone.
    _place: Box<dyn Send + Sync>,
}

impl Stream {
    fn reset(&self, reason: Reason) {
        self.send.lock().send_reset(reason);
    }
}

/// Makes the halves of a stream; `place` is dropped with the last of them.
pub(super) fn halves(
    send: SendStream<Bytes>,
    receive: RecvStream,
    stalled: Stalled,
    place: Box<dyn Send + Sync>,
) -> (TunnelSend, TunnelReceive) {
    let stream = Arc::new(Stream {
        send: Mutex::new(send),
        stalled,
        _place: place,
    });
    (
        TunnelSend {
            stream: stream.clone(),
            ended: false,
            waiting: None,
        },
        TunnelReceive {
            stream,
            receive,
            ended: false,
        },
    )
}

impl TunnelSend {
    /// Hands to the tunnel as much as there is room for now, and gives back the rest.
    pub fn try_send(&mut self, mut data: Bytes) -> Result<Bytes, StreamReset> {
        while !data.is_empty() {
            let wanted = data.len().min(MAX_CHUNK);
            let mut send = self.stream.send.lock();
            send.reserve_capacity(wanted);
            let room = send.capacity();
            if room == 0 {
                break;
            }
            let sent = send.send_data(data.split_to(room.min(wanted)), false);
            drop(send);
            sent.map_err(|error| self.why_closed(error))?;
        }
        Ok(data)
    }

    /// Hands the bytes to the tunnel, waiting for the peer to make room. It takes frames of at
    /// most [`MAX_CHUNK`] bytes and keeps no more than 512 KiB of a stream that the socket did not take yet;
    /// a small write goes out at once.
    ///
    /// Cancelled, it may have handed over a part: then only a reset is a truthful end.
    pub async fn send(&mut self, mut data: Bytes) -> Result<(), StreamReset> {
        poll_fn(|cx| self.poll_send(cx, &mut data)).await
    }

    /// [`TunnelSend::send`], for those who poll: what was handed over is taken off the bytes. One task may wait here at
    /// a time.
    pub fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        data: &mut Bytes,
    ) -> Poll<Result<(), StreamReset>> {
        while !data.is_empty() {
            let wanted = data.len().min(MAX_CHUNK);
            let room = ready!(self.poll_room_for(cx, wanted))?;
            let chunk = data.split_to(room.min(wanted));
            let sent = self.stream.send.lock().send_data(chunk, false);
            sent.map_err(|error| self.why_closed(error))?;
        }
        Poll::Ready(Ok(()))
    }

    /// Hands over as many of the bytes as there is room for, like [`TunnelSend::send`]: they are
    /// copied into a frame. One task may wait here at a time.
    pub fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize, StreamReset>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let wanted = bytes.len().min(MAX_CHUNK);
        let room = ready!(self.poll_room_for(cx, wanted))?;
        let chunk = Bytes::copy_from_slice(&bytes[..room.min(wanted)]);
        let written = chunk.len();
        let sent = self.stream.send.lock().send_data(chunk, false);
        Poll::Ready(
            sent.map(|()| written)
                .map_err(|error| self.why_closed(error)),
        )
    }

    /// Room for a part of so many bytes at least.
    fn poll_room_for(
        &mut self,
        cx: &mut Context<'_>,
        wanted: usize,
    ) -> Poll<Result<usize, StreamReset>> {
        self.stream.send.lock().reserve_capacity(wanted);
        let room = self.poll_room(cx);
        match room {
            Poll::Ready(_) => self.waiting = None,
            Poll::Pending => self.wait(cx),
        }
        room
    }

    /// Counts the write as stalled once it has waited for long enough.
    fn wait(&mut self, cx: &mut Context<'_>) {
        let waiting = self.waiting.get_or_insert_with(|| {
            Box::new(Waiting {
                patience: Box::pin(tokio::time::sleep(STALLED_AFTER)),
                counted: None,
            })
        });
        if waiting.counted.is_none() && waiting.patience.as_mut().poll(cx).is_ready() {
            waiting.counted = Some(Counted::new(self.stream.stalled.clone()));
        }
    }

    /// Ends this direction in order (END_STREAM), after all that was sent. The other direction
    /// goes on.
    pub fn finish(&mut self) -> Result<(), StreamReset> {
        if self.ended {
            return Ok(());
        }
        self.ended = true;
        let sent = self.stream.send.lock().send_data(Bytes::new(), true);
        sent.map_err(|error| self.why_closed(error))
    }

    /// Ends both directions out of order; what was not sent yet is dropped. After `finish` it
    /// still does so, unless all was sent and received.
    pub fn reset(&mut self, reason: ResetReason) {
        self.ended = true;
        self.stream.reset(reason.into());
    }

    /// Ready when the peer, or the loss of the tunnel, has ended the stream out of order: for those
    /// who have nothing to send and have seen the end of the other direction. Never if the stream
    /// ends in order.
    pub fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<StreamReset> {
        let reset = self.stream.send.lock().poll_reset(cx);
        reset.map(|reset| match reset {
            Ok(reason) => StreamReset::from(h2::Error::from(reason)).by_peer(),
            Err(error) => error.into(),
        })
    }

    fn poll_room(&self, cx: &mut Context<'_>) -> Poll<Result<usize, StreamReset>> {
        let mut send = self.stream.send.lock();
        // poll_capacity tells of increases only: what is there already must be asked for. A
        // closed stream may still show capacity; then send_data says why.
        if send.capacity() > 0 {
            return Poll::Ready(Ok(send.capacity()));
        }
        match send.poll_capacity(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(Ok(room))) => Poll::Ready(Ok(room)),
            Poll::Ready(Some(Err(error))) => Poll::Ready(Err(error.into())),
            Poll::Ready(None) => Poll::Ready(Err(match send.poll_reset(cx) {
                Poll::Ready(Ok(reason)) => StreamReset::from(h2::Error::from(reason)).by_peer(),
                Poll::Ready(Err(error)) => error.into(),
                Poll::Pending => StreamReset::local("already ended"),
            })),
        }
    }

    /// h2 answers a write to a closed stream with "inactive stream": the cause is kept elsewhere.
    fn why_closed(&self, error: h2::Error) -> StreamReset {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        match self.stream.send.lock().poll_reset(&mut cx) {
            Poll::Ready(Ok(reason)) => StreamReset::from(h2::Error::from(reason)).by_peer(),
            Poll::Ready(Err(cause)) => cause.into(),
            Poll::Pending => error.into(),
        }
    }
}

impl Drop for TunnelSend {
    fn drop(&mut self) {
        if !self.ended {
            self.stream.reset(ResetReason::Connection.into());
        }
    }
}

impl TunnelReceive {
    /// The next bytes; `None` is the peer's orderly end and nothing else. Safe to cancel.
    ///
    /// The peer may send on only after [`TunnelReceive::release`].
    pub async fn data(&mut self) -> Option<Result<Bytes, StreamReset>> {
        poll_fn(|cx| self.poll_data(cx)).await
    }

    /// [`TunnelReceive::data`], for those who poll.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, StreamReset>>> {
        while !self.ended {
            let data = match ready!(self.receive.poll_data(cx)) {
                Some(Ok(data)) => data,
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                None => {
                    self.ended = true;
                    break;
                }
            };
            // Noted now: the loss of the tunnel after END_STREAM takes nothing from this stream.
            self.ended = self.receive.is_end_stream();
            if !data.is_empty() {
                return Poll::Ready(Some(Ok(data)));
            }
        }
        Poll::Ready(None)
    }

    /// Gives the peer back room for bytes that were written on. More than was received is
    /// ignored.
    pub fn release(&mut self, bytes: usize) {
        let flow = self.receive.flow_control();
        let bytes = bytes.min(flow.used_capacity());
        if let Err(error) = flow.release_capacity(bytes) {
            tracing::debug!(%error, bytes, "cannot release receive capacity");
        }
    }
}

impl Drop for TunnelReceive {
    fn drop(&mut self) {
        // The end may lie there unread, with nothing before it.
        if !self.ended && !self.receive.is_end_stream() {
            self.stream.reset(ResetReason::Connection.into());
        }
    }
}

struct Counted(Stalled);

impl Counted {
    fn new(counter: Stalled) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(counter)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
