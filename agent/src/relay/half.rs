//! The two directions of a connection, run side by side.

use std::future::Future;
use std::pin::pin;

use super::{Ended, Peer};

/// Why one direction stopped before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Broken {
    /// Reading failed: the sender is to blame.
    Source,
    /// Writing failed: the receiver is to blame.
    Sink,
}

impl Broken {
    pub(super) fn between(self, source: Peer, sink: Peer) -> Peer {
        match self {
            Self::Source => source,
            Self::Sink => sink,
        }
    }
}

/// Runs both directions until both have ended, or until one breaks.
///
/// `downstream_failed` and `upstream_failed` are polled only while that end has nothing more to
/// say but still something to hear: its own reading has ended, so nobody else would notice that it
/// went away.
pub(super) async fn join(
    there: impl Future<Output = Result<(), Peer>>,
    back: impl Future<Output = Result<(), Peer>>,
    downstream_failed: impl Future<Output = ()>,
    upstream_failed: impl Future<Output = ()>,
) -> Ended {
    let (mut there, mut back) = (pin!(there), pin!(back));
    let (mut downstream_failed, mut upstream_failed) =
        (pin!(downstream_failed), pin!(upstream_failed));
    let (mut there_ended, mut back_ended) = (false, false);
    while !(there_ended && back_ended) {
        tokio::select! {
            end = &mut there, if !there_ended => match end {
                Ok(()) => there_ended = true,
                Err(peer) => return Ended::Reset(peer),
            },
            end = &mut back, if !back_ended => match end {
                Ok(()) => back_ended = true,
                Err(peer) => return Ended::Reset(peer),
            },
            () = &mut downstream_failed, if there_ended && !back_ended => {
                return Ended::Reset(Peer::Downstream);
            }
            () = &mut upstream_failed, if back_ended && !there_ended => {
                return Ended::Reset(Peer::Upstream);
            }
        }
    }
    Ended::InOrder
}
