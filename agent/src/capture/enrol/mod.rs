//! Putting one pod into the mesh and taking it out again, each step in the order in which no
//! packet goes where it should not.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::accept::{Acceptor, Handler};
use super::counters::{Counters, Event};
use super::forwarding::{self, Forwards};
use super::kernel::{Family, Kernel, KernelError, ListenerKind, ListenerSlot, PodRecord};
use super::netns::{Netns, NetnsError, NetnsWorker};
use super::network::{self, Entry, Network};
use super::pod::{EnrolledPod, PodParts};
use super::ports::SourcePorts;
use super::probe::{self, ProbeDesk, Proof};
use super::share::NodeShare;
use super::shelf::Shelf;
use super::sockets::{Listener, PodAddresses};
use super::sysctl;
use crate::mesh::{Mode, Workload};
use crate::workers::Workers;

mod error;
mod unlay;

pub use error::EnrolError;
pub(super) use unlay::{forget, unlay};

use unlay::{remove_listeners, unlay_network};

const KINDS: [ListenerKind; 3] = [
    ListenerKind::Outbound,
    ListenerKind::Inbound,
    ListenerKind::Hbone,
];

/// How long connections may take to end once they were told to end now.
const END_LIMIT: Duration = Duration::from_secs(5);
/// How often a drain looks whether the namespace is still there.
const DRAIN_LOOK: Duration = Duration::from_millis(500);

/// What enrolments of one node share.
pub(super) struct Tools {
    pub kernel: Arc<Kernel>,
    /// Listeners that are served, and those that were handed over.
    pub shelf: Shelf,
    /// Where the programs are attached.
    pub cgroup: PathBuf,
    /// For enrolment.
    pub worker: NetnsWorker,
    /// For the sockets of connections, which must not wait for enrolments.
    pub sockets: NetnsWorker,
    pub handler: Arc<dyn Handler>,
    /// Who serve the pods' connections.
    pub workers: Arc<Workers>,
    /// What the pods share of the process's descriptors.
    pub share: Arc<NodeShare>,
    pub counters: Arc<Counters>,
}

/// A pod that is in the mesh, and all that it takes.
pub(super) struct Enrolment {
    pub pod: Arc<EnrolledPod>,
    netns: Arc<Netns>,
    needed: BTreeSet<Entry>,
    /// Indices of the devices with its addresses.
    devices: BTreeSet<u32>,
    forwards: Option<Forwards>,
    families: Vec<Family>,
    mode: Mode,
    stop: CancellationToken,
    loops: Vec<JoinHandle<()>>,
    probes: Arc<ProbeDesk>,
}

impl Enrolment {
    /// Puts a pod into the mesh, up to the pod map. [`Enrolment::prove`] says whether it has
    /// effect. Every step may find its work done, by an attempt that failed later or by a former
    /// agent. On an error, [`unlay`] takes away what was laid.
    pub async fn lay(
        tools: &Tools,
        workload: &Arc<Workload>,
        mode: Mode,
        netns: Arc<Netns>,
    ) -> Result<Self, EnrolError> {
        check_cgroup(workload, &tools.cgroup)?;
        let network = Network::open(&netns, &tools.worker).await?;
        let addresses = present_addresses(tools, &netns, &network, workload).await?;
        let own: PodAddresses = addresses.iter().map(|found| found.address).collect();
        let devices = addresses.iter().map(|found| found.device).collect();
        let forwards = forwarding::look(&netns, &tools.worker, &network, &devices).await?;
        if let Some(forwards) = &forwards
            && forwards.refuses(mode)
            && !is_known(tools, &netns).await?
        {
            return Err(EnrolError::Forwards(forwards.clone()));
        }
        let families: Vec<Family> = own.families().collect();

        // First the listeners: a SYN that finds none hangs.
        let (listeners, local_ports) = {
            let families = families.clone();
            let adopted = tools.shelf.adopt(netns.cookie(), &families);
            tools
                .worker
                .run(&netns, move || {
                    let listeners = open_listeners(adopted, &families)?;
                    Ok::<_, EnrolError>((listeners, sysctl::local_ports()?))
                })
                .await??
        };
        let slots = slots(netns.cookie(), &listeners);

        if network.note().await?.is_none() {
            let former = tools.worker.run(&netns, sysctl::read).await??;
            network.put_note(former).await?;
        }
        tools.worker.run(&netns, sysctl::set).await??;
        let needed = network::needed(&addresses);
        network.ensure(&needed).await?;

        let pod = Arc::new(EnrolledPod::new(PodParts {
            workload: workload.clone(),
            addresses: own,
            netns: netns.clone(),
            kernel: tools.kernel.clone(),
            worker: tools.sockets.clone(),
            share: tools.share.join(),
            ports: SourcePorts::new(&local_ports, rand::random()),
            counters: tools.counters.clone(),
        }));
        let probes = Arc::new(ProbeDesk::default());
        let mut enrolment = Self {
            pod: pod.clone(),
            netns: netns.clone(),
            needed,
            devices,
            forwards: None,
            families,
            mode,
            stop: CancellationToken::new(),
            loops: Vec::new(),
            probes: probes.clone(),
        };

        enrolment.note_forwarding(tools, forwards);

        // Listeners into their slots before the program that asks for them, and the pod map last:
        // from then on its connections are captured.
        let record = enrolment.record(mode);
        let probe_ports = workload.probe_ports.clone();
        let listeners = on_kernel(&tools.kernel, move |kernel| {
            for (slot, listener) in slots.into_iter().zip(&listeners) {
                kernel.set_listener(slot, listener.socket.as_fd())?;
            }
            kernel.set_probe_ports(&record, &probe_ports)?;
            kernel.attach_lookup(netns.as_fd(), &record)?;
            kernel.put_pod(&record)?;
            Ok(listeners)
        })
        .await?;

        let acceptor = Acceptor {
            pod,
            handler: tools.handler.clone(),
            counters: tools.counters.clone(),
            workers: tools.workers.clone(),
            probes,
            accepting: tools.shelf.accepting(),
            stop: enrolment.stop.clone(),
        };
        for listener in listeners {
            let slot = slot(enrolment.netns.cookie(), &listener);
            let (running, socket) = acceptor.start(listener).map_err(EnrolError::Listener)?;
            tools.shelf.serve(slot, &socket);
            enrolment.loops.push(running);
        }
        Ok(enrolment)
    }

    /// Connects as the pod does, in each of its families.
    pub async fn prove(&self, tools: &Tools) -> Result<Vec<Proof>, EnrolError> {
        let mut proofs = Vec::new();
        for &family in &self.families {
            let proof = probe::prove(
                &self.netns,
                &tools.worker,
                family,
                self.pod.addresses(),
                &self.probes,
            )
            .await
            .inspect_err(|_| tools.counters.count(Event::ProbeFailed))?;
            proofs.push(proof);
        }
        Ok(proofs)
    }

    /// Puts back what is missing, and looks whether the pod forwards by now. Returns how much was
    /// put back.
    pub async fn repair(&mut self, tools: &Tools) -> Result<usize, EnrolError> {
        let network = Network::open(&self.netns, &tools.worker).await?;
        let forwards =
            forwarding::look(&self.netns, &tools.worker, &network, &self.devices).await?;
        self.note_forwarding(tools, forwards);
        let mut repaired = network.ensure(&self.needed).await?;
        repaired += tools.worker.run(&self.netns, sysctl::set).await??;
        let record = self.record(self.mode);
        let netns = self.netns.clone();
        repaired += on_kernel(&tools.kernel, move |kernel| {
            let attached = kernel.lookup_attached(record.netns_cookie);
            if !attached {
                kernel.attach_lookup(netns.as_fd(), &record)?;
            }
            // Writing it again costs less than asking for it.
            kernel.put_pod(&record)?;
            Ok(usize::from(!attached))
        })
        .await?;
        tools.counters.add(Event::Repaired, repaired as u64);
        Ok(repaired)
    }

    /// Follows the model where that needs no new enrolment. Returns whether it did.
    pub async fn follow(
        &mut self,
        tools: &Tools,
        workload: &Arc<Workload>,
        mode: Mode,
    ) -> Result<Followed, EnrolError> {
        let known = self.pod.workload();
        if known.addresses != workload.addresses
            || known.sandbox.as_ref().map(|sandbox| &sandbox.netns)
                != workload.sandbox.as_ref().map(|sandbox| &sandbox.netns)
        {
            return Ok(Followed::NeedsNewEnrolment);
        }
        if known.probe_ports != workload.probe_ports {
            let (record, ports) = (self.record(mode), workload.probe_ports.clone());
            on_kernel(&tools.kernel, move |kernel| {
                kernel.set_probe_ports(&record, &ports)
            })
            .await?;
        }
        self.pod.set_workload(workload.clone());
        if self.mode != mode {
            let record = self.record(mode);
            let netns = self.netns.clone();
            on_kernel(&tools.kernel, move |kernel| {
                kernel.attach_lookup(netns.as_fd(), &record)?;
                kernel.put_pod(&record)
            })
            .await?;
            self.mode = mode;
            tracing::info!(pod = %workload.name, %mode, "mode changed");
        }
        Ok(Followed::Yes)
    }

    /// What says that the pod may forward what others send. One that is STRICT and began to after
    /// it was enrolled stays in the mesh: without it more would pass.
    pub fn forwards(&self) -> Option<&Forwards> {
        self.forwards.as_ref()
    }

    fn note_forwarding(&mut self, tools: &Tools, found: Option<Forwards>) {
        if let Some(forwards) = &found
            && self.forwards != found
        {
            tools.counters.count(match forwards {
                Forwards::Unknown(_) => Event::ForwardingUnknown,
                Forwards::Device(_) | Forwards::Translation(_) => Event::ForwardingFound,
            });
            let pod = self.pod.workload();
            tracing::warn!(pod = %pod.name, %forwards, "what the pod forwards for others is not enforced");
        }
        self.forwards = found;
    }

    /// Whether the namespace is still the one at its path.
    pub fn is_there(&self) -> bool {
        self.netns.is_there()
    }

    /// Takes the pod out of the mesh. Its connections have so long to end by themselves, and then
    /// end with RST; a pod that is gone does not wait, nor does one told to hurry. What cannot be taken away is reported at
    /// the end, when all else was.
    pub async fn leave(
        mut self,
        tools: &Tools,
        drain: Duration,
        hurry: &CancellationToken,
    ) -> Result<(), EnrolError> {
        let cookie = self.netns.cookie();
        let cleared = on_kernel(&tools.kernel, move |kernel| kernel.remove_pod(cookie)).await;
        self.pod.leaving().cancel();
        tokio::select! {
            () = self.drain(Instant::now() + drain) => {}
            () = hurry.cancelled() => {}
        }
        self.pod.gone().cancel();
        if timeout(END_LIMIT, self.pod.idle()).await.is_err() {
            tracing::warn!(pod = %self.pod.workload().name, live = self.pod.live(), "connections are cut");
            self.pod.cut().cancel();
            let _ = timeout(END_LIMIT, self.pod.idle()).await;
        }
        let unlaid = unlay_network(tools, &self.netns).await;
        // The programs before the listeners: without a listener, STRICT refuses.
        let detached = on_kernel(&tools.kernel, move |kernel| kernel.detach_lookup(cookie)).await;
        self.close().await;
        self.pod.release();
        let emptied = remove_listeners(tools, cookie).await;
        cleared.and(detached).and(emptied)?;
        unlaid
    }

    async fn drain(&self, deadline: Instant) {
        while self.netns.is_there() && Instant::now() < deadline {
            let look = deadline.min(Instant::now() + DRAIN_LOOK);
            if timeout_at(look, self.pod.idle()).await.is_ok() {
                return;
            }
        }
    }

    /// Closes the listeners; what the kernel was told stays.
    pub async fn close(&mut self) {
        self.stop.cancel();
        for running in self.loops.drain(..) {
            let _ = running.await;
        }
    }

    fn record(&self, mode: Mode) -> PodRecord {
        let PodAddresses { v4, v6 } = self.pod.addresses();
        PodRecord {
            netns_cookie: self.netns.cookie(),
            v4,
            v6,
            mode,
        }
    }
}

impl Drop for Enrolment {
    /// However it ends, nothing keeps the namespace alive or accepts for it.
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// What [`Enrolment::follow`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Followed {
    /// The enrolment is as the model wants it.
    Yes,
    /// Addresses or namespace changed.
    NeedsNewEnrolment,
}

/// Declares a pod that cannot be laid, without listeners: STRICT refuses. For programs that replace those of
/// another layout, which had it.
pub(super) async fn shut(
    tools: &Tools,
    workload: &Workload,
    mode: Mode,
    netns: &Arc<Netns>,
) -> Result<(), EnrolError> {
    let PodAddresses { v4, v6 } = workload.addresses.iter().copied().collect();
    let record = PodRecord {
        netns_cookie: netns.cookie(),
        v4,
        v6,
        mode,
    };
    let netns = netns.clone();
    on_kernel(&tools.kernel, move |kernel| {
        kernel.attach_lookup(netns.as_fd(), &record)?;
        kernel.put_pod(&record)
    })
    .await
}

/// The pod's addresses that its devices have. A pod without IPv6 may still be given an address of
/// it in the model.
async fn present_addresses(
    tools: &Tools,
    netns: &Netns,
    network: &Network,
    workload: &Workload,
) -> Result<Vec<network::DeviceAddress>, EnrolError> {
    let found = network.devices(&workload.addresses).await?;
    let has_v6 = tools.worker.run(netns, sysctl::has_v6).await?;
    for &address in &workload.addresses {
        let is_found = found.iter().any(|present| present.address == address);
        if !is_found && (address.is_ipv4() || has_v6) {
            return Err(EnrolError::AddressMissing(address));
        }
    }
    if found.is_empty() {
        return Err(EnrolError::Refused("the pod has no IP address".to_owned()));
    }
    Ok(found)
}

/// Whether the kernel holds the pod already: it was in the mesh before, and began to forward then.
async fn is_known(tools: &Tools, netns: &Netns) -> Result<bool, EnrolError> {
    let cookie = netns.cookie();
    let pods = on_kernel(&tools.kernel, Kernel::pods).await?;
    Ok(pods.iter().any(|pod| pod.netns_cookie == cookie))
}

fn check_cgroup(workload: &Workload, attached: &Path) -> Result<(), EnrolError> {
    let Some(pod) = workload
        .sandbox
        .as_ref()
        .and_then(|sandbox| sandbox.cgroup.as_ref())
    else {
        return Ok(());
    };
    let resolved = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if resolved(pod).starts_with(resolved(attached)) {
        return Ok(());
    }
    Err(EnrolError::Cgroup {
        pod: pod.clone(),
        attached: attached.to_owned(),
    })
}

/// Opens what was not adopted.
fn open_listeners(
    mut listeners: Vec<Listener>,
    families: &[Family],
) -> Result<Vec<Listener>, EnrolError> {
    for &family in families {
        for kind in KINDS {
            let is_there = |listener: &Listener| listener.family == family && listener.kind == kind;
            if !listeners.iter().any(is_there) {
                listeners.push(Listener::open(family, kind).map_err(EnrolError::Listener)?);
            }
        }
    }
    Ok(listeners)
}

fn slot(netns_cookie: u64, listener: &Listener) -> ListenerSlot {
    ListenerSlot {
        netns_cookie,
        family: listener.family,
        kind: listener.kind,
    }
}

fn slots(netns_cookie: u64, listeners: &[Listener]) -> Vec<ListenerSlot> {
    listeners
        .iter()
        .map(|listener| slot(netns_cookie, listener))
        .collect()
}

/// bpf(2) may verify a program or walk a map: not on a worker of the runtime.
pub(super) async fn on_kernel<T, F>(kernel: &Arc<Kernel>, call: F) -> Result<T, EnrolError>
where
    T: Send + 'static,
    F: FnOnce(&Kernel) -> Result<T, KernelError> + Send + 'static,
{
    let kernel = kernel.clone();
    match tokio::task::spawn_blocking(move || call(&kernel)).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(NetnsError::Worker(error.to_string()).into()),
    }
}
