//! Between a plain TCP socket and a stream of a tunnel.
//!
//! Polled by hand: what idles is two references and a flag for each direction, where futures would lie there for the
//! waiting for a socket, for room in the tunnel and for the socket to take the rest.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::net::TcpStream;
use tokio::task::coop::poll_proceed;

use super::buffers::{ReadBuffer, try_write};
use super::half::{self, Broken};
use super::{Ended, Peer, Relayed, close_in_order, failed, splice};
use crate::tunnel::{ResetReason, TunnelReceive, TunnelSend};

/// Relays between a TCP socket and a tunnel's stream. `plain` says which end the socket is: the
/// downstream one where the tunnel was opened, the upstream one where it was accepted.
///
/// An idle connection holds one of these.
#[allow(
    clippy::manual_async_fn,
    reason = "an async fn holds its arguments twice"
)]
pub fn relay_tunnel<C: Relayed>(
    socket: TcpStream,
    plain: Peer,
    mut send: TunnelSend,
    mut receive: TunnelReceive,
    connection: C,
) -> impl Future<Output = Ended> + Send + use<C> {
    async move {
        let ended = {
            let counts = connection.counts();
            let (out, back) = match plain {
                Peer::Downstream => (counts.to_upstream, counts.to_downstream),
                Peer::Upstream => (counts.to_downstream, counts.to_upstream),
            };
            let mut into_tunnel = IntoTunnel {
                socket: &socket,
                send: &mut send,
                count: out,
                rest: None,
            };
            let mut out_of_tunnel = OutOfTunnel {
                socket: &socket,
                receive: &mut receive,
                count: back,
                rest: None,
            };
            let into_tunnel = pin!(poll_fn(|cx| into_tunnel.poll(cx)));
            let out_of_tunnel = pin!(poll_fn(|cx| out_of_tunnel.poll(cx)));
            // A tunnel's end says by itself when it breaks.
            let failure_of = |peer| (peer == plain).then(|| failed(&socket));
            let both = half::join(into_tunnel, out_of_tunnel, plain, failure_of);
            tokio::select! {
                ended = both => ended,
                () = connection.stop().cancelled() => Ended::Stopped,
            }
        };
        match ended {
            Ended::InOrder => close_in_order(socket),
            Ended::Reset(_) | Ended::Stopped => send.reset(ResetReason::Connection),
        }
        ended
    }
}

/// From the socket.
struct IntoTunnel<'a> {
    socket: &'a TcpStream,
    send: &'a mut TunnelSend,
    count: &'a AtomicU64,
    /// Boxed, as idle connections have none.
    rest: Option<Box<Unsent<'a>>>,
}

/// What the tunnel did not take at once: a full window, or a full socket.
struct Unsent<'a> {
    bytes: Bytes,
    /// Of the chunk that it is the rest of.
    length: u64,
    /// Nobody reads meanwhile.
    source_failed: Pin<Box<dyn Future<Output = ()> + Send + 'a>>,
    /// To be read into again.
    buffer: ReadBuffer,
}

/// What came of reading.
enum Turn {
    /// The socket has no more for now.
    Idle,
    /// The tunnel takes no more for now.
    Full,
    End,
}

impl IntoTunnel<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        loop {
            let buffer = match self.rest.take() {
                None => {
                    ready!(self.poll_readable(cx))?;
                    ReadBuffer::take()
                }
                Some(mut rest) => {
                    if rest.poll(self.send, cx)?.is_pending() {
                        self.rest = Some(rest);
                        return Poll::Pending;
                    }
                    self.count.fetch_add(rest.length, Ordering::Relaxed);
                    rest.buffer
                }
            };
            match ready!(self.poll_move(buffer, cx))? {
                Turn::Idle | Turn::Full => {}
                Turn::End => return Poll::Ready(self.send.finish().map_err(|_| Broken::Sink)),
            }
        }
    }

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        match self.socket.poll_read_ready(cx) {
            Poll::Ready(readable) => Poll::Ready(readable.map_err(|_| Broken::Source)),
            // The far side may break off when it has already said all it had to say.
            Poll::Pending => self.send.poll_broken(cx).map(|_| Err(Broken::Sink)),
        }
    }

    /// Moves what is there. Pending is to give way to others.
    fn poll_move(
        &mut self,
        mut buffer: ReadBuffer,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Turn, Broken>> {
        while let Some(chunk) = buffer.read(self.socket).map_err(|_| Broken::Source)? {
            if chunk.is_empty() {
                return Poll::Ready(Ok(Turn::End));
            }
            let length = chunk.len() as u64;
            let rest = self.send.try_send(chunk).map_err(|_| Broken::Sink)?;
            if !rest.is_empty() {
                self.rest = Some(Box::new(Unsent {
                    bytes: rest,
                    length,
                    source_failed: Box::pin(failed(self.socket)),
                    buffer,
                }));
                return Poll::Ready(Ok(Turn::Full));
            }
            self.count.fetch_add(length, Ordering::Relaxed);
            ready!(poll_proceed(cx)).made_progress();
        }
        Poll::Ready(Ok(Turn::Idle))
    }
}

impl Unsent<'_> {
    fn poll(&mut self, send: &mut TunnelSend, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        match send.poll_send(cx, &mut self.bytes) {
            Poll::Ready(sent) => Poll::Ready(sent.map_err(|_| Broken::Sink)),
            Poll::Pending => {
                let failed = self.source_failed.as_mut().poll(cx);
                failed.map(|()| Err(Broken::Source))
            }
        }
    }
}

/// To the socket.
struct OutOfTunnel<'a> {
    socket: &'a TcpStream,
    receive: &'a mut TunnelReceive,
    count: &'a AtomicU64,
    /// What the socket did not take at once. Boxed, as idle connections have none.
    rest: Option<Box<Unwritten>>,
}

struct Unwritten {
    chunk: Bytes,
    written: usize,
}

impl OutOfTunnel<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        loop {
            if let Some(rest) = &mut self.rest {
                ready!(rest.poll(self.socket, cx)).map_err(|_| Broken::Sink)?;
                let length = rest.chunk.len();
                self.rest = None;
                self.written(length);
            }
            let Some(chunk) = ready!(self.receive.poll_data(cx)) else {
                return Poll::Ready(splice::end(self.socket));
            };
            let chunk = chunk.map_err(|_| Broken::Source)?;
            let written = try_write(self.socket, &chunk).map_err(|_| Broken::Sink)?;
            if written < chunk.len() {
                self.rest = Some(Box::new(Unwritten { chunk, written }));
            } else {
                self.written(written);
            }
        }
    }

    fn written(&mut self, bytes: usize) {
        self.count.fetch_add(bytes as u64, Ordering::Relaxed);
        // Only now may the far side send more: a slow reader costs one window, no memory.
        self.receive.release(bytes);
    }
}

impl Unwritten {
    fn poll(&mut self, socket: &TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(socket.poll_write_ready(cx))?;
            self.written += try_write(socket, &self.chunk[self.written..])?;
            if self.written == self.chunk.len() {
                return Poll::Ready(Ok(()));
            }
        }
    }
}
