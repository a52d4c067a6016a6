//! Runs the attacks in a lab.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use super::intruder::AttackReport;
use crate::figures::Witness;
use crate::lab::{Binaries, Lab, PodHandle, PodSpec, ServiceSpec, Side, Traffic};
use crate::metrics::Metrics;
use crate::process::Process;
use crate::traffic::{ClientOptions, ServeOptions, ServerReport};
use crate::{interrupt, machine, wait};

const ECHO: u16 = 7000;
const HBONE: u16 = 15008;
const TRIES: u64 = 20;
/// Two descriptors each: more than the 20,000 of a process here.
const HOARD: u32 = 10_200;
const HOLD: Duration = Duration::from_secs(120);
const SETTLE: Duration = Duration::from_secs(10);
/// The mesh's bit, which NET_RAW can forge.
const MARK: u32 = 1 << 29;
/// What Docker and containerd leave a container.
const CAPABILITIES: &str = "--bounding-set=-all,+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,\
     +setpcap,+net_bind_service,+net_raw,+sys_chroot,+mknod,+audit_write,+setfcap";
const VERDICTS: &str = "undermesh_kernel_verdicts_total";
const EVENTS: &str = "undermesh_capture_events_total";
const FAILED: &str = "undermesh_tcp_connections_failed_total";

/// What came of one attack.
#[derive(Debug, Clone, Serialize)]
pub struct AttackResult {
    /// Its name.
    pub id: String,
    /// Tries.
    pub attempts: u64,
    /// Tries that got through.
    pub succeeded: u64,
    /// Tries that got through where there is no defence.
    pub control_succeeded: u64,
    /// The counter that shows it.
    pub metric: String,
    /// By how much it grew.
    pub metric_delta: u64,
    /// What the attacker met, or what the log calls it.
    pub log_reason: String,
}

impl AttackResult {
    /// Whether it was repelled, seen, and would have worked without the defence.
    #[must_use]
    pub fn repelled(&self) -> bool {
        self.attempts > 0
            && self.succeeded == 0
            && self.control_succeeded > 0
            && (self.metric_delta > 0 || self.metric.is_empty())
    }
}

/// All of it.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// The attacks.
    pub attacks: Vec<AttackResult>,
    /// p99 of a bystander's operations during floods, over that before: medians of runs in turn.
    pub bystander_p99_ratio: f64,
}

/// Runs all attacks; floods in `rounds` turns. With one, those that take a minute are left out.
pub fn run(
    binaries: Option<Binaries>,
    rounds: usize,
    mut report: impl FnMut(&AttackResult),
) -> Result<Outcome> {
    machine::require_root()?;
    let mut builder = Lab::builder()
        .pod(PodSpec::new("intruder").on(Side::A).strict())
        .pod(PodSpec::new("early").on(Side::A).strict())
        .pod(PodSpec::new("victim").on(Side::A).strict())
        .pod(PodSpec::new("bystander").on(Side::A).strict())
        .pod(PodSpec::new("open").on(Side::B).permissive())
        .pod(PodSpec::new("far").on(Side::B).strict())
        .pod(PodSpec::new("outsider").on(Side::A).outside())
        .pod(PodSpec::new("plain").on(Side::A).outside())
        .service(ServiceSpec::new("far").port(80, ECHO))
        .without_agents();
    if let Some(binaries) = binaries {
        builder = builder.binaries(binaries);
    }
    let lab = builder.start()?;
    let field = Field::prepare(&lab)?;
    let early = field.listen("early", field.far)?;
    lab.start_mesh()?;
    let mut attacks = Vec::new();
    let mut add = |result: Result<AttackResult>| -> Result<()> {
        interrupt::check()?;
        let result = result?;
        report(&result);
        attacks.push(result);
        Ok(())
    };
    add(field.pose_over_lo("pose_over_lo_v4", |pod| Ok(pod.ip())))?;
    add(field.pose_over_lo("pose_over_lo_v6", PodHandle::ip6))?;
    add(field.another_pods_address())?;
    add(field.dodge())?;
    add(field.join())?;
    add(field.knock())?;
    add(field.steal("bind_before_agent", early, "early"))?;
    add(field
        .listen("intruder", field.far)
        .and_then(|thief| field.steal("bind_ports", thief, "intruder")))?;
    add(field.plaintext())?;
    for (id, from) in [
        ("tunnel_without_certificate", "outsider"),
        ("tunnel_from_pod", "intruder"),
    ] {
        add(field.tunnel(id, from, "victim"))?;
    }
    add(field.tunnel("tunnel_to_itself", "intruder", "intruder"))?;
    add(field.kernel_objects())?;
    if rounds > 1 {
        add(field.hoard())?;
    }
    let (flood, ratio) = field.flood(rounds)?;
    add(Ok(flood))?;
    Ok(Outcome {
        attacks,
        bystander_p99_ratio: ratio,
    })
}

/// The lab, with an app in each pod.
struct Field<'a> {
    lab: &'a Lab,
    program: String,
    traffic: String,
    far: SocketAddr,
    _servers: Vec<Traffic<ServerReport>>,
}

impl<'a> Field<'a> {
    fn prepare(lab: &'a Lab) -> Result<Self> {
        let mut servers = Vec::new();
        for name in ["intruder", "victim", "open", "far", "outsider", "plain"] {
            servers.push(lab.pod(name)?.serve(ServeOptions::new().echo(ECHO))?);
        }
        // The ways that the mesh lays in its pods, without its programs: what a forged mark could do.
        let outsider = lab.pod("outsider")?.place().netns;
        // A deferred connect needs no cookie then: SYN and data go with the first write.
        for name in ["intruder", "outsider"] {
            let netns = lab.pod(name)?.place().netns;
            netns.sysctl(&[("ipv4/tcp_fastopen", "5")])?;
        }
        outsider.sysctl(&[
            ("ipv4/tcp_fwmark_accept", "1"),
            ("ipv4/fwmark_reflect", "1"),
            ("ipv6/fwmark_reflect", "1"),
        ])?;
        let pod = lab.pod("outsider")?;
        let mut lines = Vec::new();
        for (family, own) in [("-4", pod.ip()), ("-6", pod.ip6()?)] {
            for (command, line) in [
                (
                    "rule",
                    format!("add pref 1 fwmark {MARK}/{MARK} lookup 100"),
                ),
                ("rule", "add pref 2 lookup local".to_owned()),
                ("rule", "del pref 0".to_owned()),
                (
                    "route",
                    format!("add local default dev lo src {own} table 100"),
                ),
            ] {
                lines.push((family, format!("{command} {line}")));
            }
        }
        for (family, line) in lines {
            let words: Vec<&str> = std::iter::once(family).chain(line.split(' ')).collect();
            pod.run("ip", &words)?;
        }
        // SYNs of a flood must find nobody who resets them.
        let node = lab.node(Side::A)?.place().netns;
        node.ip(&["route add blackhole 198.18.0.0/15".to_owned()])?;
        let plain = lab.pod("plain")?.place().netns;
        plain.sysctl(&[
            ("ipv4/tcp_syncookies", "0"),
            ("ipv4/tcp_max_syn_backlog", "16"),
        ])?;
        let program = lab.state().binaries.traffic;
        Ok(Self {
            program: program
                .with_file_name("undermesh-connects")
                .display()
                .to_string(),
            traffic: program.display().to_string(),
            far: lab.service("far", 80)?,
            lab,
            _servers: servers,
        })
    }

    fn arguments(&self, attack: &str, to: SocketAddr, more: &[String]) -> Vec<String> {
        let to = to.to_string();
        let fixed = [
            CAPABILITIES,
            &self.program,
            "attack",
            "--attack",
            attack,
            "--to",
            &to,
        ];
        let fixed = fixed.iter().map(|&word| word.to_owned());
        fixed.chain(more.iter().cloned()).collect()
    }

    fn attack(
        &self,
        pod: &str,
        attack: &str,
        to: SocketAddr,
        more: &[String],
    ) -> Result<AttackReport> {
        let output = self
            .lab
            .pod(pod)?
            .run("setpriv", &self.arguments(attack, to, more))?;
        report_in(&output).with_context(|| format!("{attack} in {pod}: {output}"))
    }

    fn listen(&self, pod: &str, at: SocketAddr) -> Result<Process> {
        let more = ["--seconds".to_owned(), "600".to_owned()];
        let arguments = self.arguments("listen", at, &more);
        let name = format!("thief-{}", std::process::id());
        let mut process = self.lab.pod(pod)?.spawn(&name, "setpriv", &arguments)?;
        process.until("sockets to listen", SETTLE, |process| {
            Ok(process.output().contains("listening"))
        })?;
        Ok(process)
    }

    fn count(&self, name: &str, label: (&str, &str)) -> Result<u64> {
        let metrics = self.lab.node(Side::A)?.agent().metrics()?;
        Ok(Metrics::parse(&metrics).count(name, &[label]))
    }

    /// Runs `attack` and `control`, and sees by how much the counter grew during the first.
    fn judged(
        &self,
        id: &str,
        metric: (&str, (&str, &str)),
        attack: impl FnOnce() -> Result<AttackReport>,
        control: impl FnOnce() -> Result<u64>,
    ) -> Result<AttackResult> {
        let (name, label) = metric;
        let before = self.count(name, label)?;
        let report = attack().with_context(|| id.to_owned())?;
        let grown = || Ok(self.count(name, label)?.saturating_sub(before));
        // It follows the end of a connection by a moment. What stays out shows below.
        let _ = wait::until_true("the counter", SETTLE, || grown().map(|by: u64| by > 0));
        interrupt::check()?;
        let metric_delta = grown()?;
        Ok(AttackResult {
            id: id.to_owned(),
            attempts: report.attempts,
            succeeded: report.succeeded,
            control_succeeded: control().with_context(|| format!("control of {id}"))?,
            metric: format!("{name}{{{}=\"{}\"}}", label.0, label.1),
            metric_delta,
            log_reason: report.met,
        })
    }

    /// To a neighbour container of the same pod, as somebody else.
    fn pose_over_lo(
        &self,
        id: &str,
        address: impl Fn(&PodHandle) -> Result<IpAddr>,
    ) -> Result<AttackResult> {
        let source = address(&self.lab.pod("victim")?)?;
        let more = posing(source);
        let from = |pod: &str| {
            let to = address(&self.lab.pod(pod)?)?;
            self.attack(pod, "pose", (to, ECHO).into(), &more)
        };
        let metric = (VERDICTS, ("verdict", "connect_foreign_source_refused"));
        self.judged(
            id,
            metric,
            || from("intruder"),
            || Ok(from("outsider")?.succeeded),
        )
    }

    /// To the mesh, with the address of another pod.
    fn another_pods_address(&self) -> Result<AttackResult> {
        let source = self.lab.pod("victim")?.ip();
        let more = ["--source".to_owned(), source.to_string()];
        let control = || {
            let own = self.lab.pod("outsider")?.v4(ECHO);
            Ok(self
                .attack("outsider", "pose", own, &posing(source))?
                .succeeded)
        };
        let metric = (EVENTS, ("event", "role_mismatch"));
        let attack = || self.attack("intruder", "pose", self.far, &more);
        self.judged("another_pods_address", metric, attack, control)
    }

    /// Past the agent to a pod that takes plaintext: counted by the agent of that pod.
    fn dodge(&self) -> Result<AttackResult> {
        let to = self.lab.pod("open")?.v4(ECHO);
        let plaintext = |pod: &str, attack: &str| -> Result<AttackReport> {
            let witness = Witness::start(self.lab)?;
            let made = self.attack(pod, attack, to, &[])?;
            let seen = witness.until("connections", |seen| seen.inbound >= made.succeeded)?;
            Ok(AttackReport {
                succeeded: seen.inbound_plaintext,
                ..made
            })
        };
        let metric = (VERDICTS, ("verdict", "mark_restored"));
        let attack = || plaintext("intruder", "dodge");
        let control = || Ok(plaintext("outsider", "dodge")?.succeeded);
        self.judged("changed_mark_and_device", metric, attack, control)
    }

    /// The outsider's own listeners allow what the agent's must not.
    fn join(&self) -> Result<AttackResult> {
        let listening = self.listen("outsider", self.far)?;
        let join = |pod: &str| self.attack(pod, "join", self.far, &[]);
        let control = || Ok(join("outsider")?.succeeded);
        let mut result = self.judged(
            "join_listener",
            (VERDICTS, ("verdict", "connect_captured")),
            || join("intruder"),
            control,
        )?;
        // bind(2) itself is refused: there is nothing to count.
        result.metric.clear();
        result.metric_delta = 0;
        drop(listening);
        Ok(result)
    }

    fn knock(&self) -> Result<AttackResult> {
        let listening = self.listen("outsider", self.far)?;
        let more = ["--mark".to_owned(), MARK.to_string()];
        let knock = |pod: &str| self.attack(pod, "knock", self.far, &more);
        let metric = (EVENTS, ("event", "role_mismatch"));
        let control = || Ok(knock("outsider")?.succeeded);
        let result = self.judged("agents_listeners", metric, || knock("intruder"), control)?;
        drop(listening);
        Ok(result)
    }

    /// What is for the agent of a pod where somebody else listens on everything.
    fn steal(&self, id: &str, mut thief: Process, pod: &str) -> Result<AttackResult> {
        let control = || {
            let mut thief = self.listen("outsider", self.far)?;
            let more = ["--mark".to_owned(), MARK.to_string()];
            self.attack("outsider", "pose", self.far, &more)
                .map(|report| {
                    let _ = thief.signal(nix::sys::signal::Signal::SIGKILL);
                    let _ = thief.wait(SETTLE);
                    report.succeeded
                })
        };
        let attack = || {
            // Right answers come from the server only; the thief's line is the same, so it is told apart
            // by what the server counted.
            let witness = Witness::start(self.lab)?;
            let made = self.attack(pod, "speak", self.far, &[])?;
            let seen = witness.until("connections", |seen| seen.outbound >= made.attempts)?;
            let tunnels = self.attack("outsider", "tunnel", self.lab.pod(pod)?.v4(HBONE), &[])?;
            Ok(AttackReport {
                attempts: made.attempts + tunnels.attempts,
                succeeded: made.attempts.saturating_sub(seen.outbound) + tunnels.succeeded,
                met: tunnels.met,
            })
        };
        let metric = (VERDICTS, ("verdict", "lookup_outbound"));
        let result = self.judged(id, metric, attack, control);
        thief.signal(nix::sys::signal::Signal::SIGKILL)?;
        thief.wait(SETTLE)?;
        result
    }

    fn plaintext(&self) -> Result<AttackResult> {
        let speak = |to: &str| self.attack("outsider", "speak", self.lab.pod(to)?.v4(ECHO), &[]);
        let metric = (FAILED, ("reason", "plaintext_refused"));
        let control = || Ok(speak("plain")?.succeeded);
        self.judged("plaintext_to_strict", metric, || speak("victim"), control)
    }

    fn tunnel(&self, id: &str, from: &str, to: &str) -> Result<AttackResult> {
        let tunnel =
            |from: &str, to: &str| self.attack(from, "tunnel", self.lab.pod(to)?.v4(HBONE), &[]);
        let metric = match (from, to) {
            ("outsider", _) => (VERDICTS, ("verdict", "lookup_hbone")),
            (from, to) if from == to => (VERDICTS, ("verdict", "connect_own_address")),
            _ => (VERDICTS, ("verdict", "connect_captured")),
        };
        let listening = self.listen("plain", self.lab.pod("plain")?.v4(80))?;
        let control = || Ok(tunnel("outsider", "plain")?.succeeded);
        let result = self.judged(id, metric, || tunnel(from, to), control);
        drop(listening);
        result
    }

    /// bpf(2) and bpffs, from a mount namespace without the node's directories, as a container has it. With
    /// all capabilities, which is the control, the same commands work.
    fn kernel_objects(&self) -> Result<AttackResult> {
        // BPF_PROG_GET_NEXT_ID, BPF_MAP_GET_NEXT_ID and BPF_LINK_GET_NEXT_ID: no safe crate has them bare.
        const LOOK: &str = "import ctypes,os,sys
libc=ctypes.CDLL(None,use_errno=True)
got=0
met=''
for command in (11,12,31):
    attr=ctypes.create_string_buffer(128)
    got+=libc.syscall(321 if os.uname().machine=='x86_64' else 280,command,attr,128)==0
    met=os.strerror(ctypes.get_errno())
os.makedirs('/run/b',exist_ok=True)
got+=libc.mount(b'bpf',b'/run/b',b'bpf',0,None)==0
print(got,met)";
        let tried = |lead: &[&str]| -> Result<(u64, String)> {
            let hidden = [
                "--mount",
                "sh",
                "-c",
                "mount -t tmpfs none /run && exec \"$@\"",
                "sh",
            ];
            let words: Vec<&str> = hidden.iter().chain(lead).copied().collect();
            let words = [words, vec!["/usr/bin/env", "python3", "-c", LOOK]].concat();
            let output = self.lab.pod("intruder")?.run("unshare", &words)?;
            let (count, met) = output.trim().split_once(' ').unwrap_or((output.trim(), ""));
            let count = count.parse().with_context(|| output.clone())?;
            Ok((count, met.to_owned()))
        };
        let (succeeded, log_reason) = tried(&["setpriv", CAPABILITIES])?;
        let (control_succeeded, _) = tried(&[])?;
        Ok(AttackResult {
            id: "kernel_objects".to_owned(),
            attempts: 4,
            succeeded,
            control_succeeded,
            metric: String::new(),
            metric_delta: 0,
            log_reason,
        })
    }

    /// More connections than the agent has descriptors for, each with an entry in the kernel's map of admitted
    /// connections. Success: connections of others that fail meanwhile.
    fn hoard(&self) -> Result<AttackResult> {
        let hold = |to: SocketAddr, count: u32| -> Result<Process> {
            let more = ["--attempts", &count.to_string(), "--seconds", "600"];
            let arguments = self.arguments("hoard", to, &more.map(str::to_owned));
            let pod = if count == HOARD {
                "intruder"
            } else {
                "outsider"
            };
            let mut process = self.lab.pod(pod)?.spawn("hoard", "setpriv", &arguments)?;
            process.until("connections to be held", HOLD, |process| {
                Ok(process.output().contains("held"))
            })?;
            Ok(process)
        };
        let bystanders = |to: SocketAddr| self.attack("bystander", "speak", to, &[]);
        let attack = || {
            let to = self.lab.pod("victim")?.v4(ECHO);
            let hoard = hold(to, HOARD)?;
            let mut made = bystanders(to)?;
            let failed = made.attempts - made.succeeded;
            made.met = format!("{} of {HOARD}, refused beyond", hoard.output().trim());
            made.succeeded = failed;
            Ok(made)
        };
        let control = || {
            let plain = self.lab.pod("plain")?;
            let serve = ["--nofile=64:64", &self.traffic, "serve", "--echo", "7100"];
            let server = plain.spawn("small", "prlimit", &serve)?;
            let to = plain.v4(7100);
            wait::until_true("the small server", SETTLE, || {
                Ok(self.attack("outsider", "speak", to, &[])?.succeeded > 0)
            })?;
            let hoard = hold(to, 100)?;
            let made = bystanders(to)?;
            drop((hoard, server));
            Ok(made.attempts - made.succeeded)
        };
        let metric = (EVENTS, ("event", "node_full"));
        self.judged("fill_maps_and_descriptors", metric, attack, control)
    }

    /// SYNs at the listeners of one pod. Success: connections of others to that pod that fail meanwhile.
    fn flood(&self, rounds: usize) -> Result<(AttackResult, f64)> {
        let victim = self.lab.pod("victim")?;
        let seconds = ["--seconds".to_owned(), "600".to_owned()];
        let bystander = self.lab.pod("bystander")?;
        let p99 = || -> Result<f64> {
            let options = ClientOptions::echo(self.far)
                .connections(300)
                .concurrency(2);
            Ok(bystander.traffic(&options)?.operation.p99)
        };
        let start = |to: SocketAddr, name: &str| {
            let arguments = self.arguments("flood", to, &seconds);
            self.lab.pod("outsider")?.spawn(name, "setpriv", &arguments)
        };
        let (mut calm, mut flooded) = (Vec::new(), Vec::new());
        let attack = || -> Result<AttackReport> {
            let mut report = AttackReport::default();
            for round in 0..rounds {
                calm.push(p99()?);
                let floods = [
                    start(victim.v4(ECHO), &format!("flood-app-{round}"))?,
                    start(victim.v4(HBONE), &format!("flood-hbone-{round}"))?,
                ];
                flooded.push(p99()?);
                let made =
                    bystander.traffic(&ClientOptions::echo(victim.v4(ECHO)).connections(TRIES))?;
                drop(floods);
                report.attempts += TRIES;
                report.succeeded += made.failed;
                report.met = format!("{} of the bystander's connections failed", made.failed);
            }
            Ok(report)
        };
        let control = || {
            let plain = self.lab.pod("plain")?.v4(ECHO);
            let flood = start(plain, "flood-plain")?;
            wait::pause(Duration::from_secs(1))?;
            // Not from where the server has known a peer before: it would be preferred.
            let made = self.attack("bystander", "speak", plain, &[])?;
            drop(flood);
            Ok(made.attempts - made.succeeded)
        };
        let metric = (VERDICTS, ("verdict", "lookup_inbound"));
        let result = self.judged("syn_flood", metric, attack, control)?;
        Ok((result, median(&mut flooded) / median(&mut calm)))
    }
}

fn posing(source: IpAddr) -> Vec<String> {
    [
        "--source",
        &source.to_string(),
        "--mark",
        &MARK.to_string(),
        "--device",
        "lo",
    ]
    .map(str::to_owned)
    .to_vec()
}

fn report_in(output: &str) -> Result<AttackReport> {
    let line = output.lines().rev().find(|line| line.starts_with('{'));
    Ok(serde_json::from_str(line.context("no report")?)?)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
