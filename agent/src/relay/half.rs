//! The two directions of a connection, run side by side.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

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
/// `there` and `back` are pinned by the caller: given by value, they would lie in the task of every
/// connection once more for each function that they pass through.
///
/// `failure_of` watches over the source of a direction. It is asked for only while that has nothing
/// more to say but still something to hear: its own reading has ended, so nobody else would
/// notice that it went away.
pub(super) async fn join<F>(
    mut there: Pin<&mut impl Future<Output = Result<(), Broken>>>,
    mut back: Pin<&mut impl Future<Output = Result<(), Broken>>>,
    failure_of: impl Fn(Peer) -> Option<F>,
) -> Ended
where
    F: Future<Output = ()>,
{
    let (mut there_ended, mut back_ended) = (false, false);
    // Boxed: few connections are half open for long.
    let mut failure: Option<Pin<Box<F>>> = None;
    while !(there_ended && back_ended) {
        tokio::select! {
            end = &mut there, if !there_ended => match end {
                Ok(()) => there_ended = true,
                Err(broken) => return Ended::Reset(broken.between(Peer::Downstream, Peer::Upstream)),
            },
            end = &mut back, if !back_ended => match end {
                Ok(()) => back_ended = true,
                Err(broken) => return Ended::Reset(broken.between(Peer::Upstream, Peer::Downstream)),
            },
            () = poll_fn(|cx| match &mut failure {
                Some(failure) => failure.as_mut().poll(cx),
                None => Poll::Pending,
            }) => return Ended::Reset(if there_ended { Peer::Downstream } else { Peer::Upstream }),
        }
        // At most one of both: the loop ends with the other.
        if failure.is_none() {
            let silent = if there_ended {
                Peer::Downstream
            } else {
                Peer::Upstream
            };
            failure = failure_of(silent).map(Box::pin);
        }
    }
    Ended::InOrder
}
