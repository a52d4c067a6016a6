//! The connections that ended last, for who asks why a moment later.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use super::EndedView;

/// A bounded memory: the oldest is forgotten for the newest.
pub(super) struct History {
    ended: Mutex<VecDeque<Arc<EndedView>>>,
    bound: usize,
}

impl History {
    pub fn new(bound: usize) -> Self {
        Self {
            ended: Mutex::default(),
            bound,
        }
    }

    pub fn remember(&self, view: EndedView) {
        if self.bound == 0 {
            return;
        }
        let view = Arc::new(view);
        let mut ended = self.ended.lock();
        let forgotten = if ended.len() >= self.bound {
            ended.pop_front()
        } else {
            None
        };
        ended.push_back(view);
        drop(ended);
        // Freed after the lock.
        drop(forgotten);
    }

    /// Newest first.
    pub fn all(&self) -> Vec<Arc<EndedView>> {
        self.ended.lock().iter().rev().cloned().collect()
    }
}
