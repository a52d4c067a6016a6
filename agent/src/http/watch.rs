//! A downstream connection's bytes, watched as they are read.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::task::{Context, Poll};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::framing::Framing;
use super::io::HttpIo;
use super::server::Wire;
use super::upgrade::Raw;
use crate::telemetry::ByteCount;

/// What the task of a connection and the futures of its requests share.
pub(super) struct Shared {
    /// Of HTTP/1.
    pub(super) framing: Mutex<Framing>,
    /// Of HTTP/2: type of the last frame that was read.
    last_frame: AtomicU8,
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
    /// Requests that were given up before there was an answer.
    pub(super) abandoned: u64,
}

/// A request that is under way, until its answer has been handed over or dropped.
pub(super) struct Active {
    shared: Arc<Shared>,
    answered: bool,
}

impl Active {
    /// There is a head to answer with.
    pub(super) fn answered(&mut self) {
        self.answered = true;
    }
}

impl Shared {
    pub(super) fn new(bytes: Arc<ByteCount>) -> Arc<Self> {
        Arc::new(Self {
            framing: Mutex::new(Framing::new()),
            last_frame: AtomicU8::new(0),
            usage: Mutex::new(Usage {
                active: 0,
                since: Instant::now(),
                abandoned: 0,
            }),
            switched: Mutex::new(None),
            requests: AtomicU64::new(0),
            bytes,
        })
    }

    pub(super) fn begin(self: &Arc<Self>) -> Active {
        self.usage.lock().active += 1;
        Active {
            shared: self.clone(),
            answered: false,
        }
    }

    pub(super) fn last_frame(&self) -> u8 {
        self.last_frame.load(Ordering::Relaxed)
    }

    pub(super) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        let mut usage = self.shared.usage.lock();
        usage.active -= 1;
        usage.abandoned += u64::from(!self.answered);
        usage.since = Instant::now();
    }
}

/// Reads and writes through, counts, and follows what was read.
pub(super) struct Watched {
    io: HttpIo,
    shared: Arc<Shared>,
    /// For HTTP/2; HTTP/1 is followed in [`Shared::framing`].
    frames: Option<Frames>,
}

/// Walks over the frames of a client that speaks HTTP/2 (RFC 9113 §4.1).
struct Frames {
    /// Bytes until the next frame.
    skip: usize,
    head: [u8; 9],
    /// Bytes of `head` that are there.
    have: usize,
}

impl Frames {
    fn new() -> Self {
        const PREFACE_BYTES: usize = 24;
        Self {
            skip: PREFACE_BYTES,
            head: [0; 9],
            have: 0,
        }
    }

    /// The type of the last frame that begins in these bytes.
    fn advance(&mut self, mut bytes: &[u8]) -> Option<u8> {
        let mut last = None;
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            if bytes.is_empty() {
                return last;
            }
            let taken = (self.head.len() - self.have).min(bytes.len());
            self.head[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            self.have += taken;
            bytes = &bytes[taken..];
            if self.have == self.head.len() {
                let [high, middle, low, kind, ..] = self.head;
                self.skip = u32::from_be_bytes([0, high, middle, low]) as usize;
                self.have = 0;
                last = Some(kind);
            }
        }
    }
}

impl Watched {
    pub(super) fn new(io: HttpIo, shared: Arc<Shared>, wire: Wire) -> Self {
        Self {
            io,
            shared,
            frames: (wire == Wire::Http2).then(Frames::new),
        }
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
            match &mut this.frames {
                None => this.shared.framing.lock().advance(news),
                Some(frames) => {
                    if let Some(kind) = frames.advance(news) {
                        this.shared.last_frame.store(kind, Ordering::Relaxed);
                    }
                }
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
