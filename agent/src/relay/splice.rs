//! One direction between two TCP sockets by splice(2): bytes stay in the kernel.

use std::future::Future;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use parking_lot::Mutex;
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::half::Broken;
use super::{buffers, failed, readable};

/// What one pipe may hold, and so what one direction may have in flight inside the agent. The
/// default of 64 KiB costs a quarter of the throughput of a bulk stream.
const PIPE_BYTES: usize = 256 * 1024;

/// Empty pipes kept for the next bytes; more are closed when given back.
const IDLE_PIPES: usize = 128;

static IDLE: Mutex<Vec<Pipe>> = Mutex::new(Vec::new());

/// An empty pipe. It is taken when bytes are there and given back when none are, so an idle
/// connection holds none.
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl Pipe {
    fn take() -> io::Result<Self> {
        if let Some(pipe) = IDLE.lock().pop() {
            return Ok(pipe);
        }
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        // The kernel may refuse a larger pipe (fs.pipe-user-pages-soft); the default still works.
        let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES as i32));
        Ok(Self { read, write })
    }

    /// Only for a pipe that has been drained.
    fn give_back(self) {
        let mut idle = IDLE.lock();
        if idle.len() < IDLE_PIPES {
            idle.push(self);
        }
    }
}

/// Moves bytes until the source ends, then ends the sink's sending side.
#[allow(
    clippy::manual_async_fn,
    reason = "an async fn holds its arguments twice"
)]
pub(super) fn pump<'a>(
    source: &'a TcpStream,
    sink: &'a TcpStream,
    count: &'a AtomicU64,
) -> impl Future<Output = Result<(), Broken>> + use<'a> {
    async move {
        let mut sink_is = Sink::Unasked;
        loop {
            readable(source).await.map_err(|_| Broken::Source)?;
            let Ok(pipe) = Pipe::take() else {
                // No descriptor left for a pipe: slower, but the connection lives.
                return Box::pin(buffers::pump(source, sink, count)).await;
            };
            // A pipe with bytes in it is dropped with the error, never given back.
            let turn = move_available(source, sink, &mut sink_is, &pipe, count).await?;
            pipe.give_back();
            if turn == Turn::End {
                return end(sink);
            }
        }
    }
}

/// Passes the end of a direction on.
pub(super) fn end(sink: &TcpStream) -> Result<(), Broken> {
    socket2::SockRef::from(sink)
        .shutdown(Shutdown::Write)
        .map_err(|_| Broken::Sink)
}

#[derive(PartialEq, Eq)]
enum Turn {
    Idle,
    End,
}

/// What is known of a sink when its first bytes have come.
#[derive(PartialEq, Eq)]
enum Sink {
    /// Nothing: it may have been connected just now, and the reactor has not told of it yet. Its first bytes are
    /// written all the same.
    Unasked,
    /// Whatever the reactor tells.
    Asked,
}

async fn move_available(
    source: &TcpStream,
    sink: &TcpStream,
    sink_is: &mut Sink,
    pipe: &Pipe,
    count: &AtomicU64,
) -> Result<Turn, Broken> {
    let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
    loop {
        let fill = || Ok(splice(source, None, &pipe.write, None, PIPE_BYTES, flags)?);
        let filled = match source.try_io(Interest::READABLE, fill) {
            Ok(0) => return Ok(Turn::End),
            Ok(filled) => filled,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Turn::Idle),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return Err(Broken::Source),
        };
        let mut left = filled;
        while left > 0 {
            let drain =
                || -> io::Result<usize> { Ok(splice(&pipe.read, None, sink, None, left, flags)?) };
            let at_once = match std::mem::replace(sink_is, Sink::Asked) {
                Sink::Unasked => drain(),
                Sink::Asked => sink.try_io(Interest::WRITABLE, drain),
            };
            let drained = match at_once {
                // Boxed, as idle connections need none of it.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    Box::pin(drain_later(source, sink, drain)).await?
                }
                drained => drained,
            };
            match drained {
                Ok(0) => return Err(Broken::Sink),
                Ok(drained) => left -= drained,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(Broken::Sink),
            }
        }
        count.fetch_add(filled as u64, Ordering::Relaxed);
        // Both sockets may stay ready for as long as a bulk transfer lasts.
        tokio::task::coop::consume_budget().await;
    }
}

/// Drains as soon as the sink takes something, unless the source fails before.
async fn drain_later(
    source: &TcpStream,
    sink: &TcpStream,
    drain: impl Fn() -> io::Result<usize>,
) -> Result<io::Result<usize>, Broken> {
    tokio::select! {
        biased;
        drained = sink.async_io(Interest::WRITABLE, drain) => Ok(drained),
        () = failed(source) => Err(Broken::Source),
    }
}
