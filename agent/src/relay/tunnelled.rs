//! Between a plain TCP socket and a stream of a tunnel.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use super::buffers::{ReadBuffer, try_write, write_all};
use super::half::{self, Broken};
use super::{Counts, Ended, Peer, close_in_order, failed, splice};
use crate::tunnel::{ResetReason, TunnelReceive, TunnelSend};

/// Relays between a TCP socket and a tunnel's stream. `plain` says which end the socket is: the
/// downstream one where the tunnel was opened, the upstream one where it was accepted.
///
/// An idle connection holds one of these.
#[allow(
    clippy::manual_async_fn,
    reason = "an async fn holds its arguments twice"
)]
pub fn relay_tunnel<'a>(
    socket: TcpStream,
    plain: Peer,
    mut send: TunnelSend,
    mut receive: TunnelReceive,
    counts: Counts<'a>,
    stop: &'a CancellationToken,
) -> impl Future<Output = Ended> + Send + use<'a> {
    async move {
        let (out, back) = match plain {
            Peer::Downstream => (counts.to_upstream, counts.to_downstream),
            Peer::Upstream => (counts.to_downstream, counts.to_upstream),
        };
        let ended = {
            let into_tunnel = pin!(async {
                loop {
                    tokio::select! {
                        biased;
                        readable = socket.readable() => readable.map_err(|_| Broken::Source)?,
                        // The far side may break off when it has already said all it had to say.
                        _ = send.broken() => return Err(Broken::Sink),
                    }
                    let mut buffer = ReadBuffer::take();
                    while let Some(chunk) = buffer.read(&socket).map_err(|_| Broken::Source)? {
                        if chunk.is_empty() {
                            return send.finish().map_err(|_| Broken::Sink);
                        }
                        let length = chunk.len() as u64;
                        let rest = send.try_send(chunk).map_err(|_| Broken::Sink)?;
                        if !rest.is_empty() {
                            Box::pin(send_rest(&mut send, rest, &socket)).await?;
                        }
                        out.fetch_add(length, Ordering::Relaxed);
                        tokio::task::coop::consume_budget().await;
                    }
                }
            });
            let out_of_tunnel = pin!(async {
                while let Some(chunk) = receive.data().await {
                    let chunk = chunk.map_err(|_| Broken::Source)?;
                    let written = try_write(&socket, &chunk).map_err(|_| Broken::Sink)?;
                    if written < chunk.len() {
                        let rest = Box::pin(write_all(&socket, &chunk[written..])).await;
                        rest.map_err(|_| Broken::Sink)?;
                    }
                    back.fetch_add(chunk.len() as u64, Ordering::Relaxed);
                    // Only now may the far side send more: a slow reader costs one window, no memory.
                    receive.release(chunk.len());
                }
                splice::end(&socket)
            });
            // A tunnel's end says by itself when it breaks.
            let failure_of = |peer| (peer == plain).then(|| failed(&socket));
            let both = async {
                match plain {
                    Peer::Downstream => half::join(into_tunnel, out_of_tunnel, failure_of).await,
                    Peer::Upstream => half::join(out_of_tunnel, into_tunnel, failure_of).await,
                }
            };
            tokio::select! {
                ended = both => ended,
                () = stop.cancelled() => Ended::Stopped,
            }
        };
        match ended {
            Ended::InOrder => close_in_order(socket),
            Ended::Reset(_) | Ended::Stopped => send.reset(ResetReason::Connection),
        }
        ended
    }
}

/// What the tunnel did not take at once: a full window, or a full socket. Boxed where it is used, as
/// idle connections need none of it.
async fn send_rest(send: &mut TunnelSend, rest: Bytes, source: &TcpStream) -> Result<(), Broken> {
    tokio::select! {
        biased;
        sent = send.send(rest) => sent.map_err(|_| Broken::Sink),
        () = failed(source) => Err(Broken::Source),
    }
}
