//! What the rest of the agent is told: transitions of breakers and ejections, with their causes.

use std::collections::VecDeque;
use std::fmt;

use serde::Serialize;

use super::breaker;
use super::ejection;
use super::sync::{AtomicU64, Mutex, Ordering};

/// Something that an operator wants to know of.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum Event {
    /// A breaker moved.
    Breaker(breaker::Transition),
    /// An endpoint was ejected or came back.
    Ejection(ejection::Movement),
}

/// Where events go. Called outside of every lock but a breaker's own; must not block.
pub trait EventSink: Send + Sync + fmt::Debug {
    /// Takes one event.
    fn event(&self, event: Event);
}

/// Keeps the newest events; the oldest make room, and are counted.
#[derive(Debug)]
pub struct EventLog {
    capacity: usize,
    events: Mutex<VecDeque<Event>>,
    forgotten: AtomicU64,
}

impl EventLog {
    /// A log of at most `capacity` events.
    pub fn new(capacity: usize) -> Self {
        Self {
            capacity,
            events: Mutex::new(VecDeque::new()),
            forgotten: AtomicU64::new(0),
        }
    }

    /// Takes out what was kept, oldest first.
    pub fn drain(&self) -> Vec<Event> {
        std::mem::take(&mut *self.events.lock()).into()
    }

    /// How many events had to make room.
    pub fn forgotten(&self) -> u64 {
        self.forgotten.load(Ordering::Relaxed)
    }
}

impl EventSink for EventLog {
    fn event(&self, event: Event) {
        let mut events = self.events.lock();
        if events.len() >= self.capacity {
            events.pop_front();
            self.forgotten.fetch_add(1, Ordering::Relaxed);
        }
        if self.capacity > 0 {
            events.push_back(event);
        }
    }
}

/// Where events go that nobody asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoSink;

impl EventSink for NoSink {
    fn event(&self, _: Event) {}
}
