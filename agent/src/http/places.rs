//! How many connections a destination may have, and who waits for one.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use thiserror::Error;
use tokio::sync::oneshot;

use super::client::Lease;
use super::upstreams::Upstreams;

/// The upstream connections of a node to one destination, for requests and opaque ones: at most so
/// many, of all pods and to all endpoints. Who needs one more waits in a line, first come, first
/// served; beyond its length it is shed. Nothing is kept idle while somebody waits: what falls free is
/// handed to the first in the line if that can use it, and else closed to make room.
#[derive(Debug)]
pub struct Places {
    line: Mutex<Line>,
    in_vain: AtomicU64,
    refused: AtomicU64,
}

/// What there is of the connections of a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlaceCounts {
    /// Connections now.
    pub taken: u32,
    /// Who waits for one now.
    pub waiting: usize,
    /// Those that got none: they gave up waiting, or nobody may wait.
    pub in_vain: u64,
    /// Those that could not even wait, since as many as may did.
    pub refused: u64,
}

/// No connection for who asked: the mesh sheds it, which is nobody's failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Crowded {
    /// Every connection is in use, and nobody may wait.
    #[error("as many connections as allowed are in use")]
    Connections,
    /// As many wait as may.
    #[error("as many as allowed wait for a connection")]
    Pending,
}

#[derive(Debug)]
struct Line {
    most: u32,
    pending: u32,
    taken: u32,
    waiting: VecDeque<Waiter>,
    /// Whose the connections for requests are, and how many.
    homes: HashMap<usize, (Weak<Upstreams>, u32)>,
}

#[derive(Debug)]
struct Waiter {
    /// Whose connections it can use; nobody's, if it is opaque.
    home: Weak<Upstreams>,
    turn: oneshot::Sender<Grant>,
}

/// What one gets that waited.
#[derive(Debug)]
pub(super) enum Grant {
    /// A connection that another has left.
    Lease(Lease),
    /// Leave to make one.
    Place(Place),
}

/// How one enters.
pub(super) enum Entry {
    Place(Place),
    Wait(Turn),
}

/// A stand in the line. Dropped before its end, it is given up.
pub(super) struct Turn {
    places: Arc<Places>,
    granted: oneshot::Receiver<Grant>,
    has_come: bool,
}

/// Leave for one connection, given back when dropped.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    /// Whose it is; none: an opaque connection's.
    home: Option<usize>,
}

impl Places {
    /// For so many connections, and who waits for one.
    #[must_use]
    pub fn new(most: u32, pending: u32) -> Arc<Self> {
        Arc::new(Self {
            line: Mutex::new(Line {
                most,
                pending,
                taken: 0,
                waiting: VecDeque::new(),
                homes: HashMap::new(),
            }),
            in_vain: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        })
    }

    /// Other bounds from now on. Connections, and who waits, above them stay.
    pub fn set(self: &Arc<Self>, most: u32, pending: u32) {
        {
            let mut line = self.line.lock();
            line.most = most;
            line.pending = pending;
        }
        self.admit_next();
    }

    /// What there is now, and since the start.
    #[must_use]
    pub fn counts(&self) -> PlaceCounts {
        let line = self.line.lock();
        let waiting = line.waiting.iter();
        PlaceCounts {
            taken: line.taken,
            waiting: waiting.filter(|one| !one.turn.is_closed()).count(),
            in_vain: self.in_vain.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
        }
    }

    /// Leave for a connection that nobody else can use, for as long as the place is kept: waits in the
    /// line for as long as it takes. Safe to cancel.
    ///
    /// # Errors
    /// [`Crowded`] if it may not even wait.
    pub async fn take(self: &Arc<Self>) -> Result<Place, Crowded> {
        match self.enter(Weak::new())? {
            Entry::Place(place) => Ok(place),
            Entry::Wait(turn) => match turn.come().await? {
                Grant::Place(place) => Ok(place),
                // Leases are offered to whom they are of use alone.
                Grant::Lease(_) => Err(Crowded::Connections),
            },
        }
    }

    /// Takes a place, or a stand in the line. `home` is whose connections are of use to it.
    pub(super) fn enter(self: &Arc<Self>, home: Weak<Upstreams>) -> Result<Entry, Crowded> {
        let entry = self.stand(home);
        match &entry {
            Ok(Entry::Place(_)) => {}
            // What idles is of no use while somebody waits.
            Ok(Entry::Wait(_)) => self.free_idle(),
            Err(Crowded::Connections) => count(&self.in_vain),
            Err(Crowded::Pending) => count(&self.refused),
        }
        entry
    }

    fn stand(self: &Arc<Self>, home: Weak<Upstreams>) -> Result<Entry, Crowded> {
        let mut line = self.line.lock();
        if line.taken < line.most {
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
        line.waiting.push_back(Waiter { home, turn });
        Ok(Entry::Wait(Turn {
            places: self.clone(),
            granted,
            has_come: false,
        }))
    }

    /// Whether anybody waits.
    pub(super) fn has_line(&self) -> bool {
        self.line.lock().has_line()
    }

    /// Closes an idle connection, or hands it on, for one who has begun to wait.
    fn free_idle(self: &Arc<Self>) {
        let homes: Vec<_> = {
            let line = self.line.lock();
            line.homes.values().map(|(home, _)| home.clone()).collect()
        };
        let mut homes = homes.iter().filter_map(Weak::upgrade);
        let _ = homes.any(|home| home.pass_on(self));
    }

    /// Hands a connection to the first in the line, if that is of its home. Gives it back if not.
    pub(super) fn offer_first(&self, home: &Arc<Upstreams>, mut lease: Lease) -> Result<(), Lease> {
        loop {
            let first = {
                let mut line = self.line.lock();
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
            let mut line = self.line.lock();
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
                let mut line = self.line.lock();
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
        let home = (of.strong_count() > 0).then_some(of.as_ptr() as usize);
        if let Some(home) = home {
            let entry = self.homes.entry(home);
            entry.or_insert_with(|| (of.clone(), 0)).1 += 1;
        }
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

impl Turn {
    /// What its wait came to.
    pub(super) async fn come(mut self) -> Result<Grant, Crowded> {
        let grant = (&mut self.granted).await;
        self.has_come = grant.is_ok();
        grant.map_err(|_| Crowded::Connections)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if !self.has_come {
            count(&self.places.in_vain);
        }
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
            let mut line = self.places.line.lock();
            line.taken -= 1;
            if let Some(home) = self.home
                && let Some((_, count)) = line.homes.get_mut(&home)
            {
                *count -= 1;
                if *count == 0 {
                    line.homes.remove(&home);
                }
            }
        }
        self.places.admit_next();
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
