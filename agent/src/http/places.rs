//! How many connections a destination may have, and who waits for one.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use thiserror::Error;
use tokio::sync::oneshot;

use super::client::Lease;
use super::upstreams::Upstreams;

/// The upstream connections of a node to one destination: at most so many, of all pods and to all
/// endpoints. Requests that need one more wait in a line, first come, first served; beyond its length
/// they are shed. Nothing is kept idle while somebody waits: what falls free is handed to the first
/// in the line if that can use it, and else closed to make room.
#[derive(Debug)]
pub struct Places(Mutex<Line>);

/// No connection for this request: the mesh sheds it, which is nobody's failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Crowded {
    /// Every connection is in use, and nobody may wait.
    #[error("as many connections as allowed are in use")]
    Connections,
    /// As many requests wait as may.
    #[error("as many requests as allowed wait for a connection")]
    Pending,
}

#[derive(Debug)]
struct Line {
    most: u32,
    pending: u32,
    taken: u32,
    waiting: VecDeque<Waiter>,
    /// Whose the connections are, and how many.
    homes: HashMap<usize, (Weak<Upstreams>, u32)>,
}

#[derive(Debug)]
struct Waiter {
    home: Weak<Upstreams>,
    turn: oneshot::Sender<Grant>,
}

/// What a request gets that waited.
#[derive(Debug)]
pub(super) enum Grant {
    /// A connection that another has left.
    Lease(Lease),
    /// Leave to make one.
    Place(Place),
}

/// How a request enters.
pub(super) enum Entry {
    Place(Place),
    Wait(oneshot::Receiver<Grant>),
}

/// Leave for one connection, given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    home: usize,
}

impl Places {
    /// For so many connections, and requests that wait for one.
    #[must_use]
    pub fn new(most: u32, pending: u32) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Line {
            most,
            pending,
            taken: 0,
            waiting: VecDeque::new(),
            homes: HashMap::new(),
        })))
    }

    /// Other bounds from now on. Connections and requests above them stay.
    pub fn set(self: &Arc<Self>, most: u32, pending: u32) {
        {
            let mut line = self.0.lock();
            line.most = most;
            line.pending = pending;
        }
        self.admit_next();
    }

    /// Connections now.
    #[must_use]
    pub fn taken(&self) -> u32 {
        self.0.lock().taken
    }

    /// Requests that wait now.
    #[must_use]
    pub fn waiting(&self) -> usize {
        let line = self.0.lock();
        let waiting = line.waiting.iter();
        waiting.filter(|one| !one.turn.is_closed()).count()
    }

    pub(super) fn enter(self: &Arc<Self>, home: &Arc<Upstreams>) -> Result<Entry, Crowded> {
        let mut line = self.0.lock();
        if line.taken < line.most {
            let home = Arc::downgrade(home);
            return Ok(Entry::Place(line.take(self, &home)));
        }
        if line.waiting.len() >= line.pending as usize {
            line.waiting.retain(|one| !one.turn.is_closed());
        }
        if line.pending == 0 {
            return Err(Crowded::Connections);
        }
        if line.waiting.len() >= line.pending as usize {
            return Err(Crowded::Pending);
        }
        let (turn, granted) = oneshot::channel();
        let home = Arc::downgrade(home);
        line.waiting.push_back(Waiter { home, turn });
        Ok(Entry::Wait(granted))
    }

    /// Whether anybody waits.
    pub(super) fn has_line(&self) -> bool {
        self.0.lock().has_line()
    }

    /// Closes an idle connection, or hands it on, for one who has begun to wait.
    pub(super) fn free_idle(self: &Arc<Self>) {
        let homes: Vec<_> = {
            let line = self.0.lock();
            line.homes.values().map(|(home, _)| home.clone()).collect()
        };
        let mut homes = homes.iter().filter_map(Weak::upgrade);
        let _ = homes.any(|home| home.pass_on(self));
    }

    /// Hands a connection to the first in the line, if that is of its home. Gives it back if not.
    pub(super) fn offer_first(&self, home: &Arc<Upstreams>, mut lease: Lease) -> Result<(), Lease> {
        loop {
            let first = {
                let mut line = self.0.lock();
                let is_for_it = line.has_line()
                    && (line.waiting.front()).is_some_and(|first| first.is_of(home));
                match is_for_it {
                    true => line.waiting.pop_front(),
                    false => None,
                }
            };
            let Some(first) = first else {
                return Err(lease);
            };
            match first.turn.send(Grant::Lease(lease)) {
                Ok(()) => return Ok(()),
                Err(Grant::Lease(back)) => lease = back,
                // What was sent is what comes back.
                Err(Grant::Place(_)) => return Ok(()),
            }
        }
    }

    /// Gives a stream to the first of this home who waits. False if none does, or no stream is left.
    pub(super) fn offer_stream(
        &self,
        home: &Arc<Upstreams>,
        stream: impl FnOnce() -> Option<Lease>,
    ) -> bool {
        let (waiter, lease) = {
            let mut line = self.0.lock();
            let at = line.waiting.iter().position(|one| one.is_of(home));
            let Some(at) = at else {
                return false;
            };
            let Some(lease) = stream() else {
                return false;
            };
            (line.waiting.remove(at), lease)
        };
        if let Some(waiter) = waiter {
            // One who has just given up gives the stream back.
            drop(waiter.turn.send(Grant::Lease(lease)));
        }
        true
    }

    fn admit_next(self: &Arc<Self>) {
        loop {
            let (waiter, place) = {
                let mut line = self.0.lock();
                if line.taken >= line.most || !line.has_line() {
                    return;
                }
                let Some(waiter) = line.waiting.pop_front() else {
                    return;
                };
                let place = line.take(self, &waiter.home);
                (waiter, place)
            };
            // One who has just given up gives the place back.
            drop(waiter.turn.send(Grant::Place(place)));
        }
    }
}

impl Line {
    fn has_line(&mut self) -> bool {
        while self.waiting.front().is_some_and(|one| one.turn.is_closed()) {
            self.waiting.pop_front();
        }
        !self.waiting.is_empty()
    }

    fn take(&mut self, places: &Arc<Places>, of: &Weak<Upstreams>) -> Place {
        self.taken += 1;
        let home = of.as_ptr() as usize;
        let entry = self.homes.entry(home);
        entry.or_insert_with(|| (of.clone(), 0)).1 += 1;
        Place {
            places: places.clone(),
            home,
        }
    }
}

impl Waiter {
    fn is_of(&self, home: &Arc<Upstreams>) -> bool {
        self.home.as_ptr() == Arc::as_ptr(home) && !self.turn.is_closed()
    }
}

impl Place {
    /// Whose it is.
    pub(super) fn places(&self) -> &Arc<Places> {
        &self.places
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        {
            let mut line = self.places.0.lock();
            line.taken -= 1;
            if let Some((_, count)) = line.homes.get_mut(&self.home) {
                *count -= 1;
                if *count == 0 {
                    line.homes.remove(&self.home);
                }
            }
        }
        self.places.admit_next();
    }
}
