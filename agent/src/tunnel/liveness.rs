//! Is the peer still there? Whatever is received proves it; PING asks only into silence.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout_at};

/// What a tunnel runs over.
pub trait Transport: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Called once before use: the end of a tunnel's socket carries no meaning, since its
    /// streams' ends do. So unsent bytes are to be delivered after a close.
    fn prepare(&self) {}

    /// Called before the drop of a transport that was given up: nothing shall linger.
    fn abort(&self) {}
}

impl Transport for TcpStream {
    fn prepare(&self) {
        let socket = socket2::SockRef::from(self);
        let results = [socket.set_linger(None), socket.set_tcp_nodelay(true)];
        for error in results.into_iter().filter_map(Result::err) {
            tracing::debug!(%error, "cannot set options of a tunnel's socket");
        }
    }

    fn abort(&self) {
        if let Err(error) = socket2::SockRef::from(self).set_linger(Some(Duration::ZERO)) {
            tracing::debug!(%error, "cannot abort a tunnel's socket");
        }
    }
}

impl Transport for tokio::io::DuplexStream {}

/// What is known of a tunnel's peer being alive.
#[derive(Debug)]
pub(super) struct Liveness {
    /// Reads that brought bytes.
    reads: AtomicU64,
    start: Instant,
    /// When the last of them was, in nanoseconds since the start.
    last: AtomicU64,
    /// Drop the transport without ceremony.
    abort: AtomicBool,
    nudge: Notify,
}

impl Liveness {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            reads: AtomicU64::new(0),
            start: Instant::now(),
            last: AtomicU64::new(0),
            abort: AtomicBool::new(false),
            nudge: Notify::new(),
        })
    }

    fn note(&self) {
        let since_start = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.last.store(since_start, Ordering::Relaxed);
        self.reads.fetch_add(1, Ordering::Relaxed);
    }

    /// When the peer last gave a sign of life.
    fn last_read(&self) -> Instant {
        self.start + Duration::from_nanos(self.last.load(Ordering::Relaxed))
    }

    /// Changes whenever something was received.
    pub(super) fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    /// Asks the peer for a sign of life now.
    pub(super) fn nudge(&self) {
        self.nudge.notify_one();
    }

    /// Lets the end of the transport be a reset.
    pub(super) fn abort(&self) {
        self.abort.store(true, Ordering::Relaxed);
    }
}

/// A transport that notes each sign of life.
pub(super) struct Watched<T: Transport> {
    inner: T,
    liveness: Arc<Liveness>,
}

impl<T: Transport> Watched<T> {
    pub(super) fn new(inner: T, liveness: Arc<Liveness>) -> Self {
        inner.prepare();
        Self { inner, liveness }
    }
}

impl<T: Transport> Drop for Watched<T> {
    fn drop(&mut self) {
        if self.liveness.abort.load(Ordering::Relaxed) {
            self.inner.abort();
        }
    }
}

impl<T: Transport> AsyncRead for Watched<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.inner).poll_read(cx, buffer))?;
        if buffer.filled().len() > before {
            this.liveness.note();
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: Transport> AsyncWrite for Watched<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// Returns when the peer has been silent for too long; never, if it ends in another way.
///
/// No PING is sent while bytes come in. That is more than thrift: h2 reads nothing while a PING
/// or its answer waits for a full socket, so two busy peers that ask each other at once would
/// both stop reading, and wait for the timeout.
pub(super) async fn silence(
    pings: Option<PingPong>,
    liveness: &Liveness,
    interval: Duration,
    timeout: Duration,
) {
    let Some(mut pings) = pings else {
        return std::future::pending().await;
    };
    loop {
        loop {
            let due = liveness.last_read() + interval;
            tokio::select! {
                () = sleep_until(due) => {}
                () = liveness.nudge.notified() => break,
            }
            if liveness.last_read() + interval <= Instant::now() {
                break;
            }
        }
        if pings.send_ping(Ping::opaque()).is_err() {
            return std::future::pending().await;
        }
        let sent = Instant::now();
        loop {
            // Late, but something else came: a busy peer.
            let deadline = sent.max(liveness.last_read()) + timeout;
            if deadline <= Instant::now() {
                return;
            }
            let pong = std::future::poll_fn(|cx| pings.poll_pong(cx));
            match timeout_at(deadline, pong).await {
                Ok(Ok(_)) => break,
                Ok(Err(_)) => return std::future::pending().await,
                Err(_) => {}
            }
        }
    }
}
