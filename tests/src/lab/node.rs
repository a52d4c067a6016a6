//! A node, and the agent on it.

use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::Pid;
use serde_json::Value;

use super::authority::Authority;
use super::network::WIRE;
use super::state::{LabState, NodeRecord};
use crate::cgroup::Cgroup;
use crate::http;
use crate::netns::Netns;
use crate::process::{self, Place, Process};
use crate::wait;
use crate::wire::Capture;

const READY: Duration = Duration::from_secs(30);
const STOP: Duration = Duration::from_secs(45);

/// A node.
#[derive(Debug, Clone)]
pub struct NodeHandle {
    state: LabState,
    record: NodeRecord,
}

impl NodeHandle {
    /// The node of that name in a lab that is up.
    pub fn open(state: &LabState, name: &str) -> Result<Self> {
        Ok(Self {
            record: state.node(name)?.clone(),
            state: state.clone(),
        })
    }

    /// What is known of it.
    #[must_use]
    pub fn record(&self) -> &NodeRecord {
        &self.record
    }

    /// Where commands on it run: beside its agent and its pods.
    #[must_use]
    pub fn place(&self) -> Place {
        self.place_in("tools")
    }

    fn place_in(&self, cgroup: &str) -> Place {
        Place {
            netns: Netns::at(&self.record.netns),
            cgroup: Cgroup::at(&self.record.cgroup.join(cgroup)),
            dir: self.record.dir.clone(),
        }
    }

    /// Captures what goes over the wire to the other node, from now on.
    pub fn capture(&self, name: &str) -> Result<Capture> {
        Capture::start(&self.place(), WIRE, name)
    }

    /// Its agent.
    #[must_use]
    pub fn agent(&self) -> Agent {
        Agent {
            place: self.place_in("agent"),
            node: self.clone(),
        }
    }
}

/// The agent of a node, running or not. What runs is what is in its cgroup.
#[derive(Debug, Clone)]
pub struct Agent {
    node: NodeHandle,
    place: Place,
}

impl Agent {
    /// Its admin endpoint, in the node's network namespace.
    #[must_use]
    pub fn admin_address() -> SocketAddr {
        ([127, 0, 0, 1], 15000).into()
    }

    /// Its metrics.
    #[must_use]
    pub fn metrics_address(&self) -> SocketAddr {
        (self.node.record.address, 15020).into()
    }

    /// Its readiness endpoint.
    #[must_use]
    pub fn readiness_address(&self) -> SocketAddr {
        (self.node.record.address, 15021).into()
    }

    /// Its log.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.place.dir.join("agent.log")
    }

    /// Its process, if it runs.
    pub fn pid(&self) -> Result<Option<i32>> {
        Ok(self.place.cgroup.processes()?.first().copied())
    }

    /// Resident memory in bytes.
    pub fn resident_bytes(&self) -> Result<u64> {
        let pid = self.pid()?.context("the agent does not run")?;
        process::resident_bytes(pid).context("no VmRSS")
    }

    /// Its command line.
    #[must_use]
    pub fn arguments(&self) -> Vec<String> {
        let (state, record) = (&self.node.state, &self.node.record);
        let authority = Authority::of(state);
        let path = |path: PathBuf| path.display().to_string();
        [
            ("--node", record.name.clone()),
            ("--manifests", path(state.dir.join("manifests"))),
            ("--cgroup-root", path(record.cgroup.clone())),
            ("--pins", path(record.dir.join("bpf/undermesh"))),
            ("--ca-address", Authority::address().to_string()),
            ("--ca-root", path(authority.root_file())),
            ("--ca-token-file", path(record.dir.join("token"))),
            ("--hand-over-socket", path(self.hand_over_socket())),
            ("--admin-socket", path(record.dir.join("control/socket"))),
        ]
        .into_iter()
        .fold(vec!["agent".to_owned()], |mut arguments, (name, value)| {
            arguments.extend([name.to_owned(), value]);
            arguments
        })
    }

    /// Starts it, with `more` arguments. Does not wait until it is ready.
    pub fn spawn(&self, more: &[String], environment: &[(String, String)]) -> Result<Process> {
        if let Some(pid) = self.pid()? {
            bail!(
                "the agent of {} runs already, as {pid}",
                self.node.record.name
            );
        }
        let program = self.node.state.binaries.agent.display().to_string();
        let mut command = self.place.detached(&program);
        command.args(self.arguments()).args(more);
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        let name = format!("agent of {}", self.node.record.name);
        Process::start(&name, command, &self.log())
    }

    /// Where a successor takes it over.
    #[must_use]
    pub fn hand_over_socket(&self) -> PathBuf {
        self.place.dir.join("hand-over")
    }

    /// Starts a successor beside the agent that runs.
    pub fn spawn_successor(
        &self,
        more: &[String],
        environment: &[(String, String)],
    ) -> Result<Process> {
        self.pid()?.context("the agent does not run")?;
        let program = self.node.state.binaries.agent.display().to_string();
        let mut command = self.place.detached(&program);
        command.args(self.arguments()).arg("--take-over").args(more);
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        let name = format!("successor of {}", self.node.record.name);
        Process::start(&name, command, &self.log())
    }

    /// Waits until `process` is the agent that a successor would find, and ready.
    pub fn wait_succeeded(&self, process: &mut Process) -> Result<()> {
        let (pid, path) = (process.pid(), self.hand_over_socket());
        let what = format!("{} to have taken over", process.name());
        process.until(&what, READY, |_| Ok(listener_pid(&path)? == pid))?;
        self.wait_ready(process)
    }

    /// Waits until it says that it is ready; `process` is the one that was started.
    pub fn wait_ready(&self, process: &mut Process) -> Result<()> {
        let what = format!("{} to be ready", process.name());
        let address = self.readiness_address();
        process.until(&what, READY, |_| {
            http::get(&self.place.netns, address, "/readyz", "*/*")?.success()?;
            Ok(true)
        })
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = self.pid()?.context("the agent does not run")?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("{signal} to {pid}"))
    }

    /// Sends it a signal and waits until nothing of it runs.
    pub fn end(&self, signal: Signal) -> Result<()> {
        self.signal(signal)?;
        self.place.cgroup.wait_empty(STOP)
    }

    /// GET from its admin endpoint, as text.
    pub fn admin_text(&self, path: &str) -> Result<String> {
        http::get(&self.place.netns, Self::admin_address(), path, "text/plain")?.success()
    }

    /// GET from its admin endpoint, as JSON.
    pub fn admin(&self, path: &str) -> Result<Value> {
        let address = Self::admin_address();
        let body = http::get(&self.place.netns, address, path, "application/json")?.success()?;
        serde_json::from_str(&body).with_context(|| format!("{path}: {body:.200}"))
    }

    /// Waits until it says that the pod (`namespace/name`) is in the mesh.
    pub fn wait_enrolled(&self, pod: &str) -> Result<()> {
        let mut last = Value::Null;
        wait::until_true(&format!("{pod} to be enrolled"), READY, || {
            let pods = self.admin("/pods")?;
            let mut pods = pods.as_array().context("/pods is no list")?.iter();
            last = pods
                .find(|one| one["name"] == pod)
                .cloned()
                .unwrap_or_default();
            Ok(last["phase"] == "enrolled")
        })
        .with_context(|| format!("/pods says {last}"))
    }

    /// Its metrics, as text.
    pub fn metrics(&self) -> Result<String> {
        http::get(&self.place.netns, self.metrics_address(), "/metrics", "*/*")?.success()
    }
}

/// The process that listens at a unix socket.
fn listener_pid(path: &Path) -> Result<i32> {
    let socket = UnixStream::connect(path)?;
    Ok(getsockopt(&socket, sockopt::PeerCredentials)?.pid())
}
