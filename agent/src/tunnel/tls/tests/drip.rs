//! A transport that moves a few bytes at a time.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Reads and writes at most so many bytes at once, and nothing at every second attempt, as a socket that is never quite ready.
pub(super) struct Drip<T> {
    pub(super) inner: T,
    at_once: usize,
    read_now: bool,
    write_now: bool,
}

impl<T> Drip<T> {
    pub(super) fn new(inner: T, at_once: usize) -> Self {
        Self {
            inner,
            at_once,
            read_now: false,
            write_now: false,
        }
    }
}

/// Whether it is its turn; else it is woken at once.
fn turn(now: &mut bool, cx: &mut Context<'_>) -> Poll<()> {
    *now = !*now;
    if *now {
        cx.waker().wake_by_ref();
        return Poll::Pending;
    }
    Poll::Ready(())
}

impl<T: AsyncRead + Unpin> AsyncRead for Drip<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(turn(&mut self.read_now, cx));
        let mut few = vec![0; self.at_once.min(into.remaining())];
        let mut room = ReadBuf::new(&mut few);
        ready!(Pin::new(&mut self.inner).poll_read(cx, &mut room))?;
        into.put_slice(room.filled());
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Drip<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(turn(&mut self.write_now, cx));
        let some = bytes.len().min(self.at_once);
        Pin::new(&mut self.inner).poll_write(cx, &bytes[..some])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
