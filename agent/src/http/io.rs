//! What carries HTTP on either side.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::relay::close_in_order;
use crate::tunnel::TunnelIo;

/// How long, and for how many bytes, a connection that was ended in order listens on, so that what
/// the peer still sends does not turn the end into a RST that overtakes the last answer.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 256 * 1024;

/// A connection that HTTP is spoken on. Dropped, it is reset (RST or RST_STREAM); only
/// [`HttpIo::close`] ends it in order.
pub enum HttpIo {
    /// A plain socket, with `SO_LINGER {1, 0}`.
    Socket(TcpStream),
    /// A stream of a tunnel.
    Tunnel(TunnelIo),
}

impl HttpIo {
    /// Ends the sending side, waits a moment for the peer's end, and closes in order.
    pub async fn close(mut self) {
        if self.shutdown().await.is_err() {
            return;
        }
        let drained = timeout(LINGER, async {
            // On the heap: every connection's future would have room for it otherwise.
            let (mut scratch, mut left) = (vec![0_u8; 4096], LINGER_BYTES);
            loop {
                match self.read(&mut scratch).await {
                    Ok(0) => return true,
                    Ok(read) if read < left => left -= read,
                    Ok(_) | Err(_) => return false,
                }
            }
        });
        // A peer that keeps its side open gets the end all the same: all that was to be said was
        // said. One that floods is reset.
        if !matches!(drained.await, Ok(false)) {
            self.end_in_order();
        }
    }

    fn end_in_order(self) {
        match self {
            Self::Socket(stream) => close_in_order(stream),
            Self::Tunnel(stream) => drop(stream),
        }
    }
}

impl From<TcpStream> for HttpIo {
    fn from(stream: TcpStream) -> Self {
        Self::Socket(stream)
    }
}

impl From<TunnelIo> for HttpIo {
    fn from(stream: TunnelIo) -> Self {
        Self::Tunnel(stream)
    }
}

impl AsyncRead for HttpIo {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Socket(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tunnel(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for HttpIo {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Socket(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tunnel(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Socket(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Self::Tunnel(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        matches!(self, Self::Socket(_))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Socket(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tunnel(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Socket(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tunnel(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
