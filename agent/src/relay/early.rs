//! Relays that begin in the middle: some bytes were read before, by a parser that handed over.

use std::sync::atomic::Ordering;

use bytes::Bytes;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use super::buffers::write_all;
use super::{Borrowed, Counts, Ended, Peer, relay_tcp, relay_tunnel};
use crate::tunnel::{ResetReason, TunnelIo, TunnelReceive, TunnelSend};

/// Bytes that were read already and come first; no more than a parser's buffer.
#[derive(Debug, Default)]
pub struct Early {
    /// From downstream.
    pub to_upstream: Bytes,
    /// From upstream.
    pub to_downstream: Bytes,
}

/// [`relay_tcp`], after these bytes.
pub async fn relay_tcp_after(
    early: Early,
    downstream: TcpStream,
    upstream: TcpStream,
    counts: Counts<'_>,
    stop: &CancellationToken,
) -> Ended {
    let there = async {
        write_all(&upstream, &early.to_upstream)
            .await
            .map_err(|_| Ended::Reset(Peer::Upstream))
    };
    let back = async {
        write_all(&downstream, &early.to_downstream)
            .await
            .map_err(|_| Ended::Reset(Peer::Downstream))
    };
    let written = tokio::select! {
        written = async { tokio::try_join!(there, back) } => written,
        () = stop.cancelled() => Err(Ended::Stopped),
    };
    if let Err(ended) = written {
        return ended;
    }
    count(&early, counts);
    relay_tcp(downstream, upstream, Borrowed { counts, stop }).await
}

/// [`relay_tunnel`], after these bytes and what the tunnel has received and nobody read.
pub async fn relay_tunnel_after(
    early: Early,
    socket: TcpStream,
    plain: Peer,
    tunnel: TunnelIo,
    counts: Counts<'_>,
    stop: &CancellationToken,
) -> Ended {
    match begin_tunnel(early, socket, plain, tunnel, counts, stop).await {
        Ok((socket, send, receive)) => {
            relay_tunnel(socket, plain, send, receive, Borrowed { counts, stop }).await
        }
        Err(ended) => ended,
    }
}

/// Passes these bytes on, and what the tunnel has received and nobody read. What it gives back is for [`relay_tunnel`].
pub async fn begin_tunnel(
    mut early: Early,
    socket: TcpStream,
    plain: Peer,
    tunnel: TunnelIo,
    counts: Counts<'_>,
    stop: &CancellationToken,
) -> Result<(TcpStream, TunnelSend, TunnelReceive), Ended> {
    let (mut send, mut receive, unread) = tunnel.into_halves();
    let (to_tunnel, to_socket) = match plain {
        Peer::Downstream => (&mut early.to_upstream, &mut early.to_downstream),
        Peer::Upstream => (&mut early.to_downstream, &mut early.to_upstream),
    };
    if !unread.is_empty() {
        *to_socket = [&to_socket[..], &unread[..]].concat().into();
    }
    let far = plain.other();
    let (to_tunnel, to_socket) = (to_tunnel.clone(), to_socket.clone());
    let there = async {
        if to_tunnel.is_empty() {
            return Ok(());
        }
        send.send(to_tunnel).await.map_err(|_| Ended::Reset(far))
    };
    let back = async {
        write_all(&socket, &to_socket)
            .await
            .map_err(|_| Ended::Reset(plain))
    };
    let written = tokio::select! {
        written = async { tokio::try_join!(there, back) } => written,
        () = stop.cancelled() => Err(Ended::Stopped),
    };
    if let Err(ended) = written {
        send.reset(ResetReason::Connection);
        return Err(ended);
    }
    receive.release(unread.len());
    count(&early, counts);
    Ok((socket, send, receive))
}

fn count(early: &Early, counts: Counts<'_>) {
    let Early {
        to_upstream,
        to_downstream,
    } = early;
    counts
        .to_upstream
        .fetch_add(to_upstream.len() as u64, Ordering::Relaxed);
    counts
        .to_downstream
        .fetch_add(to_downstream.len() as u64, Ordering::Relaxed);
}
