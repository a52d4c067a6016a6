//! A downstream connection's bytes, watched as they are read.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::coop;
use tokio::time::Instant;

use super::framing::Framing;
use super::io::HttpIo;
use super::refused::OwnWords;
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
    /// Of HTTP/1: from a request to the last byte of its answer.
    answering: AtomicBool,
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
    /// What its connection shares with it.
    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

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
            answering: AtomicBool::new(false),
            bytes,
        })
    }

    pub(super) fn begin(self: &Arc<Self>) -> Active {
        self.usage.lock().active += 1;
        self.answering.store(true, Ordering::Relaxed);
        Active {
            shared: self.clone(),
            answered: false,
        }
    }

    /// All that was to be written has been.
    fn flushed(&self) {
        if self.answering.load(Ordering::Relaxed) && self.usage.lock().active == 0 {
            self.answering.store(false, Ordering::Relaxed);
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
    /// In place of what hyper says by itself.
    own: Option<OwnWords>,
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

    /// How many frames' heads end in these bytes, and the type of the last one.
    fn advance(&mut self, mut bytes: &[u8]) -> (u32, Option<u8>) {
        let (mut count, mut last) = (0, None);
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            if bytes.is_empty() {
                return (count, last);
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
                count += 1;
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
            own: None,
        }
    }

    pub(super) fn into_inner(self) -> HttpIo {
        self.io
    }

    /// What hyper writes while no answer is under way is a refusal of its own, which does not say
    /// why: ours is written in its place.
    fn in_own_words(&mut self, bytes: &[u8]) -> Option<&mut OwnWords> {
        if self.own.is_none()
            && self.frames.is_none()
            && !self.shared.answering.load(Ordering::Relaxed)
        {
            let found = self.shared.framing.lock().found();
            self.own = OwnWords::in_place_of(bytes, found);
        }
        self.own.as_mut()
    }

    fn wrote(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(bytes)) = &written {
            self.shared.bytes.add_sent(*bytes as u64);
        }
        written
    }

    fn poll_own_words(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(left) = self
            .own
            .as_ref()
            .map(OwnWords::left)
            .filter(|left| !left.is_empty())
        {
            let written = ready!(Pin::new(&mut self.io).poll_write(cx, left))?;
            self.shared.bytes.add_sent(written as u64);
            if let Some(own) = &mut self.own {
                own.advance(written);
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// So many frames are as much work as a read.
const FRAMES_OF_A_READ: u32 = 16;

/// Takes a part of the task's budget for so many frames: a read that is full of small ones is as much work as many reads,
/// and the task has to give way to others as soon.
fn spend(frames: u32, cx: &mut Context<'_>) {
    for _ in 0..frames / FRAMES_OF_A_READ {
        match coop::poll_proceed(cx) {
            Poll::Ready(part) => part.made_progress(),
            Poll::Pending => return,
        }
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let turn = ready!(coop::poll_proceed(cx));
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.io).poll_read(cx, buffer);
        if read.is_ready() {
            turn.made_progress();
        }
        let news = &buffer.filled()[before..];
        if !news.is_empty() {
            this.shared.bytes.add_received(news.len() as u64);
            match &mut this.frames {
                None => this.shared.framing.lock().advance(news),
                Some(frames) => {
                    let (count, last) = frames.advance(news);
                    spend(count, cx);
                    if let Some(kind) = last {
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
        if this.in_own_words(bytes).is_some() {
            ready!(this.poll_own_words(cx))?;
            return Poll::Ready(Ok(bytes.len()));
        }
        let written = Pin::new(&mut this.io).poll_write(cx, bytes);
        this.wrote(written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let first = slices.iter().find(|slice| !slice.is_empty());
        if let Some(first) = first
            && this.in_own_words(first).is_some()
        {
            ready!(this.poll_own_words(cx))?;
            return Poll::Ready(Ok(first.len()));
        }
        let written = Pin::new(&mut this.io).poll_write_vectored(cx, slices);
        this.wrote(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // It is asked for when nothing is left to write.
        this.shared.flushed();
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::AsyncWriteExt;
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    const BYTES: usize = 60 * 1024;

    /// What a task reads of these frames before it gives way for the first time.
    async fn read_in_one_turn(frames: &[u8]) -> usize {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (mut client, accepted) =
            tokio::try_join!(TcpStream::connect(address), listener.accept()).unwrap();
        client
            .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            .await
            .unwrap();
        client.write_all(frames).await.unwrap();
        let mut all = vec![0; 2 * BYTES];
        // Until all has arrived.
        while accepted.0.peek(&mut all).await.unwrap() < frames.len() {}
        let shared = Shared::new(Arc::default());
        let mut watched = Watched::new(accepted.0.into(), shared, Wire::Http2);
        tokio::task::yield_now().await;
        poll_fn(|cx| {
            let mut read = 0;
            loop {
                let mut bytes = [0; 1024];
                let mut buffer = ReadBuf::new(&mut bytes);
                match Pin::new(&mut watched).poll_read(cx, &mut buffer) {
                    Poll::Ready(result) => result.unwrap(),
                    Poll::Pending => return Poll::Ready(read),
                }
                read += buffer.filled().len();
            }
        })
        .await
    }

    #[tokio::test]
    async fn a_task_gives_way_after_some_frames_however_small_they_are() {
        let ping = [0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
        let pings = ping.repeat(BYTES / ping.len());
        let read = read_in_one_turn(&pings).await;
        let most = 128 * FRAMES_OF_A_READ as usize * ping.len();
        assert!((1..=most).contains(&read), "{read} bytes");

        let mut data = vec![0, 0xef, 0, 0, 0, 0, 0, 0, 1];
        data.resize(BYTES, 0);
        let read = read_in_one_turn(&data).await;
        assert!(read >= BYTES, "{read} bytes");
    }
}
