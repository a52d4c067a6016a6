//! The pods that capture deals with, and which of them holds which network namespace.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use super::pod::EnrolledPod;
use super::status::PodStatus;
use super::task::Desired;
use crate::mesh::{Workload, WorkloadUid};

/// What the rest of the agent sees of one pod.
pub(super) struct PodSlot {
    pub uid: WorkloadUid,
    pub status: Mutex<PodStatus>,
    pub enrolled: ArcSwapOption<EnrolledPod>,
    /// The same on its way out: its connections may still be live.
    pub leaving: ArcSwapOption<EnrolledPod>,
}

struct Entry {
    slot: Arc<PodSlot>,
    desired: watch::Sender<Desired>,
}

/// All pods. At most those that the model names for this node and those that are leaving.
pub(super) struct Registry {
    pods: Mutex<BTreeMap<WorkloadUid, Entry>>,
    claims: Mutex<HashMap<u64, WorkloadUid>>,
    /// Pods of the first snapshot that were not tried yet; none before the first snapshot.
    untried: Mutex<Option<BTreeSet<WorkloadUid>>>,
    /// The same, of those that were neither laid nor tried.
    unlaid: Mutex<Option<BTreeSet<WorkloadUid>>>,
    drain: ArcSwap<Duration>,
    /// Whether what a former agent left is kept, although no pod of the model claims it.
    keeps_leftovers: AtomicBool,
    /// Told when a pod has left.
    left: Notify,
    /// Told when a pod was laid or tried.
    laid: Notify,
}

/// A namespace belongs to one pod until this is dropped.
pub(super) struct Claim {
    cookie: u64,
    registry: Arc<Registry>,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.registry.claims.lock().remove(&self.cookie);
    }
}

impl Registry {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            pods: Mutex::default(),
            claims: Mutex::default(),
            untried: Mutex::default(),
            unlaid: Mutex::default(),
            drain: ArcSwap::from_pointee(Duration::ZERO),
            keeps_leftovers: AtomicBool::new(false),
            left: Notify::new(),
            laid: Notify::new(),
        })
    }

    /// How long connections of a pod that leaves may take to end.
    pub fn drain_timeout(&self) -> Duration {
        **self.drain.load()
    }

    /// Says what is wanted now: these pods and no others. Returns the pods that are new, for
    /// which the caller starts tasks.
    pub fn want(
        &self,
        wanted: &BTreeMap<WorkloadUid, (Arc<Workload>, Desired)>,
        drain: Duration,
    ) -> Vec<(Arc<PodSlot>, watch::Receiver<Desired>)> {
        self.drain.store(Arc::new(drain));
        let mut pods = self.pods.lock();
        self.untried
            .lock()
            .get_or_insert_with(|| wanted.keys().cloned().collect());
        self.unlaid
            .lock()
            .get_or_insert_with(|| wanted.keys().cloned().collect());
        self.laid.notify_waiters();
        for (uid, entry) in pods.iter() {
            if !wanted.contains_key(uid) {
                set(&entry.desired, Desired::Left(drain));
            }
        }
        let mut new = Vec::new();
        for (uid, (workload, desired)) in wanted {
            if let Some(entry) = pods.get(uid) {
                set(&entry.desired, desired.clone());
                continue;
            }
            let slot = Arc::new(PodSlot {
                uid: uid.clone(),
                status: Mutex::new(PodStatus::pending(workload)),
                enrolled: ArcSwapOption::empty(),
                leaving: ArcSwapOption::empty(),
            });
            let (sender, receiver) = watch::channel(desired.clone());
            pods.insert(
                uid.clone(),
                Entry {
                    slot: slot.clone(),
                    desired: sender,
                },
            );
            new.push((slot, receiver));
        }
        new
    }

    /// Says whether what a former agent left is kept.
    pub fn keep_leftovers(&self, keep: bool) {
        self.keeps_leftovers.store(keep, Ordering::Relaxed);
    }

    /// Whether it is.
    pub fn keeps_leftovers(&self) -> bool {
        self.keeps_leftovers.load(Ordering::Relaxed)
    }

    /// Every pod shall leave.
    pub fn want_none(&self, drain: Duration) {
        let _ = self.want(&BTreeMap::new(), drain);
    }

    /// Forgets a pod that has left, unless it is wanted again. Returns whether it was forgotten.
    pub fn left(&self, slot: &PodSlot) -> bool {
        let mut pods = self.pods.lock();
        let is_unwanted = pods
            .get(&slot.uid)
            .is_none_or(|entry| matches!(*entry.desired.borrow(), Desired::Left(_)));
        if is_unwanted {
            pods.remove(&slot.uid);
            drop(pods);
            self.tried(&slot.uid);
            self.left.notify_waiters();
        }
        is_unwanted
    }

    /// Returns once no pod is left.
    pub async fn emptied(&self) {
        loop {
            let told = self.left.notified();
            if self.pods.lock().is_empty() {
                return;
            }
            told.await;
        }
    }

    /// Notes that a pod was tried once.
    pub fn tried(&self, uid: &WorkloadUid) {
        if let Some(untried) = self.untried.lock().as_mut() {
            untried.remove(uid);
        }
        self.laid(uid);
    }

    /// Notes that connections of a pod are accepted.
    pub fn laid(&self, uid: &WorkloadUid) {
        if let Some(unlaid) = self.unlaid.lock().as_mut() {
            unlaid.remove(uid);
        }
        self.laid.notify_waiters();
    }

    /// Returns once every pod of the first snapshot was laid or tried.
    pub async fn all_laid(&self) {
        loop {
            let mut told = pin!(self.laid.notified());
            // From here on no notification is missed.
            told.as_mut().enable();
            if self.unlaid.lock().as_ref().is_some_and(BTreeSet::is_empty) {
                return;
            }
            told.await;
        }
    }

    /// Whether every pod of the first snapshot was tried once.
    pub fn synced(&self) -> bool {
        self.untried.lock().as_ref().is_some_and(BTreeSet::is_empty)
    }

    /// The pod, if it is in the mesh.
    pub fn enrolled(&self, uid: &WorkloadUid) -> Option<Arc<EnrolledPod>> {
        self.pods.lock().get(uid)?.slot.enrolled.load_full()
    }

    /// The pods that are in the mesh.
    pub fn all_enrolled(&self) -> Vec<Arc<EnrolledPod>> {
        let pods = self.pods.lock();
        let enrolled = |entry: &Entry| entry.slot.enrolled.load_full();
        pods.values().filter_map(enrolled).collect()
    }

    /// How far each pod is.
    pub fn statuses(&self) -> Vec<PodStatus> {
        let slots: Vec<_> = self
            .pods
            .lock()
            .values()
            .map(|entry| entry.slot.clone())
            .collect();
        slots
            .iter()
            .map(|slot| {
                let mut status = slot.status.lock().clone();
                let pod = slot
                    .enrolled
                    .load_full()
                    .or_else(|| slot.leaving.load_full());
                if let Some(pod) = pod {
                    status.observe(&pod);
                }
                status
            })
            .collect()
    }

    /// Claims a namespace for a pod. Fails with the pod that holds it.
    pub fn claim(self: &Arc<Self>, cookie: u64, uid: &WorkloadUid) -> Result<Claim, WorkloadUid> {
        let mut claims = self.claims.lock();
        if let Some(holder) = claims.get(&cookie) {
            return Err(holder.clone());
        }
        claims.insert(cookie, uid.clone());
        Ok(Claim {
            cookie,
            registry: self.clone(),
        })
    }

    /// Whether some pod holds the namespace.
    pub fn is_claimed(&self, cookie: u64) -> bool {
        self.claims.lock().contains_key(&cookie)
    }
}

/// A change wakes the pod's task; the same again does not.
fn set(sender: &watch::Sender<Desired>, desired: Desired) {
    sender.send_if_modified(|now| {
        let is_change = *now != desired;
        if is_change {
            *now = desired;
        }
        is_change
    });
}
