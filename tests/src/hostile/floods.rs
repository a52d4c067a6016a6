//! Attacks by quantity: whatever is taken must be missing to the attacker only.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;

use super::field::{ECHO, EVENTS, FAILED, Field, HBONE, SETTLE, VERDICTS};
use super::intruder::AttackReport;
use super::trial::AttackResult;
use crate::lab::Side;
use crate::process::Process;
use crate::traffic::ClientOptions;
use crate::wait;

/// Connections of a bystander that are tried during an attack.
const TRIES: u64 = 20;
/// Two descriptors each: more than the 20,000 of a process here.
const HOARD: u32 = 10_200;
/// As long as that takes on a machine that is busy with other things.
const HOLD: Duration = Duration::from_secs(600);
/// Ephemeral ports of a pod that is to run out of them.
const FEW_PORTS: &str = "30000 30999";
/// Ports that two neighbours share in the control.
const SHARED_PORTS: u16 = 16;

impl Field<'_> {
    /// Every ephemeral port of the intruder's pod is taken, so the agent cannot dial on its behalf. Success:
    /// connections of others to the same destination that fail meanwhile. The control is what nodes do that have
    /// their pods share an address: who uses its ports up takes them from the neighbours.
    pub fn exhaust_ports(&self) -> Result<AttackResult> {
        let intruder = self.lab.pod("intruder")?;
        let attack = || {
            let netns = intruder.place().netns;
            netns.sysctl(&[("ipv4/ip_local_port_range", FEW_PORTS)])?;
            let to = self.lab.pod("victim")?.v4(ECHO);
            let source = intruder.ip().to_string();
            let more = ["--source", &source, "--seconds", "600"].map(str::to_owned);
            let words = self.arguments("exhaust", to, &more);
            let exhaust = held(intruder.spawn("exhaust", "setpriv", &words)?)?;
            let mut made = self.unserved(to)?;
            exhaust.output().trim().clone_into(&mut made.met);
            drop(exhaust);
            netns.sysctl(&[("ipv4/ip_local_port_range", "32768 60999")])?;
            Ok(made)
        };
        let control = || {
            let to = self.lab.pod("plain")?.v4(ECHO);
            let node = self.lab.node(Side::A)?.place().netns;
            let [one, other] = [
                self.lab.pod("outsider")?.ip(),
                self.lab.pod("stranger")?.ip(),
            ];
            let last = 40_000 + SHARED_PORTS - 1;
            let rules = format!(
                "table ip shared {{ chain out {{ type nat hook postrouting priority srcnat;
                 ip saddr {{ {one}, {other} }} ip daddr {} tcp dport {ECHO} masquerade to :40000-{last};
                 }}
                 }}",
                to.ip()
            );
            node.feed(&["nft", "-f", "-"], &rules)?;
            let hoard = self.hold("outsider", to, u32::from(SHARED_PORTS) + 1)?;
            let made = self.attack("stranger", "speak", to, &[])?;
            drop(hoard);
            node.feed(&["nft", "-f", "-"], "delete table ip shared")?;
            Ok(made.attempts - made.succeeded)
        };
        let metric = (FAILED, ("reason", "no_source_port"));
        self.judged("exhaust_ports", metric, attack, control)
    }

    /// Connections of a bystander, of which those have succeeded for the attacker that fail. One that is slow does
    /// not: the machine may be busy with other things.
    fn unserved(&self, to: SocketAddr) -> Result<AttackReport> {
        let bystander = self.lab.pod("bystander")?;
        let made = bystander.traffic(&ClientOptions::echo(to).connections(TRIES))?;
        Ok(AttackReport {
            attempts: TRIES,
            succeeded: made.failed,
            met: format!("{} of the bystander's connections failed", made.failed),
        })
    }

    /// Connections that are opened and held.
    fn hold(&self, pod: &str, to: SocketAddr, count: u32) -> Result<Process> {
        let more = ["--attempts", &count.to_string(), "--seconds", "600"].map(str::to_owned);
        let words = self.arguments("hoard", to, &more);
        let name = format!("hoard-{}", to.port());
        held(self.lab.pod(pod)?.spawn(&name, "setpriv", &words)?)
    }

    /// More connections than the agent has descriptors for, each with an entry in the kernel's map of admitted
    /// connections. Success: connections of others that fail meanwhile.
    pub fn hoard(&self) -> Result<AttackResult> {
        let attack = || {
            let to = self.lab.pod("victim")?.v4(ECHO);
            let hoard = self.hold("intruder", to, HOARD)?;
            let mut made = self.unserved(to)?;
            made.met = format!("{} of {HOARD}, refused beyond", hoard.output().trim());
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
            let hoard = self.hold("outsider", to, 100)?;
            let made = self.attack("bystander", "speak", to, &[])?;
            drop((hoard, server));
            Ok(made.attempts - made.succeeded)
        };
        let metric = (EVENTS, ("event", "node_full"));
        self.judged("fill_maps_and_descriptors", metric, attack, control)
    }

    /// SYNs at the listeners of one pod. Success: connections of others to that pod that fail meanwhile.
    pub fn flood(&self, rounds: usize) -> Result<(AttackResult, f64)> {
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
                let made = self.unserved(victim.v4(ECHO))?;
                drop(floods);
                report.attempts += made.attempts;
                report.succeeded += made.succeeded;
                report.met = made.met;
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

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Waits until it says that it holds what it took.
fn held(mut process: Process) -> Result<Process> {
    process.until("ports or connections to be held", HOLD, |process| {
        Ok(process.output().contains("held"))
    })?;
    Ok(process)
}
