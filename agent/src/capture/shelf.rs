//! Listeners on their way from one agent to its successor, and what must rest meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};
use tokio_util::sync::CancellationToken;

use super::kernel::{Family, ListenerSlot};
use super::sockets::Listener;

/// A pod's listening socket that goes from one agent to another, with all that waits in its queue.
#[derive(Debug)]
pub struct Handed {
    /// Where it belongs.
    pub slot: ListenerSlot,
    /// The socket.
    pub descriptor: OwnedFd,
}

/// While it is held, no pod is enrolled, verified or removed, and no destination changes.
#[derive(Debug)]
pub struct Held(#[allow(dead_code)] OwnedRwLockWriteGuard<()>);

/// What an agent serves, and what it was handed. At most six listeners for each pod.
pub(super) struct Shelf {
    serving: Mutex<BTreeMap<ListenerSlot, Weak<TcpListener>>>,
    handed: Mutex<BTreeMap<ListenerSlot, OwnedFd>>,
    activity: Arc<RwLock<()>>,
    /// Cancelled once no other agent accepts for the pods: until then a probe may come out there.
    alone: CancellationToken,
    /// Cancelled once the loops of all listeners may accept.
    accepting: CancellationToken,
    resumed: AtomicU64,
}

impl Shelf {
    /// Nobody accepted before.
    pub fn first() -> Self {
        let shelf = Self::after(Vec::new());
        shelf.accept();
        shelf.alone.cancel();
        shelf
    }

    /// Another agent accepts at these listeners until [`Shelf::go_alone`], and this one from
    /// [`Shelf::accept`] on.
    pub fn after(handed: Vec<Handed>) -> Self {
        let handed = handed.into_iter().map(|one| (one.slot, one.descriptor));
        Self {
            serving: Mutex::default(),
            handed: Mutex::new(handed.collect()),
            activity: Arc::default(),
            alone: CancellationToken::new(),
            accepting: CancellationToken::new(),
            resumed: AtomicU64::new(0),
        }
    }

    /// Takes what was handed over for a pod. What does not fit is closed.
    pub fn adopt(&self, netns_cookie: u64, families: &[Family]) -> Vec<Listener> {
        let mut all = self.handed.lock();
        let slots: Vec<ListenerSlot> = all
            .keys()
            .filter(|slot| slot.netns_cookie == netns_cookie)
            .copied()
            .collect();
        let mut adopted = Vec::new();
        for slot in slots {
            let Some(descriptor) = all.remove(&slot) else {
                continue;
            };
            if !families.contains(&slot.family) {
                continue;
            }
            match Listener::adopt(descriptor, slot.family, slot.kind, netns_cookie) {
                Ok(listener) => adopted.push(listener),
                Err(error) => {
                    tracing::warn!(?slot, %error, "a listener that was handed over does not fit");
                }
            }
        }
        adopted
    }

    /// Closes what nobody wanted.
    pub fn drop_handed(&self) {
        self.handed.lock().clear();
    }

    /// Notes a listener that this agent accepts at, or will when it may.
    pub fn serve(&self, slot: ListenerSlot, socket: &Arc<TcpListener>) {
        let mut serving = self.serving.lock();
        serving.retain(|_, socket| socket.strong_count() > 0);
        serving.insert(slot, Arc::downgrade(socket));
    }

    /// The slots of the listeners that this agent accepts at, or will when it may.
    pub fn served(&self) -> BTreeSet<ListenerSlot> {
        let serving = self.serving.lock();
        let alive = serving
            .iter()
            .filter(|(_, socket)| socket.strong_count() > 0);
        alive.map(|(slot, _)| *slot).collect()
    }

    /// Copies of all of them.
    pub fn copies(&self) -> io::Result<Vec<Handed>> {
        let serving = self.serving.lock();
        serving
            .iter()
            .filter_map(|(slot, socket)| Some((*slot, socket.upgrade()?)))
            .map(|(slot, socket)| {
                let descriptor = socket.as_fd().try_clone_to_owned()?;
                Ok(Handed { slot, descriptor })
            })
            .collect()
    }

    /// Rests what changes the pods, as soon as what is under way has ended.
    pub async fn hold(&self) -> Held {
        Held(self.activity.clone().write_owned().await)
    }

    /// To be held by what changes the pods.
    pub async fn active(&self) -> OwnedRwLockReadGuard<()> {
        self.activity.clone().read_owned().await
    }

    /// All pods are laid: from now on their connections are accepted.
    pub fn accept(&self) {
        self.accepting.cancel();
    }

    /// Cancelled once connections are accepted. Before, one of a pod that is laid could lead to a
    /// pod that is not yet.
    pub fn accepting(&self) -> CancellationToken {
        self.accepting.clone()
    }

    /// Returns once no other agent accepts for the pods.
    pub async fn alone(&self) {
        self.alone.cancelled().await;
    }

    /// Whether no other agent accepts for the pods.
    pub fn is_alone(&self) -> bool {
        self.alone.is_cancelled()
    }

    /// No other agent accepts for the pods any more.
    pub fn go_alone(&self) {
        self.alone.cancel();
    }

    /// Notes that a successor may have changed what the kernel holds, and did not stay.
    pub fn resume(&self) {
        self.resumed.fetch_add(1, Ordering::Relaxed);
    }

    /// How often that was.
    pub fn resumed(&self) -> u64 {
        self.resumed.load(Ordering::Relaxed)
    }
}
