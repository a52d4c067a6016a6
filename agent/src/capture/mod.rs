//! The kernel side of a node: load, attach, pin, enrol pods, admit tuples.
//!
//! A pod's connections to the mesh come out at listeners of this process inside the pod's network
//! namespace; [`Capture`] keeps that so for every pod that the model wants in the mesh, and hands
//! the connections to a [`Handler`].

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::mesh::{Snapshot, WorkloadUid};
use crate::workers::Workers;

mod accept;
mod addresses;
mod backlog;
mod backoff;
mod counters;
mod enrol;
mod forwarding;
pub mod kernel;
mod memory;
pub mod metrics;
mod native;
mod netns;
mod network;
mod pod;
mod ports;
mod probe;
mod probers;
mod reconcile;
mod registry;
mod share;
mod shelf;
mod sockets;
mod status;
mod stock;
mod sys;
mod sysctl;
mod task;
#[cfg(test)]
mod tests;

pub use accept::{Accepted, Handler, Role, Setup, Task, in_parts};
pub use backlog::Backlog;
pub use enrol::EnrolError;
pub use forwarding::Forwards;
pub use kernel::{HBONE_PORT, Kernel, KernelError, KernelOptions};
pub use memory::{MemoryStatus, MemoryUse};
pub use native::{NativeSample, NativeView};
pub use netns::NetnsError;
pub use pod::{Dial, DialError, EnrolledPod, OfPod, Tracked};
pub use probe::Proof;
pub use share::{CONNECTIONS_PER_POD, Full, Slot};
pub use shelf::{Handed, Held};
pub use sockets::{AdoptError, Listener, PodAddresses};
pub use status::{Guarantee, Moment, Phase, PodStatus, Proven};
pub use sys::forget_code;

use counters::Counters;
use enrol::{Tools, on_kernel};
use netns::NetnsWorker;
use probers::Probers;
use reconcile::Reconciler;
use registry::Registry;
use share::NodeShare;
use shelf::Shelf;

/// How long the tasks of pods may take to close their listeners.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(5);

/// What capture needs to know.
#[derive(Debug, Clone)]
pub struct CaptureOptions {
    /// Name of this node: its pods are enrolled.
    pub node: String,
    /// Where programs are attached and pinned.
    pub kernel: KernelOptions,
    /// Directories of cgroups that may probe the pods, also of such as are not there yet; at most
    /// 64. They take the place of those that a former agent had, at a take-over once that accepts
    /// no more.
    pub probe_cgroups: Vec<PathBuf>,
}

/// Why capture could not be started or taken away.
#[derive(Debug, Error)]
pub enum CaptureError {
    /// Programs and maps.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The threads that enter network namespaces.
    #[error(transparent)]
    Netns(#[from] NetnsError),
}

/// The kernel side of a node.
pub struct Capture {
    node: String,
    tools: Arc<Tools>,
    registry: Arc<Registry>,
    wanted: watch::Sender<Option<Arc<Snapshot>>>,
    target_error: Arc<Mutex<Option<String>>>,
    tasks: TaskTracker,
    stop: CancellationToken,
    stop_pods: CancellationToken,
    last: ArcSwapOption<Snapshot>,
    memory: Arc<Mutex<MemoryStatus>>,
    shortage: watch::Sender<bool>,
}

impl Capture {
    /// Loads or adopts what the kernel holds and follows [`Capture::apply`] from then on. To be called on a tokio
    /// runtime; the pods' connections are served by `workers`.
    pub fn start(
        options: CaptureOptions,
        handler: Arc<dyn Handler>,
        workers: Arc<Workers>,
    ) -> Result<Arc<Self>, CaptureError> {
        let kernel = Kernel::load(&options.kernel)?;
        let shelf = match kernel.is_staged() {
            true => Shelf::after(Vec::new()),
            false => Shelf::first(),
        };
        Self::start_with(options, handler, workers, kernel, shelf)
    }

    /// The same beside an agent that still accepts at these listeners, and rests otherwise. Pods
    /// are laid as ever, but their connections are left to the other agent until
    /// [`Capture::accept`], and they are not probed before [`Capture::go_alone`].
    pub fn start_beside(
        options: CaptureOptions,
        handler: Arc<dyn Handler>,
        workers: Arc<Workers>,
        handed: Vec<Handed>,
    ) -> Result<Arc<Self>, CaptureError> {
        let kernel = Kernel::load_beside(&options.kernel)?;
        Self::start_with(options, handler, workers, kernel, Shelf::after(handed))
    }

    fn start_with(
        options: CaptureOptions,
        handler: Arc<dyn Handler>,
        workers: Arc<Workers>,
        kernel: Kernel,
        shelf: Shelf,
    ) -> Result<Arc<Self>, CaptureError> {
        let tools = Arc::new(Tools {
            kernel: Arc::new(kernel),
            shelf,
            cgroup: options.kernel.cgroup,
            worker: NetnsWorker::start("netns-enrol")?,
            sockets: NetnsWorker::start("netns-sockets")?,
            handler,
            workers,
            share: NodeShare::new(share::descriptors()),
            counters: Arc::new(Counters::default()),
        });
        let (wanted, snapshots) = watch::channel(None);
        let capture = Arc::new(Self {
            node: options.node.clone(),
            tools: tools.clone(),
            registry: Registry::new(),
            wanted,
            target_error: Arc::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            stop_pods: CancellationToken::new(),
            last: ArcSwapOption::empty(),
            memory: Arc::default(),
            shortage: watch::Sender::new(false),
        });
        let reconciler = Reconciler {
            node: options.node,
            tools,
            registry: capture.registry.clone(),
            snapshots,
            target_error: capture.target_error.clone(),
            tasks: capture.tasks.clone(),
            stop_pods: capture.stop_pods.clone(),
            stop: capture.stop.clone(),
        };
        let probers = Probers {
            tools: capture.tools.clone(),
            directories: options.probe_cgroups,
            node: capture.node.clone(),
            snapshots: capture.wanted.subscribe(),
            stop: capture.stop.clone(),
        };
        probers.first_look()?;
        capture.tasks.spawn(reconciler.run());
        capture.tasks.spawn(memory::follow(
            capture.tools.share.clone(),
            capture.memory.clone(),
            capture.shortage.clone(),
            capture.stop.clone(),
        ));
        capture.tasks.spawn(addresses::follow(
            capture.tools.kernel.clone(),
            capture.stop.clone(),
        ));
        capture.tasks.spawn(probers.follow());
        Ok(capture)
    }

    /// Sets the desired state: destinations to capture, pods to enrol, to change, to let go.
    pub fn apply(&self, snapshot: Arc<Snapshot>) {
        self.last.store(Some(snapshot.clone()));
        self.wanted.send_replace(Some(snapshot));
    }

    /// Says whether the model may lack pods that are there, because their documents were refused.
    /// Then pods that a former agent enrolled stay as their modes say, whoever they are: one that
    /// is STRICT does not get out of the mesh by a typing error and a restart of the agent.
    pub fn keep_leftovers(&self, keep: bool) {
        self.registry.keep_leftovers(keep);
    }

    /// The pod, if it is in the mesh.
    #[must_use]
    pub fn enrolled(&self, uid: &WorkloadUid) -> Option<Arc<EnrolledPod>> {
        self.registry.enrolled(uid)
    }

    /// How far the pods of this node are, those included that the model keeps out.
    #[must_use]
    pub fn pods(&self) -> Vec<PodStatus> {
        let mut pods = self.registry.statuses();
        for pod in &mut pods {
            if let Some(netns_cookie) = pod.netns_cookie {
                pod.native = native::view(&self.tools.kernel, netns_cookie);
            }
        }
        if let Some(snapshot) = self.last.load().as_ref() {
            pods.extend(reconcile::kept_out(&self.node, snapshot));
        }
        pods
    }

    /// What the native connections of each pod in the mesh carried, where there were any: at most
    /// five classes a pod.
    #[must_use]
    pub fn native(&self) -> Vec<NativeSample> {
        native::samples(&self.tools.kernel, &self.registry.all_enrolled())
    }

    /// The pods that are in the mesh.
    #[must_use]
    pub fn all_enrolled(&self) -> Vec<Arc<EnrolledPod>> {
        self.registry.all_enrolled()
    }

    /// Whether memory is short, from the first time that it is.
    pub fn shortage(&self) -> watch::Receiver<bool> {
        self.shortage.subscribe()
    }

    /// The memory that the agent uses and may use, at the last look.
    #[must_use]
    pub fn memory(&self) -> MemoryStatus {
        self.memory.lock().clone()
    }

    /// Programs and maps.
    #[must_use]
    pub fn kernel(&self) -> &Kernel {
        &self.tools.kernel
    }

    /// What the agent's side of capture counted.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.tools.counters.all()
    }

    /// Why the kernel does not have the captured destinations of the last snapshot; none when it
    /// has them.
    #[must_use]
    pub fn target_error(&self) -> Option<String> {
        self.target_error.lock().clone()
    }

    /// Whether every pod of the first snapshot was tried once. One that cannot be enrolled does
    /// not hold it back.
    #[must_use]
    pub fn synced(&self) -> bool {
        self.registry.synced()
    }

    /// Rests enrolment, verification and everything else that changes the kernel side, once what is
    /// under way has ended. Connections go on, also new ones.
    pub async fn hold(&self) -> Held {
        self.tools.shelf.hold().await
    }

    /// Copies of the listening sockets of all pods.
    pub fn listeners(&self) -> std::io::Result<Vec<Handed>> {
        self.tools.shelf.copies()
    }

    /// Puts right what a successor may have changed that took the listeners and did not stay: its
    /// programs of another layout, its listeners in our slots, its destinations.
    pub async fn resume(&self, held: Held) -> Result<(), EnrolError> {
        let listeners = self.listeners().map_err(EnrolError::Listener)?;
        let restored = on_kernel(&self.tools.kernel, move |kernel| {
            for listener in &listeners {
                kernel.set_listener(listener.slot, listener.descriptor.as_fd())?;
            }
            kernel.reread_targets()?;
            kernel.clear_former_layouts()
        })
        .await;
        self.tools.shelf.resume();
        drop(held);
        self.wanted.send_modify(|_| {});
        restored.map(|_| ())
    }

    /// Whether programs of another layout are in force. Then pods are laid as by
    /// [`Capture::start_beside`], and [`Capture::replace_programs`] comes before [`Capture::accept`].
    #[must_use]
    pub fn waits_for_replacement(&self) -> bool {
        self.tools.kernel.is_staged()
    }

    /// Puts this agent's programs in place of those of another layout: no other agent accepts any
    /// more, and what is opened meanwhile waits in the listeners' queues.
    pub async fn replace_programs(&self) -> Result<(), EnrolError> {
        on_kernel(&self.tools.kernel, Kernel::replace_former).await
    }

    /// Returns once every pod of the first snapshot is laid, or has failed to be.
    pub async fn laid(&self) {
        self.registry.all_laid().await;
    }

    /// Begins to accept for all pods at once: a connection of one may lead to another, and would be
    /// reset if that were not laid.
    pub fn accept(&self) {
        self.tools.shelf.accept();
    }

    /// The listeners that this agent accepts at, or will from [`Capture::accept`] on.
    #[must_use]
    pub fn served(&self) -> std::collections::BTreeSet<kernel::ListenerSlot> {
        self.tools.shelf.served()
    }

    /// No other agent accepts for the pods any more: they may be probed. Listeners that were
    /// handed over and that no pod took are closed.
    pub fn go_alone(&self) {
        self.tools.shelf.go_alone();
        self.tools.shelf.drop_handed();
    }

    /// Stops accepting and closes all listeners. What the kernel was told stays, so that from now
    /// on new connections go as the pods' modes say. Live connections go on.
    pub async fn shutdown(&self) {
        self.stop.cancel();
        self.stop_pods.cancel();
        self.tasks.close();
        if timeout(SHUTDOWN_LIMIT, self.tasks.wait()).await.is_err() {
            tracing::warn!("not every pod's listeners were closed in time");
        }
    }

    /// Takes every pod out of the mesh, and then everything that the kernel was told.
    pub async fn uninstall(&self) -> Result<(), EnrolError> {
        self.stop.cancel();
        let drain = self
            .last
            .load()
            .as_ref()
            .map_or(Duration::ZERO, |snapshot| snapshot.config().drain_timeout);
        self.registry.want_none(drain);
        self.registry.emptied().await;
        self.tasks.close();
        self.tasks.wait().await;
        let left = reconcile::leftovers(&self.tools, &self.registry, &[]).await?;
        reconcile::remove(&self.tools, &self.registry, &left, &[]).await;
        on_kernel(&self.tools.kernel, |kernel| {
            kernel.clear_former_layouts()?;
            kernel.uninstall()
        })
        .await
    }
}

impl Drop for Capture {
    /// As [`Capture::shutdown`], without waiting.
    fn drop(&mut self) {
        self.stop.cancel();
        self.stop_pods.cancel();
    }
}
