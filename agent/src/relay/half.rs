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
/// `there_failed` and `back_failed` watch over the source of that direction. They are polled only
/// while it has nothing more to say but still something to hear: its own reading has ended, so
/// nobody else would notice that it went away.
pub(super) async fn join(
    there: impl Future<Output = Result<(), Peer>>,
    back: impl Future<Output = Result<(), Peer>>,
    there_failed: impl Future<Output = Peer>,
    back_failed: impl Future<Output = Peer>,
) -> Ended {
    let (mut there, mut back) = (pin!(there), pin!(back));
    let (mut there_failed, mut back_failed) = (pin!(there_failed), pin!(back_failed));
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
            peer = &mut there_failed, if there_ended && !back_ended => return Ended::Reset(peer),
            peer = &mut back_failed, if back_ended && !there_ended => return Ended::Reset(peer),
        }
    }
    Ended::InOrder
}
