//! A cluster of two simulated nodes.

mod authority;
mod builder;
mod endpoints;
mod network;
mod node;
mod plan;
mod pod;
mod state;

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::Signal;
use serde_json::Value;

pub use authority::Authority;
pub use authority::random_hex;
pub use builder::{LabBuilder, PodSpec, ServiceSpec, Side};
pub use node::{Agent, NodeHandle};
pub use pod::{PodHandle, Traffic};
pub use state::{Binaries, LabState, NodeRecord, PodRecord, ServiceRecord, remove_stale};

use self::plan::Plan;
use self::state::Ownership;
use crate::cgroup::Cgroup;
use crate::netns::Netns;
use crate::process::Process;
use crate::{interrupt, kube_proxy, machine, manifests};

/// Two nodes with pods, a CA and agents. Dropping it removes all of it.
#[derive(Debug)]
pub struct Lab {
    inner: Mutex<Inner>,
    agent_arguments: Vec<String>,
    environment: Vec<(String, String)>,
    certificate_lifetime: Option<String>,
    ownership: Ownership,
    keep: bool,
}

#[derive(Debug)]
struct Inner {
    state: LabState,
    plan: Plan,
    /// Files of the manifests directory, with what is in them.
    written: BTreeMap<String, String>,
    agents: BTreeMap<String, Process>,
    others: Vec<Process>,
}

impl Lab {
    /// An empty lab to be.
    #[must_use]
    pub fn builder() -> LabBuilder {
        LabBuilder::new()
    }

    fn start(builder: LabBuilder) -> Result<Self> {
        machine::require_root()?;
        machine::require(&[machine::IP, machine::NFT])?;
        state::remove_stale()?;
        let id = builder.id.clone().unwrap_or_else(unique_id);
        let ownership = state::claim(&id)?;
        let dir = LabState::dir_of(&id);
        let cgroup = state::cgroup_of(&id)?;
        let binaries = match builder.binaries.clone() {
            Some(binaries) => binaries,
            None => Binaries::find()?,
        };
        let lab = Self {
            inner: Mutex::new(Inner {
                plan: Plan::new(dir.clone(), cgroup.clone()),
                written: BTreeMap::new(),
                agents: BTreeMap::new(),
                others: Vec::new(),
                state: LabState {
                    nodes: Side::ALL
                        .map(|side| network::plan_node(&dir, &cgroup, side))
                        .to_vec(),
                    id,
                    dir,
                    cgroup,
                    binaries,
                    pods: Vec::new(),
                    services: Vec::new(),
                    trust_domain: String::new(),
                    ca: Authority::address(),
                },
            }),
            agent_arguments: builder.agent_arguments,
            environment: builder.environment,
            certificate_lifetime: builder.certificate_lifetime,
            ownership,
            keep: false,
        };
        // From here on an error drops the lab, which removes what there is of it.
        lab.lock().lay_nodes()?;
        let pods = lab.lock().add(builder.documents)?;
        if builder.agents {
            lab.start_mesh()?;
        }
        lab.run_commands(&pods)?;
        Ok(lab)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of it.
    #[must_use]
    pub fn state(&self) -> LabState {
        self.lock().state.clone()
    }

    /// A pod, by its name or `namespace/name`.
    pub fn pod(&self, name: &str) -> Result<PodHandle> {
        PodHandle::open(&self.lock().state, name)
    }

    /// A node.
    pub fn node(&self, side: Side) -> Result<NodeHandle> {
        NodeHandle::open(&self.lock().state, side.node())
    }

    /// The CA.
    #[must_use]
    pub fn authority(&self) -> Authority {
        Authority::of(&self.lock().state)
    }

    /// A port at the first (IPv4) address of a Service.
    pub fn service(&self, name: &str, port: u16) -> Result<SocketAddr> {
        self.service_address(name, port, IpAddr::is_ipv4)
    }

    /// A port at the IPv6 address of a Service.
    pub fn service6(&self, name: &str, port: u16) -> Result<SocketAddr> {
        self.service_address(name, port, IpAddr::is_ipv6)
    }

    fn service_address(
        &self,
        name: &str,
        port: u16,
        fits: fn(&IpAddr) -> bool,
    ) -> Result<SocketAddr> {
        let inner = self.lock();
        let mut services = inner.state.services.iter();
        let service = services
            .find(|service| service.name == name)
            .with_context(|| format!("no service {name:?}"))?;
        let vip = service.vips.iter().copied().find(fits);
        Ok((
            vip.with_context(|| format!("{name} has no such address"))?,
            port,
        )
            .into())
    }

    /// Adds a pod to the running cluster.
    pub fn add_pod(&self, pod: &PodSpec) -> Result<PodHandle> {
        let added = self.lock().add(vec![pod.to_document()])?;
        self.run_commands(&added)?;
        self.pod(pod.name())
    }

    /// Ends a pod as a kubelet would: its processes first, then its network, then the object.
    pub fn remove_pod(&self, name: &str) -> Result<()> {
        let mut inner = self.lock();
        let pod = inner.state.pod(name)?.clone();
        let cgroup = Cgroup::at(&pod.cgroup);
        cgroup.kill()?;
        network::disconnect_pod(inner.state.node(&pod.node)?, &pod)?;
        inner.plan.remove_object("Pod", &pod.namespace, &pod.name);
        inner.publish()?;
        cgroup.remove()?;
        fs::remove_dir_all(&pod.dir)?;
        Ok(())
    }

    /// Ends a pod and gives its addresses to a new one on the same node: there is no moment at which nobody has them.
    /// `meanwhile` runs when the new pod has its network and nobody was told yet: agents, CA and kube-proxy still know
    /// the former. It is handed the new pod, and how long after the former's end it had the addresses, at most.
    pub fn replace_pod<T>(
        &self,
        former: &str,
        heir: &PodSpec,
        meanwhile: impl FnOnce(&PodHandle, Duration) -> Result<T>,
    ) -> Result<T> {
        let (former, heir, gap) = self.lock().pass_on(former, heir.to_document())?;
        let heir = PodHandle::new(heir, self.state().binaries);
        let outcome = meanwhile(&heir, gap)?;
        let mut inner = self.lock();
        inner
            .plan
            .remove_object("Pod", &former.namespace, &former.name);
        inner.publish()?;
        Cgroup::at(&former.cgroup).remove()?;
        fs::remove_dir_all(&former.dir)?;
        Ok(outcome)
    }

    /// Says of a pod whether it is ready, and so whether new connections are to go to it.
    pub fn set_ready(&self, name: &str, ready: bool) -> Result<()> {
        let mut inner = self.lock();
        let pod = inner.state.pod(name)?.clone();
        inner.plan.set_ready(&pod.namespace, &pod.name, ready)?;
        inner.publish()
    }

    /// Says of a pod that it was deleted: it is terminating from now on, and serves for as long as it is ready.
    pub fn set_terminating(&self, name: &str) -> Result<()> {
        let mut inner = self.lock();
        let pod = inner.state.pod(name)?.clone();
        inner.plan.set_terminating(&pod.namespace, &pod.name)?;
        inner.publish()
    }

    /// Adds an object to the manifests, or replaces it. Not for pods and Services.
    pub fn put(&self, document: Value) -> Result<()> {
        let kind = manifests::kind(&document);
        ensure!(kind != "Pod" && kind != "Service", "{kind}: not with put");
        let mut inner = self.lock();
        inner.plan.put(document)?;
        inner.publish()
    }

    /// Starts the agent of a node and waits until it is ready.
    pub fn start_agent(&self, side: Side) -> Result<()> {
        let agent = self.node(side)?.agent();
        let mut process = agent.spawn(&self.agent_arguments, &self.environment)?;
        agent.wait_ready(&mut process)?;
        self.lock().agents.insert(side.node().to_owned(), process);
        Ok(())
    }

    /// Lets a successor take over from the agent of a node. Gives back the old one, which drains.
    pub fn take_over(&self, side: Side) -> Result<Process> {
        let agent = self.node(side)?.agent();
        let mut successor = agent.spawn_successor(&self.agent_arguments, &self.environment)?;
        agent.wait_succeeded(&mut successor)?;
        let old = self.lock().agents.insert(side.node().to_owned(), successor);
        old.context("the agent was not started by this lab")
    }

    /// Ends the agent of a node: SIGTERM to let it finish, SIGKILL not to.
    pub fn end_agent(&self, side: Side, signal: Signal) -> Result<()> {
        let outcome = self.node(side)?.agent().end(signal);
        // Reaps it.
        self.lock().agents.remove(side.node());
        outcome
    }

    /// Sends a signal to the agent of a node and waits for nothing.
    pub fn signal_agent(&self, side: Side, signal: Signal) -> Result<()> {
        self.node(side)?.agent().signal(signal)
    }

    /// Lets the lab outlive this process, until [`Lab::remove`].
    pub fn keep(mut self) -> Result<LabState> {
        let state = self.state();
        self.ownership.give_up(&state.dir)?;
        self.keep = true;
        Ok(state)
    }

    /// Removes a lab by name, whoever made it.
    pub fn remove(id: &str) -> Result<()> {
        machine::require_root()?;
        if !LabState::dir_of(id).exists() && !state::cgroup_of(id)?.exists() {
            bail!("no lab {id:?} is up");
        }
        state::take_down(id)
    }

    /// Waits until the agent of its node says that the pod is in the mesh.
    pub fn wait_enrolled(&self, pod: &PodHandle) -> Result<()> {
        let agent = NodeHandle::open(&self.lock().state, &pod.record().node)?.agent();
        agent.wait_enrolled(&pod.full_name())
    }

    /// Starts the CA and both agents, and waits until they are ready: for a lab that was built without.
    pub fn start_mesh(&self) -> Result<()> {
        let lifetime = self.certificate_lifetime.as_deref();
        let state = self.state();
        for file in [&state.binaries.agent, &state.binaries.traffic] {
            ensure!(file.exists(), "{} is not built", file.display());
        }
        let ca = self
            .authority()
            .start(&state, lifetime, &self.environment)?;
        self.lock().others.push(ca);
        // Both at once: each waits for the other's pods in its turn only.
        let mut running = Vec::new();
        for side in Side::ALL {
            let agent = self.node(side)?.agent();
            let process = agent.spawn(&self.agent_arguments, &self.environment)?;
            running.push((side, agent, process));
        }
        for (side, agent, mut process) in running {
            agent.wait_ready(&mut process)?;
            self.lock().agents.insert(side.node().to_owned(), process);
        }
        Ok(())
    }

    fn run_commands(&self, pods: &[PodRecord]) -> Result<()> {
        let own = self.lock().state.binaries.traffic.clone();
        for pod in pods {
            let Some((program, args)) = pod.command.split_first() else {
                continue;
            };
            let program = if program == "undermesh-traffic" {
                &own.display().to_string()
            } else {
                program
            };
            let process = self.pod(&format!("{}/{}", pod.namespace, pod.name))?;
            let process = process.spawn("command", program, args)?;
            self.lock().others.push(process);
        }
        Ok(())
    }
}

impl Inner {
    fn lay_nodes(&mut self) -> Result<()> {
        let state = &self.state;
        for dir in ["netns", "pods", "manifests", "control"] {
            fs::create_dir_all(state.dir.join(dir))?;
        }
        Cgroup::create(&state.cgroup.join("control"))?;
        let control = Netns::create(&state.dir.join("netns/control"))?;
        for node in &state.nodes {
            for part in ["agent", "pods", "tools"] {
                Cgroup::create(&node.cgroup.join(part))?;
            }
            Netns::create(&node.netns)?;
            let bpf = node.dir.join("bpf");
            fs::create_dir_all(&bpf)?;
            let none: Option<&str> = None;
            mount(Some("bpf"), &bpf, Some("bpf"), MsFlags::empty(), none)
                .with_context(|| format!("mount a bpffs at {}", bpf.display()))?;
            authority::write_token(&node.dir.join("token"))?;
        }
        network::connect_nodes(&control, &state.nodes)
    }

    /// Adds objects: lays the pods' networks, then tells agents, CA and kube-proxy.
    fn add(&mut self, documents: Vec<Value>) -> Result<Vec<PodRecord>> {
        let pods = self.plan.add(documents)?;
        for pod in &pods {
            interrupt::check()?;
            fs::create_dir_all(&pod.dir)?;
            Cgroup::create(&pod.cgroup)?;
            network::connect_pod(self.state.node(&pod.node)?, pod)?;
        }
        let nodes = self.state.nodes.iter().map(|node| &node.netns);
        for netns in nodes.chain(pods.iter().map(|pod| &pod.netns)) {
            network::settle(&Netns::at(netns))?;
        }
        self.publish()?;
        Ok(pods)
    }

    /// The network of one pod goes, that of another comes with the same addresses.
    fn pass_on(&mut self, former: &str, heir: Value) -> Result<(PodRecord, PodRecord, Duration)> {
        let former = self.state.pod(former)?.clone();
        let heir = self.plan.add_heir(heir, &former)?;
        ensure!(heir.node == former.node, "{} is of another node", heir.name);
        fs::create_dir_all(&heir.dir)?;
        Cgroup::create(&heir.cgroup)?;
        let node = self.state.node(&former.node)?;
        network::lay_link(node, &heir)?;
        network::settle(&Netns::at(&heir.netns))?;
        Cgroup::at(&former.cgroup).kill()?;
        let ended = Instant::now();
        network::pass_on(node, &former, &heir)?;
        let gap = ended.elapsed();
        Ok((former, heir, gap))
    }

    fn publish(&mut self) -> Result<()> {
        self.plan
            .trust_domain()
            .clone_into(&mut self.state.trust_domain);
        self.state.pods.clone_from(&self.plan.pods);
        self.state.services.clone_from(&self.plan.services);
        Authority::of(&self.state).write_authenticator(&self.state, &self.plan.pods)?;
        self.write_manifests()?;
        let backends = self.plan.backends();
        for node in &self.state.nodes {
            kube_proxy::apply(&Netns::at(&node.netns), &backends)?;
        }
        self.state.save()
    }

    fn write_manifests(&mut self) -> Result<()> {
        let dir = self.state.dir.join("manifests");
        let mut wanted = BTreeMap::new();
        for (file, document) in self.plan.documents() {
            wanted.insert(file, manifests::to_yaml(&document)?);
        }
        for file in self
            .written
            .keys()
            .filter(|file| !wanted.contains_key(*file))
        {
            fs::remove_file(dir.join(file))?;
        }
        for (file, text) in &wanted {
            if self.written.get(file) != Some(text) {
                manifests::write(&dir, file, &self.state.dir, text)?;
            }
        }
        self.written = wanted;
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let (id, dir) = {
            let mut inner = self.lock();
            let processes = std::mem::take(&mut inner.agents).into_values();
            for process in processes.chain(std::mem::take(&mut inner.others)) {
                if self.keep {
                    process.leave_running();
                } else {
                    drop(process);
                }
            }
            (inner.state.id.clone(), inner.state.dir.clone())
        };
        if self.keep {
            return;
        }
        save_logs(&dir);
        if let Err(error) = state::take_down(&id) {
            eprintln!("{error:#}");
        }
    }
}

/// A test that fails takes its lab with it: what its programs said is all that helps then.
fn save_logs(dir: &Path) {
    let Some(target) = std::env::var_os("UNDERMESH_LAB_LOGS") else {
        if std::thread::panicking() {
            eprintln!("to keep the logs of labs, set UNDERMESH_LAB_LOGS to a directory");
        }
        return;
    };
    let target = Path::new(&target).join(dir.file_name().unwrap_or_default());
    let Ok(places) = fs::read_dir(dir) else {
        return;
    };
    let nested = fs::read_dir(dir.join("pods")).into_iter().flatten();
    for place in places.chain(nested).flatten() {
        for file in fs::read_dir(place.path()).into_iter().flatten().flatten() {
            if file
                .path()
                .extension()
                .is_some_and(|extension| extension == "log")
            {
                let kept = target.join(place.file_name()).join(file.file_name());
                let copied = fs::create_dir_all(target.join(place.file_name()))
                    .and_then(|()| fs::copy(file.path(), &kept));
                if let Err(error) = copied {
                    eprintln!("{}: {error}", kept.display());
                }
            }
        }
    }
    eprintln!("logs are in {}", target.display());
}

fn unique_id() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("t{}-{number}", std::process::id())
}
