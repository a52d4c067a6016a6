//! A listener that a stranger cannot exhaust: bounded connections, bounded time for each.

use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Connections at one time; those beyond are closed at once and counted.
pub(super) const CONNECTIONS: usize = 64;

/// How long the head of a request may take, and so how long a connection may be idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection may stay; a request that it is in the middle of may end.
const LIFETIME: Duration = Duration::from_secs(120);

/// How long a request may still take when the connection's time is over or the agent stops.
const LAST_REQUEST: Duration = Duration::from_secs(5);

/// How long to wait when accepting fails: with EMFILE it would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Heads of requests are small; so is the buffer.
const READ_BUFFER: usize = 16 * 1_024;

/// A bound listener and its limits.
pub(super) struct Listener {
    socket: TcpListener,
    refused: Arc<AtomicU64>,
}

impl Listener {
    pub fn new(socket: TcpListener) -> Self {
        Self {
            socket,
            refused: Arc::default(),
        }
    }

    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// The same socket once more, to be handed over.
    pub fn copy(&self) -> std::io::Result<std::net::TcpListener> {
        Ok(self.socket.as_fd().try_clone_to_owned()?.into())
    }

    /// Connections that were refused because there were too many.
    pub fn refused(&self) -> Arc<AtomicU64> {
        self.refused.clone()
    }

    /// Serves until stopped, and returns when the last connection has ended.
    pub async fn serve(self, router: Router, stop: CancellationToken) {
        let permits = Arc::new(Semaphore::new(CONNECTIONS));
        let connections = TaskTracker::new();
        while let Some(accepted) = stop.run_until_cancelled(self.socket.accept()).await {
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection to the admin endpoint");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(permit) = permits.clone().try_acquire_owned() else {
                self.refused.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            let (router, stop) = (router.clone(), stop.clone());
            connections.spawn(async move {
                serve_connection(stream, router, stop).await;
                drop(permit);
            });
        }
        // Who connects now is refused instead of waiting for nobody.
        drop(self.socket);
        connections.close();
        connections.wait().await;
    }
}

/// Serves one connection until it ends, its time is over, or the agent stops.
pub(super) async fn serve_connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    stop: CancellationToken,
) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(READ_BUFFER)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = pin!(connection);
    tokio::select! {
        // Errors are the client's: it went away, or did not speak HTTP.
        _ = connection.as_mut() => return,
        () = stop.cancelled() => {}
        () = tokio::time::sleep(LIFETIME) => {}
    }
    connection.as_mut().graceful_shutdown();
    _ = tokio::time::timeout(LAST_REQUEST, connection).await;
}
