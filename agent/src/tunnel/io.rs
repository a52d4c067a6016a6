//! A connection inside a tunnel, as a byte stream that a parser can read from and write to.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::error::StreamReset;
use super::stream::{TunnelReceive, TunnelSend};

/// Both halves of a tunnel's stream.
///
/// END_STREAM reads as the end of the stream, RST_STREAM as an error. A shutdown sends END_STREAM;
/// dropped without one, or before the peer's END_STREAM was read, the stream is reset. The peer gets
/// room for more bytes only as they are read from here.
pub struct TunnelIo {
    send: TunnelSend,
    receive: TunnelReceive,
    /// Received and not read yet: the peer has no room for these bytes back.
    unread: Bytes,
}

impl TunnelIo {
    /// Puts the halves together.
    #[must_use]
    pub fn new(send: TunnelSend, receive: TunnelReceive) -> Self {
        Self {
            send,
            receive,
            unread: Bytes::new(),
        }
    }

    /// Waits for the first bytes, and shows what has been received without consuming it; empty only
    /// at the end of the stream. Safe to cancel.
    ///
    /// At most one window is ever held like that.
    pub async fn peek(&mut self) -> io::Result<&[u8]> {
        if self.unread.is_empty() {
            std::future::poll_fn(|cx| self.poll_more(cx)).await?;
        }
        Ok(&self.unread)
    }

    /// Waits for bytes beyond those that [`TunnelIo::peek`] has shown; `false` at the end of the
    /// stream. Safe to cancel.
    pub async fn peek_more(&mut self) -> io::Result<bool> {
        match self.receive.data().await {
            None => Ok(false),
            Some(Err(reset)) => Err(broken(reset)),
            Some(Ok(more)) => {
                if self.unread.is_empty() {
                    self.unread = more;
                } else {
                    let mut joined = Vec::with_capacity(self.unread.len() + more.len());
                    joined.extend_from_slice(&self.unread);
                    joined.extend_from_slice(&more);
                    self.unread = joined.into();
                }
                Ok(true)
            }
        }
    }

    /// The halves again, and what was received and not read: the room for those bytes is still to be
    /// given back by [`TunnelReceive::release`].
    #[must_use]
    pub fn into_halves(self) -> (TunnelSend, TunnelReceive, Bytes) {
        (self.send, self.receive, self.unread)
    }

    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.receive.poll_data(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(None) => Poll::Ready(Ok(())),
            Poll::Ready(Some(Ok(data))) => {
                self.unread = data;
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Some(Err(reset))) => Poll::Ready(Err(broken(reset))),
        }
    }
}

impl AsyncRead for TunnelIo {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.unread.is_empty() {
            match this.poll_more(cx) {
                Poll::Ready(Ok(())) => {}
                other => return other,
            }
        }
        let taken = this.unread.len().min(buffer.remaining());
        buffer.put_slice(&this.unread[..taken]);
        this.unread.advance(taken);
        this.receive.release(taken);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TunnelIo {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let sent = self.get_mut().send.poll_write(cx, bytes);
        sent.map_err(broken)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The tunnel's own task writes what it was handed, and a small write goes out at once.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let ended = self.get_mut().send.finish();
        Poll::Ready(ended.map_err(broken))
    }
}

fn broken(reset: StreamReset) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, reset)
}
