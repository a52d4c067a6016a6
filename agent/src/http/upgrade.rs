//! WebSocket and other upgrades (RFC 9110 §7.8): once the upstream has said 101, two raw streams.

use bytes::Bytes;
use parking_lot::Mutex;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

use super::io::HttpIo;
use super::upstreams::Held;
use crate::relay::{self, Counts, Ended, Peer};

/// The upstream side of a connection that speaks another protocol now; it travels in the extensions
/// of the 101 answer. Dropped, it resets the upstream.
#[derive(Clone)]
pub(super) struct Switched(Arc<Mutex<Option<Raw>>>);

/// A connection, and what was read of it beyond HTTP.
pub(super) struct Raw {
    io: HttpIo,
    read: Bytes,
    _held: Option<Held>,
}

impl Switched {
    pub(super) fn new(io: HttpIo, read: Bytes, held: Option<Held>) -> Self {
        let raw = Raw {
            io,
            read,
            _held: held,
        };
        Self(Arc::new(Mutex::new(Some(raw))))
    }

    /// The connection; extensions can be cloned, so only the first who asks gets it.
    pub(super) fn take(&self) -> Option<Raw> {
        self.0.lock().take()
    }
}

/// Relays between the client, of whom `early` was read already, and the upstream, until both have
/// ended or one broke.
pub(super) async fn relay(
    downstream: HttpIo,
    early: Bytes,
    upstream: Raw,
    counts: Counts<'_>,
    stop: &CancellationToken,
) -> Ended {
    let Raw {
        io: upstream,
        read,
        _held,
    } = upstream;
    let early = relay::Early {
        to_upstream: early,
        to_downstream: read,
    };
    match (downstream, upstream) {
        (HttpIo::Socket(downstream), HttpIo::Socket(upstream)) => {
            relay::relay_tcp_after(early, downstream, upstream, counts, stop).await
        }
        (HttpIo::Socket(socket), HttpIo::Tunnel(tunnel)) => {
            relay::relay_tunnel_after(early, socket, Peer::Downstream, tunnel, counts, stop).await
        }
        (HttpIo::Tunnel(tunnel), HttpIo::Socket(socket)) => {
            relay::relay_tunnel_after(early, socket, Peer::Upstream, tunnel, counts, stop).await
        }
        // No path of the agent leads from a tunnel into a tunnel.
        (HttpIo::Tunnel(_), HttpIo::Tunnel(_)) => Ended::Stopped,
    }
}
