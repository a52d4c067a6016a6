//! A downstream connection's bytes, watched as they are read.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::framing::Framing;
use super::io::HttpIo;
use super::upgrade::Raw;
use crate::telemetry::ByteCount;

/// What the task of a connection and the futures of its requests share.
pub(super) struct Shared {
    pub(super) framing: Mutex<Framing>,
    pub(super) usage: Mutex<Usage>,
    /// The upstream, once a request was answered with 101.
    pub(super) switched: Mutex<Option<Raw>>,
    /// Requests that reached the service.
    pub(super) requests: AtomicU64,
    pub(super) bytes: Arc<ByteCount>,
}

/// How many requests are under way, and since when none is.
pub(super) struct Usage {
    pub(super) active: usize,
    pub(super) since: Instant,
}

/// A request that is under way, until its answer has been handed over or dropped.
pub(super) struct Active(Arc<Shared>);

impl Shared {
    pub(super) fn new(bytes: Arc<ByteCount>) -> Arc<Self> {
        Arc::new(Self {
            framing: Mutex::new(Framing::new()),
            usage: Mutex::new(Usage {
                active: 0,
                since: Instant::now(),
            }),
            switched: Mutex::new(None),
            requests: AtomicU64::new(0),
            bytes,
        })
    }

    pub(super) fn begin(self: &Arc<Self>) -> Active {
        self.usage.lock().active += 1;
        Active(self.clone())
    }

    pub(super) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        let mut usage = self.0.usage.lock();
        usage.active -= 1;
        usage.since = Instant::now();
    }
}

/// Reads and writes through, counts, and shows HTTP/1 what was read.
pub(super) struct Watched {
    io: HttpIo,
    shared: Arc<Shared>,
    frames: bool,
}

impl Watched {
    pub(super) fn new(io: HttpIo, shared: Arc<Shared>, frames: bool) -> Self {
        Self { io, shared, frames }
    }

    pub(super) fn into_inner(self) -> HttpIo {
        self.io
    }

    fn wrote(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(bytes)) = &written {
            self.shared.bytes.add_sent(*bytes as u64);
        }
        written
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.io).poll_read(cx, buffer);
        let news = &buffer.filled()[before..];
        if !news.is_empty() {
            this.shared.bytes.add_received(news.len() as u64);
            if this.frames {
                this.shared.framing.lock().advance(news);
            }
        }
        read
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.io).poll_write(cx, bytes);
        this.wrote(written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.io).poll_write_vectored(cx, slices);
        this.wrote(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}
