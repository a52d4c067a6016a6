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

/// Runs both directions until both have ended, or until one breaks. `there` is from this end, and `back` is to it.
///
/// They are pinned by the caller: given by value, they would lie in the task of every
/// connection once more for each function that they pass through.
///
/// `failure_of` watches over the source of a direction. It is asked for only while that has nothing
/// more to say but still something to hear: its own reading has ended, so nobody else would
/// notice that it went away.
pub(super) fn join<F>(
    mut there: Pin<&mut impl Future<Output = Result<(), Broken>>>,
    mut back: Pin<&mut impl Future<Output = Result<(), Broken>>>,
    end: Peer,
    failure_of: impl Fn(Peer) -> Option<F>,
) -> impl Future<Output = Ended>
where
    F: Future<Output = ()>,
{
    let (mut there_ended, mut back_ended) = (false, false);
    // Boxed: few connections are half open for long.
    let mut failure: Option<Pin<Box<F>>> = None;
    poll_fn(move |cx| {
        if !there_ended && let Poll::Ready(result) = there.as_mut().poll(cx) {
            if let Err(broken) = result {
                let by = broken.between(end, end.other());
                return Poll::Ready(Ended::Reset(by));
            }
            there_ended = true;
        }
        if !back_ended && let Poll::Ready(result) = back.as_mut().poll(cx) {
            if let Err(broken) = result {
                let by = broken.between(end.other(), end);
                return Poll::Ready(Ended::Reset(by));
            }
            back_ended = true;
        }
        let silent = match (there_ended, back_ended) {
            (false, false) => return Poll::Pending,
            (true, true) => return Poll::Ready(Ended::InOrder),
            (true, false) => end,
            (false, true) => end.other(),
        };
        // At most one of both: with the other end all is over.
        if failure.is_none() {
            failure = failure_of(silent).map(Box::pin);
        }
        match &mut failure {
            Some(failure) => failure.as_mut().poll(cx).map(|()| Ended::Reset(silent)),
            None => Poll::Pending,
        }
    })
}
