//! Between a plain TCP socket and a stream of a tunnel.

use std::sync::atomic::Ordering;

use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use super::buffers::{ReadBuffer, write_all};
use super::half::{self, Broken};
use super::{Counts, Ended, Peer, close_in_order, failed, splice};
use crate::tunnel::{ResetReason, TunnelReceive, TunnelSend};

/// Relays between a TCP socket and a tunnel's stream. `plain` says which end the socket is: the
/// downstream one where the tunnel was opened, the upstream one where it was accepted.
pub async fn relay_tunnel(
    socket: TcpStream,
    plain: Peer,
    mut send: TunnelSend,
    mut receive: TunnelReceive,
    counts: Counts<'_>,
    stop: &CancellationToken,
) -> Ended {
    let far = match plain {
        Peer::Downstream => Peer::Upstream,
        Peer::Upstream => Peer::Downstream,
    };
    let (out, back) = match plain {
        Peer::Downstream => (counts.to_upstream, counts.to_downstream),
        Peer::Upstream => (counts.to_downstream, counts.to_upstream),
    };
    let ended = {
        let into_tunnel = async {
            loop {
                tokio::select! {
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
                    send.send(chunk).await.map_err(|_| Broken::Sink)?;
                    out.fetch_add(length, Ordering::Relaxed);
                }
            }
        };
        let out_of_tunnel = async {
            while let Some(chunk) = receive.data().await {
                let chunk = chunk.map_err(|_| Broken::Source)?;
                write_all(&socket, &chunk).await.map_err(|_| Broken::Sink)?;
                back.fetch_add(chunk.len() as u64, Ordering::Relaxed);
                // Only now may the far side send more: a slow reader costs one window, no memory.
                receive.release(chunk.len());
            }
            splice::end(&socket)
        };
        let both = half::join(
            async {
                into_tunnel
                    .await
                    .map_err(|broken: Broken| broken.between(plain, far))
            },
            async {
                out_of_tunnel
                    .await
                    .map_err(|broken: Broken| broken.between(far, plain))
            },
            async {
                failed(&socket).await;
                plain
            },
            std::future::pending(),
        );
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
