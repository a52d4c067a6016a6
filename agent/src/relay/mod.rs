//! Moving bytes between the two ends of a connection until both directions have ended.
//!
//! A stream ends in one of two ways, and the difference is kept from one side to the other:
//!
//! - *in order*: each direction's FIN (or `END_STREAM`) was passed on after its last byte;
//! - *reset*: anything else. The other side then sees a TCP RST (or `RST_STREAM`), never a FIN, so
//!   that a truncated body cannot look whole.
//!
//! Sockets come here with `SO_LINGER {1, 0}` set, so that whatever ends this process or drops this
//! future resets them; only [`Ended::InOrder`] clears it.

mod buffers;
mod early;
mod half;
mod splice;
mod tunnelled;

use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::atomic::AtomicU64;

use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::telemetry::{ByteCount, End, FailureReason, Side};

pub use buffers::free_buffers;
pub use early::{Early, begin_tunnel, relay_tcp_after, relay_tunnel_after};
pub use tunnelled::relay_tunnel;

/// One end of a relayed connection, as the agent stands between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// Who opened the connection.
    Downstream,
    /// Who it was opened to.
    Upstream,
}

impl Peer {
    /// The one at the other end.
    fn other(self) -> Self {
        match self {
            Self::Downstream => Self::Upstream,
            Self::Upstream => Self::Downstream,
        }
    }
}

impl<'a> From<&'a ByteCount> for Counts<'a> {
    fn from(bytes: &'a ByteCount) -> Self {
        Self {
            to_upstream: &bytes.received,
            to_downstream: &bytes.sent,
        }
    }
}

impl From<Ended> for End {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::InOrder => Self::Complete,
            Ended::Reset(Peer::Downstream) => Self::Reset { by: Side::Source },
            Ended::Reset(Peer::Upstream) => Self::Reset {
                by: Side::Destination,
            },
            Ended::Stopped => Self::Failed(FailureReason::Drained),
        }
    }
}

/// How a relayed connection came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Both directions ended, each after its last byte was passed on.
    InOrder,
    /// This end reset or broke the connection; the other was reset too.
    Reset(Peer),
    /// The agent was told to stop it; both ends were reset.
    Stopped,
}

/// Where the relay counts the bytes that it has passed on.
#[derive(Debug, Clone, Copy)]
pub struct Counts<'a> {
    /// From downstream.
    pub to_upstream: &'a AtomicU64,
    /// From upstream.
    pub to_downstream: &'a AtomicU64,
}

/// A connection that is relayed, as its relay owns it. What a future around the relay held for it would be in memory
/// beside it for as long as the connection idles.
pub trait Relayed: Send + Sync {
    /// Where its bytes are counted.
    fn counts(&self) -> Counts<'_>;

    /// What stops it.
    fn stop(&self) -> &CancellationToken;
}

/// One of which somebody else keeps all that.
#[derive(Debug, Clone, Copy)]
pub struct Borrowed<'a> {
    /// Where its bytes are counted.
    pub counts: Counts<'a>,
    /// What stops it.
    pub stop: &'a CancellationToken,
}

impl Relayed for Borrowed<'_> {
    fn counts(&self) -> Counts<'_> {
        self.counts
    }

    fn stop(&self) -> &CancellationToken {
        self.stop
    }
}

/// Relays between two plain TCP sockets, without copying through user space.
///
/// An idle connection holds one of these.
#[allow(
    clippy::manual_async_fn,
    reason = "an async fn holds its arguments twice"
)]
pub fn relay_tcp<C: Relayed>(
    downstream: TcpStream,
    upstream: TcpStream,
    connection: C,
) -> impl Future<Output = Ended> + Send + use<C> {
    async move {
        let ended = {
            let counts = connection.counts();
            let there = pin!(splice::pump(&downstream, &upstream, counts.to_upstream));
            let back = pin!(splice::pump(&upstream, &downstream, counts.to_downstream));
            let both = half::join(there, back, Peer::Downstream, |peer| {
                Some(failed(match peer {
                    Peer::Downstream => &downstream,
                    Peer::Upstream => &upstream,
                }))
            });
            tokio::select! {
                ended = both => ended,
                () = connection.stop().cancelled() => Ended::Stopped,
            }
        };
        if ended == Ended::InOrder {
            close_in_order(downstream);
            close_in_order(upstream);
        }
        ended
    }
}

/// Returns once the socket has something to read, its end or an error.
///
/// By tokio's place for the one task that reads, where `TcpStream::readable` would hold a place of its own in every idle
/// connection. Both directions of a connection are in one task.
fn readable(stream: &TcpStream) -> impl Future<Output = io::Result<()>> + use<'_> {
    poll_fn(|cx| stream.poll_read_ready(cx))
}

/// Closes a socket whose both directions have ended, so that what the kernel still holds of its
/// last bytes is delivered, where an abort would throw it away.
pub fn close_in_order(stream: TcpStream) {
    // An error means that the socket is dead already, and there is nothing left to deliver.
    let _ = socket2::SockRef::from(&stream).set_linger(None);
}

/// Returns once the socket has an error, as after an RST. For a socket that nobody reads at the
/// moment, because its reading has ended or because the other side does not take what was read:
/// otherwise reading must see the bytes that came before the error.
async fn failed(stream: &TcpStream) {
    let pending = || match stream.take_error() {
        Ok(None) => Err(io::ErrorKind::WouldBlock.into()),
        Ok(Some(_)) | Err(_) => Ok(()),
    };
    // An error of the registration itself leaves nothing to wait for, as an RST does.
    let _ = stream.async_io(Interest::ERROR, pending).await;
}

#[cfg(test)]
mod tests;
