//! The connections that ended last, for who asks why a moment later.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;

use super::connection::Moved;
use super::{CloseReason, ConnectionInfo, ConnectionView, EndedView, FailureReason, Phase};

/// A connection that ended. Its names are the model's, so that many of them take little.
#[derive(Debug, Clone)]
pub(super) struct Ended {
    pub id: u64,
    pub info: ConnectionInfo,
    pub moved: Moved,
    pub opened_at: SystemTime,
    pub lasted: Duration,
    pub close_reason: CloseReason,
    /// Why, if it failed.
    pub reason: Option<FailureReason>,
    /// An explanation of that.
    pub detail: Option<Box<str>>,
}

impl Ended {
    /// As it is shown.
    pub fn view(&self) -> EndedView {
        EndedView {
            connection: ConnectionView::new(
                self.id,
                &self.info,
                Phase::Closed,
                self.moved,
                self.opened_at,
                self.lasted,
            ),
            close_reason: self.close_reason,
            reason: self.reason,
            detail: self.detail.clone(),
        }
    }
}

/// A bounded memory: the oldest is forgotten for the newest.
pub(super) struct History {
    ended: Mutex<VecDeque<Ended>>,
    bound: usize,
}

impl History {
    pub fn new(bound: usize) -> Self {
        Self {
            ended: Mutex::default(),
            bound,
        }
    }

    pub fn remember(&self, one: Ended) {
        if self.bound == 0 {
            return;
        }
        let mut ended = self.ended.lock();
        let forgotten = if ended.len() >= self.bound {
            ended.pop_front()
        } else {
            None
        };
        ended.push_back(one);
        drop(ended);
        // Freed after the lock.
        drop(forgotten);
    }

    /// Newest first.
    pub fn all(&self) -> Vec<Ended> {
        self.ended.lock().iter().rev().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_of_a_thousand_connections_takes_a_quarter_of_a_mebibyte() {
        assert!(size_of::<Ended>() <= 256, "{} bytes", size_of::<Ended>());
    }
}
