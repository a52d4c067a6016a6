//! How the pods of a node share what the process can hold: each has a part that nobody else can
//! take, and the rest is for who comes first.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::sys::resource::{Resource, getrlimit};
use parking_lot::Mutex;
use thiserror::Error;

/// How many connections of one pod may be live, where the process may hold enough descriptors; at
/// the bound, new ones are reset and counted.
pub const CONNECTIONS_PER_POD: usize = 16_384;

/// A connection has two sockets here: the accepted one and the one to its destination.
const DESCRIPTORS_PER_CONNECTION: u64 = 2;
/// What connections leave of the process's descriptors for everything else: listeners, tunnels,
/// pipes, files.
const DESCRIPTORS_FOR_OTHERS: u64 = 1_024;
/// How many of those may be sockets that wait for their connection, in all pods together.
pub(super) const SPARES: usize = 256;
/// Each pod's own part is this part of all …
const OWN_PART: usize = 128;
/// … but all of them together are no more than this part of all.
const ALL_OWN_PARTS: usize = 2;

/// Descriptors that the process may have; where the kernel does not say, the bound is that of a pod.
pub(super) fn descriptors() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft)
}

/// Why a pod gets no further connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
pub enum Full {
    /// It has [`CONNECTIONS_PER_POD`].
    #[error("the pod has as many connections as a pod may have")]
    Pod,
    /// What is left of the node is other pods' own.
    #[error("the node has room for no more connections of this pod")]
    Node,
    /// The agent's memory is nearly used up.
    #[error("the agent is short of memory")]
    Memory,
}

impl Full {
    /// Every reason, in the order of their declaration.
    pub const ALL: [Self; 3] = [Self::Pod, Self::Node, Self::Memory];

    /// Value of the label `reason`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pod => "pod_full",
            Self::Node => "node_full",
            Self::Memory => "memory",
        }
    }
}

/// What all pods of a node share.
#[derive(Debug)]
pub(super) struct NodeShare {
    /// Connections of all pods together.
    total: usize,
    state: Mutex<State>,
    spares: AtomicUsize,
    is_short_of_memory: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// Connections of each pod.
    pods: BTreeMap<u64, usize>,
    /// Their sum.
    taken: usize,
}

/// A pod's place in it, until this and the last slot are dropped.
#[derive(Debug)]
pub(super) struct PodShare {
    node: Arc<NodeShare>,
    id: u64,
}

/// The place of a socket that waits for its connection, given back when dropped.
#[derive(Debug)]
#[must_use = "dropping it gives the place back"]
pub(super) struct Spare(Arc<PodShare>);

/// A connection's place, given back when dropped.
#[derive(Debug)]
#[must_use = "dropping it gives the place back"]
pub struct Slot(Arc<PodShare>);

impl NodeShare {
    /// Under a limit of so many descriptors.
    pub fn new(descriptors: u64) -> Arc<Self> {
        let left = descriptors.saturating_sub(DESCRIPTORS_FOR_OTHERS) / DESCRIPTORS_PER_CONNECTION;
        // Less than this and the limit is too low for an agent anyway; accept(2) then rests.
        let total = left.max(descriptors / (2 * DESCRIPTORS_PER_CONNECTION));
        Arc::new(Self {
            total: usize::try_from(total).unwrap_or(usize::MAX),
            state: Mutex::default(),
            spares: AtomicUsize::new(0),
            is_short_of_memory: AtomicBool::new(false),
        })
    }

    /// Lets a pod take part.
    pub fn join(self: &Arc<Self>) -> Arc<PodShare> {
        let mut state = self.state.lock();
        let id = state.next;
        state.next += 1;
        state.pods.insert(id, 0);
        Arc::new(PodShare {
            node: self.clone(),
            id,
        })
    }

    /// Says whether memory is short: then nobody gets a slot.
    pub fn set_short_of_memory(&self, is_short: bool) {
        self.is_short_of_memory.store(is_short, Ordering::Relaxed);
    }

    /// What each of so many pods has for itself.
    fn own_part(&self, pods: usize) -> usize {
        let all = self.total / ALL_OWN_PARTS;
        (self.total / OWN_PART).min(all / pods.max(1))
    }
}

impl PodShare {
    /// A place for one more connection: of the pod's own part, or of what is free and is not the
    /// rest of another pod's own part. A pod that is enrolled while others hold what is now its
    /// part gets it as their connections end.
    pub fn take(self: &Arc<Self>) -> Result<Slot, Full> {
        let node = &self.node;
        if node.is_short_of_memory.load(Ordering::Relaxed) {
            return Err(Full::Memory);
        }
        let mut state = node.state.lock();
        let taken = state.pods.get(&self.id).copied().unwrap_or_default();
        if taken >= CONNECTIONS_PER_POD {
            return Err(Full::Pod);
        }
        let own = node.own_part(state.pods.len());
        let free = node.total - state.taken;
        // Looked through only for a pod that has its own part already.
        let others = || {
            let pods = state.pods.iter().filter(|(id, _)| **id != self.id);
            pods.map(|(_, taken)| own.saturating_sub(*taken)).sum()
        };
        if free == 0 || (taken >= own && free <= others()) {
            return Err(Full::Node);
        }
        state.pods.insert(self.id, taken + 1);
        state.taken += 1;
        Ok(Slot(self.clone()))
    }

    /// A place for one more socket that waits for its connection; none if there are [`SPARES`], or
    /// if memory is short.
    pub fn spare(self: &Arc<Self>) -> Option<Spare> {
        let node = &self.node;
        if node.is_short_of_memory.load(Ordering::Relaxed) {
            return None;
        }
        let one_more = |spares| (spares < SPARES).then_some(spares + 1);
        let taken = node
            .spares
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more);
        taken.ok().map(|_| Spare(self.clone()))
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        self.0.node.spares.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for PodShare {
    fn drop(&mut self) {
        self.node.state.lock().pods.remove(&self.id);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = self.0.node.state.lock();
        if let Some(taken) = state.pods.get_mut(&self.0.id) {
            *taken -= 1;
        }
        state.taken -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(pod: &Arc<PodShare>) -> (Vec<Slot>, Full) {
        let mut slots = Vec::new();
        loop {
            match pod.take() {
                Ok(slot) => slots.push(slot),
                Err(full) => return (slots, full),
            }
        }
    }

    #[test]
    fn pods_that_take_all_they_can_leave_every_other_pod_its_own_part() {
        for greedy in 1..4 {
            let node = NodeShare::new(20_000);
            assert_eq!(node.total, 9_488);
            let pods: Vec<_> = (0..10).map(|_| node.join()).collect();
            let own = 9_488 / 128;
            let taken: Vec<_> = pods.iter().take(greedy).map(fill).collect();
            assert!(taken.iter().all(|(_, full)| *full == Full::Node));
            let held: usize = taken.iter().map(|(slots, _)| slots.len()).sum();
            assert_eq!(held, 9_488 - (10 - greedy) * own);
            // The first takes what is common, and each after it its own part.
            assert!(taken[1..].iter().all(|(slots, _)| slots.len() == own));
            for other in &pods[greedy..] {
                assert_eq!(fill(other).0.len(), own);
            }
        }
    }

    #[test]
    fn a_pod_alone_may_take_all_of_the_node_up_to_the_bound_of_a_pod() {
        assert_eq!(fill(&NodeShare::new(20_000).join()).0.len(), 9_488);
        assert_eq!(fill(&NodeShare::new(1_024).join()).0.len(), 256);
        let (slots, full) = fill(&NodeShare::new(1 << 20).join());
        assert_eq!((slots.len(), full), (CONNECTIONS_PER_POD, Full::Pod));
    }

    #[test]
    fn what_ends_is_free_again_for_whom_it_belongs_to() {
        let node = NodeShare::new(20_000);
        let (greedy, other) = (node.join(), node.join());
        let (mut slots, _) = fill(&greedy);
        let own = fill(&other).0;
        assert!(greedy.take().is_err());
        drop(own);
        assert_eq!(greedy.take().unwrap_err(), Full::Node);
        slots.truncate(slots.len() - 5);
        assert_eq!(fill(&greedy).0.len(), 5);
        // A pod that is gone keeps nothing from the others.
        drop(other);
        assert_eq!(fill(&greedy).0.len(), 5 + 9_488 / 128);
        drop((slots, greedy));
        assert_eq!(node.state.lock().taken, 0);
        assert!(node.state.lock().pods.is_empty());
    }

    #[test]
    fn a_late_pod_gets_its_part_as_connections_of_the_others_end() {
        let node = NodeShare::new(20_000);
        let first = node.join();
        let (mut slots, _) = fill(&first);
        assert_eq!(slots.len(), 9_488);
        let late = node.join();
        assert_eq!(late.take().unwrap_err(), Full::Node);
        slots.truncate(slots.len() - 10);
        // They are the late one's.
        assert_eq!(first.take().unwrap_err(), Full::Node);
        assert_eq!(fill(&late).0.len(), 10);
    }

    #[test]
    fn however_many_pods_there_are_half_of_the_node_is_common() {
        let node = NodeShare::new(20_000);
        let pods: Vec<_> = (0..4_096).map(|_| node.join()).collect();
        let (slots, _) = fill(&pods[0]);
        assert!(slots.len() >= 9_488 / 2, "{}", slots.len());
        let (slots, full) = fill(&pods[1]);
        assert_eq!((slots.len(), full), (1, Full::Node));
    }

    #[test]
    fn nobody_gets_a_place_while_memory_is_short() {
        let node = NodeShare::new(20_000);
        let pod = node.join();
        let _slot = pod.take().unwrap();
        node.set_short_of_memory(true);
        assert_eq!(pod.take().unwrap_err(), Full::Memory);
        node.set_short_of_memory(false);
        assert!(pod.take().is_ok());
    }
}
