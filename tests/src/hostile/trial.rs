//! Runs the attacks in a lab, in their order.

use anyhow::Result;
use serde::Serialize;

use super::field::Field;
use crate::lab::{Binaries, PodHandle};
use crate::{interrupt, machine};

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
    /// Of an attack with NET_ADMIN, which may cut its own pod off: connections that passed by until that was
    /// repaired. Those that pass afterwards have succeeded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub passed_until_repair: Option<u64>,
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
    machine::require(&[machine::OPENSSL, machine::NFT])?;
    let lab = Field::lab(binaries)?;
    let field = Field::prepare(&lab)?;
    let early = field.listen("early", field.far)?;
    lab.start_mesh()?;
    field.prepare_certificates()?;
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
    add(field.forged_packets_over_lo())?;
    add(field.forged_packets())?;
    add(field.dodge())?;
    add(field.join())?;
    add(field.knock())?;
    add(field.steal("bind_before_agent", early, "early"))?;
    add(field
        .listen("intruder", field.far)
        .and_then(|thief| field.steal("bind_ports", thief, "intruder")))?;
    add(field.plaintext())?;
    for (id, from) in [
        ("tunnel_without_tls", "outsider"),
        ("tunnel_without_tls_from_pod", "intruder"),
    ] {
        add(field.tunnel(id, from, "victim"))?;
    }
    add(field.tunnel("tunnel_without_tls_to_itself", "intruder", "intruder"))?;
    add(field.tls_to_others("tls_without_certificate", None))?;
    add(field.tls_to_others("tls_with_self_made_certificate", Some("self-made")))?;
    add(field.tls_from_pod("tls_from_pod", "victim"))?;
    add(field.tls_from_pod("tls_to_itself", "intruder"))?;
    add(field.kernel_objects())?;
    add(field.pins())?;
    for result in field.reused_address()? {
        add(Ok(result))?;
    }
    add(field.dead_pods_address())?;
    add(field.exhaust_ports())?;
    if rounds > 1 {
        add(field.hoard())?;
    }
    let (flood, ratio) = field.flood(rounds)?;
    add(Ok(flood))?;
    // Last: it takes away the ways that others need.
    add(field.cut_itself_off())?;
    Ok(Outcome {
        attacks,
        bystander_p99_ratio: ratio,
    })
}
