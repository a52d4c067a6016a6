//! Cells of the failure table in which no agent ends by itself: a pod that is not enrolled, a destination outside
//! the mesh, traffic that a pod forwards, an agent that hangs. Counted by clients and servers; status and counters
//! of the agent are only asked whether they say so too.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde::Serialize;
use serde_json::Value;

use crate::lab::{Binaries, Lab, LabBuilder, PodHandle, PodSpec, ServiceSpec, Side, Traffic};
use crate::metrics::Metrics;
use crate::netns::Netns;
use crate::process::Place;
use crate::traffic::{ClientOptions, ClientReport, Failure, Kind, ServeOptions, ServerReport};
use crate::{interrupt, machine, wait};

const ORIGIN: u16 = 7000;
const SETTLE: Duration = Duration::from_secs(20);
/// For connections that wait for an agent that does not run.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long the agent is stopped before it is looked what became of the connections.
const STOPPED: Duration = Duration::from_secs(3);
const FINISH: Duration = Duration::from_secs(90);
/// Of the network behind a pod.
const NESTED: [&str; 2] = ["192.168.77.1", "192.168.77.2"];

/// Mode of the pod that a cell is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Nothing passes that the mesh cannot secure.
    Strict,
    /// It passes, and is counted.
    Permissive,
}

/// What came of one cell.
#[derive(Debug, Clone, Serialize)]
pub struct CellResult {
    /// Which.
    pub cell: &'static str,
    /// Of the pod that it is about.
    pub mode: Mode,
    /// Connections tried, by what they were to show.
    pub counts: BTreeMap<&'static str, u64>,
    /// What the agent's status says of it.
    pub status: String,
    /// What is not as the table has it.
    pub wrong: Vec<String>,
}

impl CellResult {
    fn new(cell: &'static str, mode: Mode) -> Self {
        Self {
            cell,
            mode,
            counts: BTreeMap::new(),
            status: String::new(),
            wrong: Vec::new(),
        }
    }

    /// Notes a figure, which must be so.
    fn expect(&mut self, what: &'static str, observed: u64, expected: u64) {
        self.counts.insert(what, observed);
        if observed != expected {
            self.wrong
                .push(format!("{what}: {observed}, not {expected}"));
        }
    }

    fn expect_status(&mut self, status: String, words: &[&str]) {
        for word in words {
            if !status.contains(word) {
                self.wrong.push(format!("no {word:?} in {status}"));
            }
        }
        self.status = status;
    }
}

/// Runs all cells for pods of this mode, with so many connections each.
pub fn run(
    binaries: Option<Binaries>,
    mode: Mode,
    connections: u64,
    mut report: impl FnMut(&CellResult),
) -> Result<Vec<CellResult>> {
    machine::require(&[machine::NFT])?;
    let lab = plan(binaries, mode).start()?;
    let field = Field::start(&lab, mode, connections)?;
    let behind = field.lay_network_behind()?;
    lab.start_mesh()?;
    let mut results = Vec::new();
    let mut add = |result: Result<CellResult>| -> Result<()> {
        interrupt::check()?;
        let result = result?;
        report(&result);
        results.push(result);
        Ok(())
    };
    add(field.not_enrolled().context("not enrolled"))?;
    add(field.outside().context("outside"))?;
    add(field.forwarded(&behind).context("forwarded"))?;
    add(field.hung_and_goes_on().context("hung"))?;
    add(field.hung_and_ended().context("hung and ended"))?;
    // Without an agent by now.
    add(field.outside_without_agent().context("outside"))?;
    Ok(results)
}

fn plan(binaries: Option<Binaries>, mode: Mode) -> LabBuilder {
    let pod = |name: &str| match mode {
        Mode::Strict => PodSpec::new(name).on(Side::A).strict(),
        Mode::Permissive => PodSpec::new(name).on(Side::A).permissive(),
    };
    // No cgroup of a pod: one that the programs cannot see is not enrolled.
    let unseen = |spec: PodSpec| spec.annotation("undermesh.io/cgroup", "/");
    let service = |name: &str| ServiceSpec::new(name).port(80, ORIGIN);
    let mut builder = Lab::builder()
        .pod(pod("client"))
        .pod(pod("near"))
        .pod(unseen(pod("late")))
        .pod(pod("router"))
        .pod(PodSpec::new("strict").on(Side::B).strict())
        .pod(PodSpec::new("open").on(Side::B).permissive())
        .pod(PodSpec::new("outside").on(Side::B).outside())
        .service(service("near"))
        .service(service("late"))
        .service(service("strict"))
        .service(service("open"))
        .without_agents();
    if let Some(binaries) = binaries {
        builder = builder.binaries(binaries);
    }
    builder
}

struct Field<'a> {
    lab: &'a Lab,
    mode: Mode,
    connections: u64,
    servers: BTreeMap<&'static str, Traffic<ServerReport>>,
}

impl<'a> Field<'a> {
    fn start(lab: &'a Lab, mode: Mode, connections: u64) -> Result<Self> {
        let mut servers = BTreeMap::new();
        for name in ["near", "late", "strict", "open", "outside"] {
            let server = lab.pod(name)?.serve(ServeOptions::new().origin(ORIGIN))?;
            servers.insert(name, server);
        }
        Ok(Self {
            lab,
            mode,
            connections,
            servers,
        })
    }

    /// Answered as the client itself would be, and through a proxy.
    fn served(&self, name: &str) -> Result<(u64, u64)> {
        let server = self.servers.get(name).with_context(|| name.to_owned())?;
        let report = server.report()?;
        Ok((report.direct, report.proxied))
    }

    fn origin(&self, to: std::net::SocketAddr) -> ClientOptions {
        ClientOptions::new(Kind::Origin, to)
            .connections(self.connections)
            .concurrency(4)
            .timeout(PATIENCE)
    }

    /// A network behind a pod, as nested containers have it: the pod forwards, and its address stands for theirs.
    fn lay_network_behind(&self) -> Result<Place> {
        let router = self.lab.pod("router")?;
        let place = router.place();
        let nested = Netns::create(&place.dir.join("nested"))?;
        let [gateway, own] = NESTED;
        place.netns.sysctl(&[("ipv4/ip_forward", "1")])?;
        place.netns.ip(&[
            format!(
                "link add behind type veth peer name eth0 netns {}",
                nested.path().display()
            ),
            format!("addr add {gateway}/24 dev behind"),
            "link set behind up".to_owned(),
        ])?;
        nested.ip(&[
            format!("addr add {own}/24 dev eth0"),
            "link set eth0 up".to_owned(),
            format!("route add default via {gateway}"),
        ])?;
        let rules = "table ip behind { chain out { type nat hook postrouting priority srcnat;
            oifname eth0 masquerade
            }
            }";
        place.netns.feed(&["nft", "-f", "-"], rules)?;
        Ok(Place {
            netns: nested,
            ..place
        })
    }

    /// What the agent says of a pod.
    fn status(&self, pod: &str) -> Result<Value> {
        let pods = self.lab.node(Side::A)?.agent().admin("/pods")?;
        let all = pods.as_array().context("/pods is no list")?;
        let name = format!("default/{pod}");
        let found = all.iter().find(|status| status["name"] == name);
        found
            .cloned()
            .with_context(|| format!("no {pod} in {pods}"))
    }

    /// How often node A's kernel programs gave a verdict.
    fn verdict(&self, verdict: &str) -> Result<u64> {
        let metrics = Metrics::parse(&self.lab.node(Side::A)?.agent().metrics()?);
        Ok(metrics.count("undermesh_kernel_verdicts_total", &[("verdict", verdict)]))
    }

    fn refused(report: &ClientReport) -> u64 {
        report.failed_by(Failure::Refused) + report.failed_by(Failure::Reset)
    }

    /// The pod's own connections are not seen, so they are plaintext: what it may reach is up to its peers.
    fn not_enrolled(&self) -> Result<CellResult> {
        let mut result = CellResult::new("not_enrolled", self.mode);
        let late = self.lab.pod("late")?;
        let to_strict = late.traffic(&self.origin(self.lab.service("strict", 80)?))?;
        result.expect(
            "to_strict_refused",
            Self::refused(&to_strict),
            self.connections,
        );
        result.expect("strict_served", sum(self.served("strict")?), 0);
        let to_open = late.traffic(&self.origin(self.lab.service("open", 80)?))?;
        result.expect("to_permissive_plaintext", to_open.ok, self.connections);
        let client = self.lab.pod("client")?;
        let to_late = client.traffic(&self.origin(self.lab.service("late", 80)?))?;
        // In plaintext, which a STRICT pod does not take: so nobody offers it.
        let (served, refused) = match self.mode {
            Mode::Strict => (0, self.connections),
            Mode::Permissive => (self.connections, 0),
        };
        result.expect("from_the_mesh_plaintext", sum(self.served("late")?), served);
        result.expect("from_the_mesh_refused", Self::refused(&to_late), refused);
        let status = self.status("late")?;
        let words = ["\"failed\"", "\"reconciled\"", "is not below"];
        result.expect_status(
            format!(
                "phase {}, guarantee {}, {}",
                status["phase"], status["guarantee"], status["last_error"]
            ),
            &words,
        );
        Ok(result)
    }

    fn outside(&self) -> Result<CellResult> {
        let mut result = CellResult::new("outside", self.mode);
        let client = self.lab.pod("client")?;
        let native = || -> Result<u64> {
            let classes = self.status("client")?["native"].clone();
            let classes = classes.as_object().context("no native traffic")?.clone();
            Ok(classes
                .values()
                .filter_map(|class| class["closed"].as_u64())
                .sum())
        };
        let (before, verdicts) = (native()?, self.verdict("connect_captured")?);
        let to = self.lab.pod("outside")?.v4(ORIGIN);
        let report = client.traffic(&self.origin(to))?;
        result.expect("served", report.ok, self.connections);
        result.expect("direct", report.direct, self.connections);
        // The agent's own probes of its pods are captured.
        let own = self.verdict("connect_captured")? - verdicts;
        ensure!(own < self.connections, "{own} connections were captured");
        let counted = wait::until("native traffic to be counted", SETTLE, || {
            let counted = native()? - before;
            Ok((counted >= self.connections).then_some(counted))
        })?;
        result.expect("counted_native", counted, self.connections);
        let status = self.status("client")?;
        result.expect_status(format!("native {}", status["native"]), &["closed"]);
        Ok(result)
    }

    fn outside_without_agent(&self) -> Result<CellResult> {
        let mut result = CellResult::new("outside_without_agent", self.mode);
        let client = self.lab.pod("client")?;
        let to = self.lab.pod("outside")?.v4(ORIGIN);
        let report = client.traffic(&self.origin(to))?;
        result.expect("direct", report.direct, self.connections);
        Ok(result)
    }

    /// Neither hook sees what is behind the pod.
    fn forwarded(&self, behind: &Place) -> Result<CellResult> {
        let mut result = CellResult::new("forwarded", self.mode);
        let from = |to| -> Result<ClientReport> {
            let program = self.lab.state().binaries.traffic.display().to_string();
            let output = behind.output(&program, &self.origin(to).to_args())?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            serde_json::from_str(&text)
                .with_context(|| format!("{text}{}", String::from_utf8_lossy(&output.stderr)))
        };
        let before = sum(self.served("strict")?);
        let to_strict = from(self.lab.service("strict", 80)?)?;
        result.expect(
            "to_strict_refused",
            Self::refused(&to_strict),
            self.connections,
        );
        result.expect("strict_served", sum(self.served("strict")?) - before, 0);
        let to_open = from(self.lab.service("open", 80)?)?;
        result.expect("to_permissive_plaintext", to_open.ok, self.connections);
        let to_outside = from(self.lab.pod("outside")?.v4(ORIGIN))?;
        result.expect("to_outside", to_outside.ok, self.connections);
        let status = self.status("router")?;
        let (text, words) = match self.mode {
            Mode::Strict => (
                format!("phase {}, {}", status["phase"], status["last_error"]),
                ["\"refused\"", "device behind is up"],
            ),
            Mode::Permissive => (
                format!(
                    "phase {}, forwarded_traffic_not_enforced {}",
                    status["phase"], status["forwarded_traffic_not_enforced"]
                ),
                ["\"enrolled\"", "device behind is up"],
            ),
        };
        result.expect_status(text, &words);
        Ok(result)
    }

    /// Connections that are opened while the agent is stopped.
    fn opened_meanwhile(&self, client: &PodHandle) -> Result<Traffic<ClientReport>> {
        self.lab.signal_agent(Side::A, Signal::SIGSTOP)?;
        let to = self.lab.service("near", 80)?;
        let waiting = client.start_traffic(&self.origin(to).concurrency(self.connections))?;
        wait::pause(STOPPED)?;
        Ok(waiting)
    }

    /// It counts as alive: its listeners are there, so nothing passes by, and what waits is served when it goes on.
    fn hung_and_goes_on(&self) -> Result<CellResult> {
        let mut result = CellResult::new("hung_and_goes_on", self.mode);
        let client = self.lab.pod("client")?;
        let (direct, proxied) = self.served("near")?;
        let waiting = self.opened_meanwhile(&client)?;
        let meanwhile = waiting.report()?;
        result.expect("served_while_hung", meanwhile.ok, 0);
        result.expect("refused_while_hung", meanwhile.failed, 0);
        self.lab.signal_agent(Side::A, Signal::SIGCONT)?;
        let after = waiting.finish(FINISH)?;
        result.expect("served_afterwards", after.ok, self.connections);
        let (direct, proxied) = (
            self.served("near")?.0 - direct,
            self.served("near")?.1 - proxied,
        );
        result.expect("direct", direct, 0);
        result.expect("proxied", proxied, self.connections);
        Ok(result)
    }

    /// Ended by whoever watches it: what waited is reset, and never sent elsewhere.
    fn hung_and_ended(&self) -> Result<CellResult> {
        let mut result = CellResult::new("hung_and_ended", self.mode);
        let client = self.lab.pod("client")?;
        let before = sum(self.served("near")?);
        let waiting = self.opened_meanwhile(&client)?;
        result.expect("served_while_hung", waiting.report()?.ok, 0);
        self.lab.end_agent(Side::A, Signal::SIGKILL)?;
        let after = waiting.finish(FINISH)?;
        result.expect("reset", after.failed_by(Failure::Reset), self.connections);
        result.expect("reached_the_server", sum(self.served("near")?) - before, 0);
        Ok(result)
    }
}

fn sum((direct, proxied): (u64, u64)) -> u64 {
    direct + proxied
}
