//! Runs every kind of connect in a lab and holds the three counts against each other.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::Serialize;

use super::client::ConnectReport;
use super::kind::{Expected, Kind};
use crate::figures::Figures;
use crate::lab::{Binaries, Lab, PodHandle, PodSpec, ServiceSpec, Side, Traffic};
use crate::metrics::Metrics;
use crate::process::Process;
use crate::traffic::{ServeOptions, ServerReport};
use crate::{interrupt, wait};

const ECHO: u16 = 7000;
/// Nobody listens there.
const CLOSED: u16 = 7009;
const SETTLE: Duration = Duration::from_secs(20);
/// A second address that nothing but the pod knows.
const SECONDARY: [&str; 2] = ["10.241.200.7", "fd00:10:241::c8:7"];
const LINK_LOCAL: [&str; 2] = ["169.254.7.7", "fe80::7"];
/// What containerd leaves a process that asks for nothing: nothing.
const UNPRIVILEGED: [&str; 2] = ["--bounding-set=-all", "--inh-caps=-all"];
/// Every other SYN from here to the mesh is lost.
const LOSE_SYNS: &str = "table inet lossy { chain out { type filter hook output priority filter;
    tcp dport 80 tcp flags & (syn|ack) == syn numgen inc mod 2 0 drop
    }
    }";
/// What a process may hold here. An agent may have half as many connections, less what it keeps for
/// everything else.
const DESCRIPTORS: u64 = 20_000;
/// Connections of one pod that are served at once under that limit.
const PROMISED: u64 = 9_000;
/// Why a connection finds no place: the pod has as many as any pod may have, or as the node has.
const FULL: [(&str, &str); 2] = [("event", "pod_full"), ("event", "node_full")];

/// How much is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Some of each: seconds.
    Quick,
    /// As many as issue and acceptance ask for, or as run in a minute.
    Full,
}

/// What came of one kind to one address.
#[derive(Debug, Clone, Serialize)]
pub struct KindResult {
    /// `<kind>_v4` or `<kind>_v6`.
    pub kind: String,
    /// Connections tried.
    pub attempts: u64,
    /// The least that client, server and agents say were right.
    pub right: u64,
    /// As the client saw it.
    pub client: u64,
    /// As the server counted it.
    pub server: u64,
    /// Connections that the agents counted.
    pub agents: u64,
    /// Connections of which an agent named the true destination.
    pub destination: u64,
    /// What must happen: `captured`, `native`, `refused`.
    pub expected: &'static str,
    /// The client's first errors.
    pub errors: Vec<String>,
}

/// Runs these kinds. `report` hears of each as soon as it is known.
pub fn run(
    binaries: Option<Binaries>,
    extent: Extent,
    kinds: &[Kind],
    mut report: impl FnMut(&KindResult),
) -> Result<Vec<KindResult>> {
    // Whatever this machine allows, so that a pod's limit is where the trial expects it. Children inherit it.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let limit = most.min(DESCRIPTORS);
    setrlimit(Resource::RLIMIT_NOFILE, limit, limit)?;
    let mut builder = Lab::builder()
        .pod(PodSpec::new("client").on(Side::A).strict())
        .pod(PodSpec::new("far").on(Side::B).strict())
        .pod(PodSpec::new("near").on(Side::A).strict())
        .service(ServiceSpec::new("near").port(80, ECHO))
        .service(ServiceSpec::new("far").port(80, ECHO).port(81, CLOSED))
        .service(ServiceSpec::new("client").port(80, ECHO))
        .without_agents();
    if let Some(binaries) = binaries {
        builder = builder.binaries(binaries);
    }
    let lab = builder.start()?;
    let trial = Trial::start(&lab)?;
    let early = trial.make_sockets_early()?;
    lab.start_mesh()?;
    let mut results = Vec::new();
    for kind in kinds {
        for to in trial.targets(*kind)? {
            interrupt::check()?;
            let result = trial.one(*kind, to, extent, &early)?;
            report(&result);
            results.push(result);
        }
    }
    Ok(results)
}

struct Trial<'a> {
    lab: &'a Lab,
    client: PodHandle,
    program: String,
    far: Traffic<ServerReport>,
    near: Traffic<ServerReport>,
    own: Traffic<ServerReport>,
}

/// A client that has sockets from before the mesh, by family.
struct Early {
    to: SocketAddr,
    go: PathBuf,
    process: Process,
}

const EARLY: u32 = 20;

impl<'a> Trial<'a> {
    fn start(lab: &'a Lab) -> Result<Self> {
        let (client, far) = (lab.pod("client")?, lab.pod("far")?);
        let [v4, v6] = SECONDARY;
        // A deferred connect needs no cookie then: SYN and data go with the first write.
        let netns = client.place().netns;
        netns.sysctl(&[("ipv4/tcp_fastopen", "5")])?;
        netns.ip(&[
            format!("addr add {v4}/32 dev eth0"),
            format!("addr add {v6}/128 dev eth0 nodad"),
            format!("addr add {}/32 dev eth0 scope link", LINK_LOCAL[0]),
            format!("addr add {}/64 dev eth0 nodad", LINK_LOCAL[1]),
        ])?;
        Ok(Self {
            lab,
            program: program(lab),
            far: far.serve(ServeOptions::new().echo(ECHO))?,
            near: lab.pod("near")?.serve(ServeOptions::new().echo(ECHO))?,
            own: client.serve(ServeOptions::new().echo(ECHO))?,
            client,
        })
    }

    fn make_sockets_early(&self) -> Result<Vec<Early>> {
        let mut early = Vec::new();
        for (name, to) in [
            ("early-v4", self.lab.service("far", 80)?),
            ("early-v6", self.lab.service6("far", 80)?),
        ] {
            let go = self.client.place().dir.join(format!("{name}.go"));
            let mut arguments = arguments(Kind::MadeBefore, to, EARLY);
            arguments.extend(["--after".to_owned(), go.display().to_string()]);
            let mut process = self.client.spawn(name, &self.program, &arguments)?;
            process.until("sockets to be made", SETTLE, |process| {
                Ok(process.output().contains("made"))
            })?;
            early.push(Early { to, go, process });
        }
        Ok(early)
    }

    /// Both families, as far as the kind has both.
    fn targets(&self, kind: Kind) -> Result<Vec<SocketAddr>> {
        let own = |text: &str| -> Result<SocketAddr> {
            Ok((text.parse::<std::net::IpAddr>()?, ECHO).into())
        };
        let far = (self.lab.service("far", 80)?, self.lab.service6("far", 80)?);
        Ok(match kind {
            Kind::V4Mapped => {
                let std::net::IpAddr::V4(v4) = far.0.ip() else {
                    return Ok(Vec::new());
                };
                vec![(v4.to_ipv6_mapped(), far.0.port()).into()]
            }
            Kind::ToLoopback => vec![own("127.0.0.1")?, own("::1")?],
            Kind::ToOwnAddress => vec![self.client.v4(ECHO), self.client.v6(ECHO)?],
            Kind::ToSecondary => vec![own(SECONDARY[0])?, own(SECONDARY[1])?],
            Kind::ToLinkLocal => {
                let scope = self.eth0_index()?;
                let address = LINK_LOCAL[1].parse()?;
                let v6 = std::net::SocketAddrV6::new(address, ECHO, 0, scope).into();
                vec![own(LINK_LOCAL[0])?, v6]
            }
            // Between nodes the tunnels to one pod have a bound of their own, which is met before.
            Kind::PastTheLimit => vec![
                self.lab.service("near", 80)?,
                self.lab.service6("near", 80)?,
            ],
            Kind::ToClosedPort => vec![self.lab.service("far", 81)?, self.lab.service6("far", 81)?],
            Kind::Hairpin => vec![
                self.lab.service("client", 80)?,
                self.lab.service6("client", 80)?,
            ],
            _ => vec![far.0, far.1],
        })
    }

    fn eth0_index(&self) -> Result<u32> {
        let text = self
            .client
            .run("ip", &["-o", "link", "show", "dev", "eth0"])?;
        let (index, _) = text.split_once(':').context("ip -o link")?;
        Ok(index.trim().parse()?)
    }

    fn attempts(kind: Kind, extent: Extent) -> u32 {
        match (kind, extent) {
            (Kind::MadeBefore, _) => EARLY,
            (Kind::PortReuse, Extent::Quick) => 1,
            (Kind::PortReuse, Extent::Full) => 5,
            (Kind::Many, Extent::Quick) => 1_000,
            // In a minute: with TIME_WAIT, ports would last for half of them.
            (Kind::Many, Extent::Full) => 60_000,
            // Each takes a second, and so on.
            (Kind::BoundDeviceRetransmit | Kind::UnmarkedRetransmit, Extent::Quick) => 2,
            (Kind::BoundDeviceRetransmit | Kind::UnmarkedRetransmit, Extent::Full) => 20,
            // More than a process with 20,000 descriptors may serve of one pod.
            (Kind::PastTheLimit, _) => 10_200,
            (Kind::Concurrent, Extent::Quick) => 300,
            (Kind::Concurrent, Extent::Full) => 9_000,
            (_, Extent::Quick) => 10,
            (_, Extent::Full) => 200,
        }
    }

    fn one(
        &self,
        kind: Kind,
        to: SocketAddr,
        extent: Extent,
        early: &[Early],
    ) -> Result<KindResult> {
        let attempts = Self::attempts(kind, extent);
        // A connection of this kind may be two of TCP: one that is refused or that goes before.
        let each = if kind == Kind::Reconnected || kind == Kind::PortReuse {
            2
        } else {
            1
        };
        let accepted = || -> Result<u64> {
            let mut servers = [&self.far, &self.near, &self.own].into_iter();
            servers.try_fold(0, |sum, server| Ok(sum + server.report()?.accepted))
        };
        let log = self.lab.node(Side::A)?.agent().log();
        let (before, accepted_before, logged) = (
            Figures::read(self.lab)?,
            accepted()?,
            fs::metadata(&log)?.len(),
        );
        let full_before = self.full()?;
        let seen = self.make(kind, to, attempts, early)?;
        let expected = kind.expected();
        let wanted = u64::from(attempts) * each;
        let agents = || -> Result<u64> { Ok(Figures::read(self.lab)?.since(&before).outbound) };
        let named = || -> Result<u64> { destinations(&log, logged, to) };
        if expected == Expected::Captured {
            // Counters follow the last byte by a moment. What is missing then shows below.
            let _ = wait::until_true("the agents", SETTLE, || {
                Ok(agents()? >= wanted
                    && named()? >= wanted
                    && accepted()? - accepted_before >= wanted)
            });
            interrupt::check()?;
        }
        let (server, agents, destination) = (accepted()? - accepted_before, agents()?, named()?);
        let exact = |count: u64| {
            // One too many is as wrong as one too few.
            (wanted.saturating_sub(count.abs_diff(wanted)) / each).min(seen.right)
        };
        let none = |count: u64| u64::from(attempts).saturating_sub(count).min(seen.right);
        let (right, expected) = match expected {
            Expected::Captured => (
                exact(server).min(exact(agents)).min(exact(destination)),
                "captured",
            ),
            Expected::Native => (exact(server).min(none(agents)), "native"),
            Expected::Refused => (none(server), "refused"),
            // Whoever was refused was counted, whoever was not got through, and the bound was met.
            Expected::Bounded => {
                let counted = self.full()?.saturating_sub(full_before);
                let answered = wanted.saturating_sub(seen.refused);
                let met = seen.refused > 0 && answered >= PROMISED && server >= answered;
                let right = answered + seen.refused.min(counted);
                (if met { right.min(seen.right) } else { 0 }, "bounded")
            }
        };
        let family = if to.is_ipv4() || kind == Kind::V4Mapped {
            "v4"
        } else {
            "v6"
        };
        Ok(KindResult {
            kind: format!("{}_{family}", kind.name()),
            attempts: u64::from(attempts),
            right,
            client: seen.right,
            server,
            agents,
            destination,
            expected,
            errors: seen.errors,
        })
    }

    fn make(
        &self,
        kind: Kind,
        to: SocketAddr,
        attempts: u32,
        early: &[Early],
    ) -> Result<ConnectReport> {
        if kind == Kind::MadeBefore {
            let early = early.iter().find(|early| early.to == to);
            let early = early.context("no sockets from before")?;
            fs::write(&early.go, "")?;
            return wait::until("sockets from before", SETTLE, || {
                let output = early.process.output();
                let report = output.lines().find(|line| line.starts_with('{'));
                Ok(report.map(serde_json::from_str).transpose()?)
            });
        }
        let mut arguments = arguments(kind, to, attempts);
        let own = |secondary: &str, first: std::net::IpAddr| match kind {
            Kind::FromSecondary => secondary.to_owned(),
            _ => first.to_string(),
        };
        let source = match to {
            SocketAddr::V4(_) => own(SECONDARY[0], self.client.ip()),
            SocketAddr::V6(_) => own(SECONDARY[1], self.client.ip6()?),
        };
        arguments.extend(["--source".to_owned(), source]);
        if kind == Kind::MovedCgroup {
            let tools = self.lab.node(Side::A)?.place().cgroup;
            arguments.extend(["--cgroup".to_owned(), tools.path().display().to_string()]);
        }
        let netns = self.client.place().netns;
        let output = match kind {
            Kind::BoundDeviceUnprivileged => {
                let words = UNPRIVILEGED.map(str::to_owned).into_iter();
                let words = words.chain([self.program.clone()]).chain(arguments);
                self.client.run("setpriv", &words.collect::<Vec<_>>())
            }
            Kind::BoundDeviceRetransmit | Kind::UnmarkedRetransmit => {
                netns.feed(&["nft", "-f", "-"], LOSE_SYNS)?;
                let output = self.client.run(&self.program, &arguments);
                netns.feed(&["nft", "-f", "-"], "delete table inet lossy")?;
                output
            }
            Kind::SynCookies => {
                netns.sysctl(&[("ipv4/tcp_syncookies", "2")])?;
                let output = self.client.run(&self.program, &arguments);
                netns.sysctl(&[("ipv4/tcp_syncookies", "1")])?;
                output
            }
            _ => self.client.run(&self.program, &arguments),
        }?;
        serde_json::from_str(&output).context(output)
    }

    /// Connections that either agent refused because their pod or the node had as many as there may be.
    fn full(&self) -> Result<u64> {
        let mut sum = 0;
        for side in Side::ALL {
            let metrics = Metrics::parse(&self.lab.node(side)?.agent().metrics()?);
            let count = |reason| metrics.count("undermesh_capture_events_total", &[reason]);
            sum += FULL.into_iter().map(count).sum::<u64>();
        }
        Ok(sum)
    }
}

fn arguments(kind: Kind, to: SocketAddr, attempts: u32) -> Vec<String> {
    [
        "connect",
        "--kind",
        &kind.name(),
        "--to",
        &to.to_string(),
        "--attempts",
        &attempts.to_string(),
    ]
    .map(str::to_owned)
    .to_vec()
}

/// The program beside that of the traffic.
fn program(lab: &Lab) -> String {
    let traffic = lab.state().binaries.traffic;
    let program = traffic.with_file_name("undermesh-connects");
    program.display().to_string()
}

/// Lines of the access log from `start` on that are about a connection to `to`.
fn destinations(log: &std::path::Path, start: u64, to: SocketAddr) -> Result<u64> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = fs::File::open(log)?;
    file.seek(SeekFrom::Start(start))?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let plain = SocketAddr::new(to.ip().to_canonical(), to.port());
    let wanted = format!("original_destination={plain}");
    let quoted = format!("original_destination=\"{plain}\"");
    let names = |line: &&str| {
        line.contains("outbound") && (line.contains(&wanted) || line.contains(&quoted))
    };
    Ok(text.lines().filter(names).count() as u64)
}
