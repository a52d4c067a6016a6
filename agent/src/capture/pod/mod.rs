//! A pod that is in the mesh, as the proxy sees it: whose connections they are, and how many there
//! may be.

use std::fmt;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::accept::Role;
use super::backlog::{Backlog, Backlogs};
use super::counters::{Counters, Event};
use super::kernel::Kernel;
use super::netns::{Netns, NetnsWorker};
use super::ports::SourcePorts;
use super::share::{Full, PodShare, Slot};
use super::sockets::PodAddresses;
use super::stock::Stock;
use crate::mesh::Workload;
use crate::relay::{Counts, Relayed};
use crate::telemetry::ByteCount;

mod dial;

pub use dial::{Dial, DialError};

/// A pod that is in the mesh.
pub struct EnrolledPod {
    workload: ArcSwap<Workload>,
    cookie: u64,
    addresses: PodAddresses,
    /// Taken away when the pod is gone: what is open keeps the namespace alive.
    netns: ArcSwapOption<Netns>,
    kernel: Arc<Kernel>,
    worker: NetnsWorker,
    stock: Arc<Stock>,
    ports: SourcePorts,
    live: TaskTracker,
    share: Arc<PodShare>,
    refused: [AtomicU64; Full::ALL.len()],
    backlogs: Backlogs,
    leaving: CancellationToken,
    gone: CancellationToken,
    cut: CancellationToken,
    counters: Arc<Counters>,
    captured: AtomicU64,
}

/// Counts as one live connection of its pod until dropped.
#[derive(Debug)]
pub struct Tracked(#[allow(dead_code)] TaskTrackerToken);

/// A connection of a pod's, which ends when the pod is gone.
pub struct OfPod {
    /// Whose it is.
    pub pod: Arc<EnrolledPod>,
    /// Where its bytes are counted.
    pub bytes: Arc<ByteCount>,
}

impl Relayed for OfPod {
    fn counts(&self) -> Counts<'_> {
        (&*self.bytes).into()
    }

    fn stop(&self) -> &CancellationToken {
        self.pod.gone()
    }
}

impl fmt::Debug for EnrolledPod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EnrolledPod")
            .field("name", &self.workload.load().name)
            .field("netns_cookie", &self.cookie)
            .field("live", &self.live.len())
            .finish_non_exhaustive()
    }
}

/// What a pod is made of.
pub(super) struct PodParts {
    pub workload: Arc<Workload>,
    pub addresses: PodAddresses,
    pub netns: Arc<Netns>,
    pub kernel: Arc<Kernel>,
    pub worker: NetnsWorker,
    pub share: Arc<PodShare>,
    pub ports: SourcePorts,
    pub counters: Arc<Counters>,
}

impl EnrolledPod {
    /// The pod as the model knows it now.
    #[must_use]
    pub fn workload(&self) -> Arc<Workload> {
        self.workload.load_full()
    }

    /// Cookie of its network namespace.
    #[must_use]
    pub fn netns_cookie(&self) -> u64 {
        self.cookie
    }

    /// Its addresses that are enrolled.
    #[must_use]
    pub fn addresses(&self) -> PodAddresses {
        self.addresses
    }

    /// Cancelled when the pod begins to leave the mesh: connections may end as they like, and those
    /// that would never do so shall.
    #[must_use]
    pub fn leaving(&self) -> &CancellationToken {
        &self.leaving
    }

    /// Cancelled when the pod's connections must end now, with RST.
    #[must_use]
    pub fn gone(&self) -> &CancellationToken {
        &self.gone
    }

    /// Counts a live connection, which a drain waits for.
    #[must_use]
    pub fn track(&self) -> Tracked {
        Tracked(self.live.token())
    }

    /// As [`EnrolledPod::track`], for a connection that came inside a tunnel: not if there is no
    /// room for it.
    pub fn admit(&self) -> Result<(Tracked, Slot), Full> {
        Ok((self.track(), self.slot()?))
    }

    /// A place for one more connection; that there is none is counted.
    pub fn slot(&self) -> Result<Slot, Full> {
        self.share.take().inspect_err(|full| {
            self.refused[*full as usize].fetch_add(1, Ordering::Relaxed);
            self.counters.count(match full {
                Full::Pod => Event::PodFull,
                Full::Node => Event::NodeFull,
                Full::Memory => Event::MemoryShort,
            });
        })
    }

    /// How many connections found no place, for each reason.
    #[must_use]
    pub fn refused(&self) -> [(Full, u64); Full::ALL.len()] {
        Full::ALL.map(|full| (full, self.refused[full as usize].load(Ordering::Relaxed)))
    }

    /// The queues of its listeners.
    #[must_use]
    pub fn backlogs(&self) -> Vec<Backlog> {
        self.backlogs.read()
    }

    /// How many connections are live.
    #[must_use]
    pub fn live(&self) -> usize {
        self.live.len()
    }
}

/// For the rest of capture.
impl EnrolledPod {
    pub(super) fn new(parts: PodParts) -> Self {
        Self {
            cookie: parts.netns.cookie(),
            workload: ArcSwap::new(parts.workload),
            addresses: parts.addresses,
            netns: ArcSwapOption::new(Some(parts.netns)),
            kernel: parts.kernel,
            worker: parts.worker,
            ports: parts.ports,
            live: TaskTracker::new(),
            stock: Stock::new(parts.share.clone(), parts.counters.clone()),
            share: parts.share,
            refused: Default::default(),
            backlogs: Backlogs::default(),
            gone: CancellationToken::new(),
            leaving: CancellationToken::new(),
            cut: CancellationToken::new(),
            counters: parts.counters,
            captured: AtomicU64::new(0),
        }
    }

    pub(super) fn set_workload(&self, workload: Arc<Workload>) {
        self.workload.store(workload);
    }

    /// Notes that a connection of the pod's programs came out.
    pub(super) fn captured(&self) {
        self.captured.fetch_add(1, Ordering::Relaxed);
    }

    /// How many did.
    pub(super) fn captured_count(&self) -> u64 {
        self.captured.load(Ordering::Relaxed)
    }

    pub(super) fn ports(&self) -> &SourcePorts {
        &self.ports
    }

    /// Has a listener of the pod's in [`EnrolledPod::backlogs`], as long as it is open.
    pub(super) fn watch_backlog(&self, role: Role, listener: &Arc<TcpListener>) {
        self.backlogs.watch(role, listener);
    }

    /// Cancelled when whatever still handles a connection of the pod is dropped.
    pub(super) fn cut(&self) -> &CancellationToken {
        &self.cut
    }

    /// Returns once no connection is live.
    pub(super) async fn idle(&self) {
        self.live.close();
        self.live.wait().await;
    }

    /// Closes sockets that nobody needs. To be called now and then.
    pub(super) fn tend(&self) {
        self.stock.tend();
    }

    /// Lets go of the namespace.
    pub(super) fn release(&self) {
        self.gone.cancel();
        self.cut.cancel();
        self.netns.store(None);
        self.stock.close();
    }
}
