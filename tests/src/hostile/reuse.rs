//! An address that comes back at once: what is meant for the old pod, and what the new one says.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::field::{ECHO, FAILED, Field, SETTLE};
use super::trial::AttackResult;
use crate::lab::{PodSpec, Side};
use crate::metrics::Metrics;
use crate::traffic::{ClientOptions, ServeOptions, ServerReport};
use crate::wait;

/// So long the agents know only of the old pod. An API server that is busy takes as long.
const STALE: Duration = Duration::from_millis(1500);
/// Connections that the old pod and the new one make.
const TRIES: u64 = 20;
const OPENED: &str = "undermesh_tcp_connections_opened_total";
const OLD: &str = "spiffe://cluster.local/ns/default/sa/mortal";

impl Field<'_> {
    /// A pod dies, and another gets its address before anybody was told. Two results: `reused_address`, connections
    /// from both nodes to the old pod's Service that reach the new pod; and `reused_identity`, connections of the
    /// new pod that anybody takes for the old one's. The controls are, of the first, a client and a Service
    /// without a mesh between them, in the same moment; of the second, connections that the old pod itself made.
    pub fn reused_address(&self) -> Result<[AttackResult; 2]> {
        let service = self.lab.service("mortal", 80)?;
        let mortal = self.lab.pod("mortal")?;
        let (near, far) = (self.lab.pod("bystander")?, self.lab.pod("far")?);
        let before_all = self.taken_for_the_old()?;
        mortal.traffic(&ClientOptions::echo(self.far).connections(TRIES))?;
        let old = || -> Result<u64> { Ok(self.taken_for_the_old()?.saturating_sub(before_all)) };
        wait::until_true("the old pod to be known", SETTLE, || Ok(old()? >= TRIES))?;
        let known = old()?;

        // Tunnels and all else that may be kept are warm, and go on through the change.
        let steady = ClientOptions::echo(service)
            .during(STALE * 3)
            .pause(Duration::from_millis(5))
            .timeout(Duration::from_millis(500));
        let clients = [near.start_traffic(&steady)?, far.start_traffic(&steady)?];
        wait::until_true("connections to the old pod", SETTLE, || {
            let [near, far] = &clients;
            Ok(near.report()?.ok > TRIES && far.report()?.ok > TRIES)
        })?;
        let refused = (FAILED, ("direction", "outbound"));
        let denied = (FAILED, ("reason", "plaintext_refused"));
        let refused_before = self.count(refused.0, refused.1)?;
        let denied_before = self.count(denied.0, denied.1)?;
        let heir = PodSpec::new("heir").on(Side::A).strict();
        let (server, gap, reached, control, native) =
            self.lab.replace_pod("mortal", &heir, |heir, gap| {
                let server = heir.serve(ServeOptions::new().echo(ECHO))?;
                wait::pause(STALE)?;
                // It is in the mesh for nobody yet, and all it has is the address.
                let strict = self.lab.pod("victim")?.v4(ECHO);
                let native = heir.traffic(&ClientOptions::echo(strict).connections(TRIES))?;
                let reached = heard(&server.report()?);
                let stranger = self.lab.pod("stranger")?;
                let control = stranger.traffic(&ClientOptions::echo(service).connections(TRIES))?;
                Ok((server, gap, reached, control.ok, native))
            })?;
        let heir = self.lab.pod("heir")?;
        self.lab.wait_enrolled(&heir)?;
        let enrolled = heir.traffic(&ClientOptions::echo(self.far).connections(TRIES))?;
        ensure!(
            enrolled.ok == TRIES,
            "the new pod is no pod of the mesh: {enrolled:?}"
        );
        let mut failed = 0;
        for client in clients {
            failed += client.finish(STALE * 4)?.failed;
        }
        // Those of strangers were the control. The new pod is no endpoint of the Service at any time.
        let reached = reached + heard(&server.report()?).saturating_sub(reached + control);
        // What was counted late would show by now: the new pod's own connections were counted after them.
        wait::until_true("the new pod's connections", SETTLE, || {
            Ok(self.opened("heir")? >= TRIES)
        })?;
        let taken = old()?.saturating_sub(known);
        let delta = |(name, label), before: u64| -> Result<u64> {
            Ok(self.count(name, label)?.saturating_sub(before))
        };
        let shown =
            |(name, label): (&str, (&str, &str))| format!("{name}{{{}=\"{}\"}}", label.0, label.1);
        Ok([
            AttackResult {
                id: "reused_address".to_owned(),
                attempts: failed + reached,
                succeeded: reached,
                control_succeeded: control,
                metric: shown(refused),
                metric_delta: delta(refused, refused_before)?,
                log_reason: format!("it was the new pod's within {} ms", gap.as_millis()),
                passed_until_repair: None,
            },
            AttackResult {
                id: "reused_identity".to_owned(),
                attempts: native.attempted + enrolled.attempted,
                succeeded: native.ok + taken,
                control_succeeded: known,
                metric: shown(denied),
                metric_delta: delta(denied, denied_before)?,
                log_reason: native.examples.first().cloned().unwrap_or_default(),
                passed_until_repair: None,
            },
        ])
    }

    /// Connections that either agent counted as the old pod's.
    fn taken_for_the_old(&self) -> Result<u64> {
        self.on_both(&[("source_principal", OLD)])
    }

    fn opened(&self, workload: &str) -> Result<u64> {
        self.on_both(&[("source_workload", workload)])
    }

    fn on_both(&self, labels: &[(&str, &str)]) -> Result<u64> {
        let mut sum = 0;
        for side in Side::ALL {
            let metrics = self.lab.node(side)?.agent().metrics()?;
            sum += Metrics::parse(&metrics).count(OPENED, labels);
        }
        Ok(sum)
    }
}

/// Connections of which a server heard anything. One without a byte is no harm: whoever has an address can be
/// connected to, and is told nothing before it has proven who it is.
fn heard(report: &ServerReport) -> u64 {
    report.completed.max(u64::from(report.bytes_received > 0))
}
