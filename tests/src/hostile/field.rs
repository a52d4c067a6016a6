//! The lab that attacks run in: pods of the mesh and pods beside it.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};

use super::intruder::AttackReport;
use super::trial::AttackResult;
use crate::lab::{Binaries, Lab, PodHandle, PodSpec, ServiceSpec, Side, Traffic};
use crate::metrics::Metrics;
use crate::process::Process;
use crate::tls::{Issuer, certificate};
use crate::traffic::{ServeOptions, ServerReport};
use crate::{interrupt, wait};

/// Port of the echo server in every pod.
pub(super) const ECHO: u16 = 7000;
pub(super) const HBONE: u16 = 15008;
pub(super) const SETTLE: Duration = Duration::from_secs(10);
/// The mesh's bit, which NET_RAW can forge.
pub(super) const MARK: u32 = 1 << 29;
/// What Docker and containerd leave a container.
pub(super) const CAPABILITIES: &str = "--bounding-set=-all,+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,\
     +setpcap,+net_bind_service,+net_raw,+sys_chroot,+mknod,+audit_write,+setfcap";
/// Verdicts of the kernel programs.
pub(super) const VERDICTS: &str = "undermesh_kernel_verdicts_total";
/// Events of the agent's side of capture.
pub(super) const EVENTS: &str = "undermesh_capture_events_total";
/// Connections that the mesh refused or ended.
pub(super) const FAILED: &str = "undermesh_tcp_connections_failed_total";

/// The lab, with an app in each pod.
pub(super) struct Field<'a> {
    pub lab: &'a Lab,
    program: String,
    pub traffic: String,
    /// A Service of the mesh whose pod is on the other node.
    pub far: SocketAddr,
    _servers: Vec<Traffic<ServerReport>>,
}

impl<'a> Field<'a> {
    /// Pods of all kinds, without agents.
    pub fn lab(binaries: Option<Binaries>) -> Result<Lab> {
        let mut builder = Lab::builder()
            .pod(PodSpec::new("intruder").on(Side::A).strict())
            .pod(PodSpec::new("early").on(Side::A).strict())
            .pod(PodSpec::new("victim").on(Side::A).strict())
            .pod(PodSpec::new("bystander").on(Side::A).strict())
            .pod(PodSpec::new("mortal").on(Side::A).strict())
            .pod(PodSpec::new("open").on(Side::B).permissive())
            .pod(PodSpec::new("far").on(Side::B).strict())
            .pod(PodSpec::new("outsider").on(Side::A).outside())
            .pod(PodSpec::new("stranger").on(Side::A).outside())
            .pod(PodSpec::new("plain").on(Side::A).outside())
            .service(ServiceSpec::new("far").port(80, ECHO))
            .service(ServiceSpec::new("mortal").port(80, ECHO))
            .without_agents();
        if let Some(binaries) = binaries {
            builder = builder.binaries(binaries);
        }
        builder.start()
    }

    /// Serves in every pod, and lays in the outsider what the mesh lays in its pods.
    pub fn prepare(lab: &'a Lab) -> Result<Self> {
        let mut servers = Vec::new();
        for name in [
            "intruder", "victim", "open", "far", "mortal", "outsider", "plain",
        ] {
            servers.push(lab.pod(name)?.serve(ServeOptions::new().echo(ECHO))?);
        }
        // A deferred connect needs no cookie then: SYN and data go with the first write.
        for name in ["intruder", "outsider"] {
            let netns = lab.pod(name)?.place().netns;
            netns.sysctl(&[("ipv4/tcp_fastopen", "5")])?;
        }
        lay_ways(&lab.pod("outsider")?)?;
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

    /// In the outsider's directory: one as the mesh's CA makes them, and one of the intruder's own making, both for
    /// the bystander.
    pub fn prepare_certificates(&self) -> Result<()> {
        let root = self.lab.authority().root_file();
        let key = root.with_file_name("ca-key.pem");
        let own = "spiffe://cluster.local/ns/default/sa/bystander";
        let dir = self.lab.pod("outsider")?.place().dir;
        certificate(&dir, "true", own, Issuer::Authority(&root, &key))?;
        certificate(&dir, "self-made", own, Issuer::Itself)
    }

    /// Arguments of setpriv(1).
    pub fn arguments(&self, attack: &str, to: SocketAddr, more: &[String]) -> Vec<String> {
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

    /// Attacks from a pod, to the end, with no more than a container's capabilities.
    pub fn attack(
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

    /// Somebody who listens where the agent does.
    pub fn listen(&self, pod: &str, at: SocketAddr) -> Result<Process> {
        let more = ["--seconds".to_owned(), "600".to_owned()];
        let arguments = self.arguments("listen", at, &more);
        let name = format!("thief-{}", std::process::id());
        let mut process = self.lab.pod(pod)?.spawn(&name, "setpriv", &arguments)?;
        process.until("sockets to listen", SETTLE, |process| {
            Ok(process.output().contains("listening"))
        })?;
        Ok(process)
    }

    /// What node A's agent counted so far.
    pub fn count(&self, name: &str, label: (&str, &str)) -> Result<u64> {
        let metrics = self.lab.node(Side::A)?.agent().metrics()?;
        Ok(Metrics::parse(&metrics).count(name, &[label]))
    }

    /// Runs `attack` and `control`, and sees by how much the counter grew during the first.
    pub fn judged(
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
            passed_until_repair: None,
        })
    }
}

/// The ways that the mesh lays in its pods, without its programs: what a forged mark could do.
pub(super) fn lay_ways(pod: &PodHandle) -> Result<()> {
    pod.place().netns.sysctl(&[
        ("ipv4/tcp_fwmark_accept", "1"),
        ("ipv4/fwmark_reflect", "1"),
        ("ipv6/fwmark_reflect", "1"),
    ])?;
    for (family, own) in [("-4", pod.ip()), ("-6", pod.ip6()?)] {
        for line in [
            format!("rule add pref 1 fwmark {MARK}/{MARK} lookup 100"),
            "rule add pref 2 lookup local".to_owned(),
            "rule del pref 0".to_owned(),
            format!("route add local default dev lo src {own} table 100"),
        ] {
            let words: Vec<&str> = std::iter::once(family).chain(line.split(' ')).collect();
            pod.run("ip", &words)?;
        }
    }
    Ok(())
}

fn report_in(output: &str) -> Result<AttackReport> {
    let line = output.lines().rev().find(|line| line.starts_with('{'));
    Ok(serde_json::from_str(line.context("no report")?)?)
}
