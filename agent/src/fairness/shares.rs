//! Whose work the tasks are, and what is reckoned for each.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Waker;
use std::time::Duration;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::clock::Clock;
use super::ledger::{Admission, Ledger};
use super::living::Living;
use super::turns::Turns;

/// Shares count as busy at the same time when they take turns within this. So long, because who comes first after it
/// finds all tasks of a flood in the runtime's queue before it.
const CONTENTION: Duration = Duration::from_secs(1);

/// No share has this number.
const NOBODY: u64 = u64::MAX;

/// Who pays for a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Payer {
    /// The pod of this node that the task serves: its netns cookie.
    pub pod: u64,
    /// For whom.
    pub client: Client,
}

/// Whom a pod's task serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Client {
    /// The pod itself: what it sends.
    Itself,
    /// Somebody else, who sends to the pod from this address.
    At(IpAddr),
}

/// The shares of all pods.
#[derive(Debug)]
pub struct Fairness {
    clock: Box<dyn Clock>,
    pods: Living<u64, Pod>,
    next_share: AtomicU64,
    /// Whose task ran last, as long as only one's have run since the last look.
    last: AtomicU64,
    /// Whether tasks of different shares ran since the last look.
    switched: AtomicBool,
    /// Whether shares have to take turns.
    contended: AtomicBool,
    parked: AtomicU64,
}

impl Fairness {
    /// Starts to watch over the shares, until `stop`.
    pub fn start(clock: impl Clock, stop: CancellationToken) -> Arc<Self> {
        let fairness = Arc::new(Self {
            clock: Box::new(clock),
            pods: Living::default(),
            next_share: AtomicU64::new(0),
            last: AtomicU64::new(NOBODY),
            switched: AtomicBool::new(false),
            contended: AtomicBool::new(false),
            parked: AtomicU64::new(0),
        });
        let watched = Arc::downgrade(&fairness);
        tokio::spawn(async move {
            let watch = async {
                loop {
                    tokio::time::sleep(CONTENTION).await;
                    let Some(fairness) = watched.upgrade() else {
                        return;
                    };
                    fairness.look();
                }
            };
            tokio::select! {
                () = watch => {}
                () = stop.cancelled() => {}
            }
        });
        fairness
    }

    /// Makes `task` one that takes its turns. What it [spawns](super::spawn) has the same payer.
    pub fn turns<F>(self: &Arc<Self>, payer: Payer, task: F) -> Turns<F> {
        Turns::of(self.share(payer), task)
    }

    /// How often a task had to wait for its pod's next turn.
    pub fn parked(&self) -> u64 {
        self.parked.load(Ordering::Relaxed)
    }

    /// A share lives as long as a task of it.
    fn share(self: &Arc<Self>, payer: Payer) -> Arc<Share> {
        let pod = self.pods.get_or(payer.pod, || Pod {
            cookie: payer.pod,
            all: self.clone(),
            shares: Living::default(),
            ledger: Mutex::default(),
        });
        pod.shares.get_or(payer.client, || {
            let id = self.next_share.fetch_add(1, Ordering::Relaxed);
            pod.ledger.lock().open(id);
            Share {
                id,
                client: payer.client,
                pod: pod.clone(),
            }
        })
    }

    fn look(&self) {
        self.last.store(NOBODY, Ordering::Relaxed);
        let switched = self.switched.swap(false, Ordering::Relaxed);
        self.contended.store(switched, Ordering::Relaxed);
    }

    /// A task of this share is about to run. Whether shares have to take turns.
    fn enter(&self, share: u64) -> bool {
        // Where shares do take turns, workers do not take this line of memory from each other at each of them.
        if !self.switched.load(Ordering::Relaxed) && self.last.load(Ordering::Relaxed) != share {
            let before = self.last.swap(share, Ordering::Relaxed);
            if before != NOBODY {
                self.switched.store(true, Ordering::Relaxed);
                self.contended.store(true, Ordering::Relaxed);
            }
        }
        self.contended.load(Ordering::Relaxed)
    }
}

/// A pod that has tasks.
#[derive(Debug)]
struct Pod {
    cookie: u64,
    all: Arc<Fairness>,
    shares: Living<Client, Share>,
    ledger: Mutex<Ledger>,
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.all.pods.forget(&self.cookie);
    }
}

/// What a pod does for one of those it serves.
#[derive(Debug)]
pub(super) struct Share {
    id: u64,
    client: Client,
    pod: Arc<Pod>,
}

impl Drop for Share {
    fn drop(&mut self) {
        self.pod.shares.forget(&self.client);
        self.pod.ledger.lock().close(self.id);
    }
}

impl Share {
    /// Whether all of its work has been waiting for too long.
    pub(super) fn is_overdue(&self) -> bool {
        let all = &self.pod.all;
        all.contended.load(Ordering::Relaxed)
            && self.pod.ledger.lock().is_overdue(self.id, all.clock.now())
    }

    /// Whether the task may run now; else it is parked.
    pub(super) fn admit(&self, waker: &Waker) -> Option<Parked> {
        let mut ledger = self.pod.ledger.lock();
        let Admission::Parked(ticket) = ledger.admit(self.id, waker) else {
            return None;
        };
        self.pod.all.parked.fetch_add(1, Ordering::Relaxed);
        self.turn(&mut ledger);
        let since = self.clock().now();
        Some(Parked { ticket, since })
    }

    /// Whether a task that was parked and woken may run now.
    pub(super) fn resume(&self, parked: Parked, waker: &Waker, contended: bool) -> bool {
        let mut ledger = self.pod.ledger.lock();
        if contended && ledger.waits(self.id, parked.ticket, waker) {
            return false;
        }
        ledger.leave(self.id, parked.ticket);
        if contended {
            let now = self.clock().now();
            ledger.waited(self.id, now.saturating_sub(parked.since), now);
        }
        true
    }

    /// A task that was parked never runs again.
    pub(super) fn leave(&self, parked: Parked) {
        self.pod.ledger.lock().leave(self.id, parked.ticket);
    }

    /// A task is about to run. Whether shares have to take turns.
    pub(super) fn enter(&self) -> bool {
        self.pod.all.enter(self.id)
    }

    pub(super) fn clock(&self) -> &dyn Clock {
        &*self.pod.all.clock
    }

    pub(super) fn charge(&self, took: Duration) {
        let mut ledger = self.pod.ledger.lock();
        ledger.charge(self.id, took);
        self.turn(&mut ledger);
    }

    /// Sets the turnstile in motion, if it is time.
    fn turn(&self, ledger: &mut Ledger) {
        if ledger.turns() {
            tokio::spawn(rounds(self.pod.clone()));
        }
    }
}

/// Gives the pod a quantum in every round, for as long as it has use for it.
async fn rounds(pod: Arc<Pod>) {
    loop {
        // Behind everything of the others that is ready now, sockets included.
        tokio::task::yield_now().await;
        let Some(released) = pod.ledger.lock().round() else {
            return;
        };
        released.into_iter().for_each(Waker::wake);
    }
}

/// A task that waits for its pod's next quantum.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parked {
    ticket: u64,
    since: Duration,
}

#[cfg(test)]
#[path = "shares_tests.rs"]
mod tests;
