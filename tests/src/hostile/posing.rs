//! Attacks by posing as somebody else, or as nobody.

use std::net::IpAddr;

use anyhow::Result;

use super::field::{ECHO, EVENTS, FAILED, Field, MARK, VERDICTS};
use super::intruder::AttackReport;
use super::trial::AttackResult;
use crate::figures::Witness;
use crate::lab::{PodHandle, PodSpec, Side};

/// A source that nobody has. The node drops what goes there, so nobody resets what is forged from it.
const NOBODY: &str = "198.18.0.9";

impl Field<'_> {
    /// To a neighbour container of the same pod, as somebody else.
    pub fn pose_over_lo(
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
    pub fn another_pods_address(&self) -> Result<AttackResult> {
        self.somebodys_address("another_pods_address", self.lab.pod("victim")?.ip())
    }

    fn somebodys_address(&self, id: &str, source: IpAddr) -> Result<AttackResult> {
        let more = ["--source".to_owned(), source.to_string()];
        let control = || {
            let own = self.lab.pod("outsider")?.v4(ECHO);
            Ok(self
                .attack("outsider", "pose", own, &posing(source))?
                .succeeded)
        };
        let metric = (EVENTS, ("event", "role_mismatch"));
        let attack = || self.attack("intruder", "pose", self.far, &more);
        self.judged(id, metric, attack, control)
    }

    /// Past the agent to a pod that takes plaintext: counted by the agent of that pod.
    pub fn dodge(&self) -> Result<AttackResult> {
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

    /// Handshakes out of raw packets over lo, to an app of the own pod, as somebody who is not there.
    pub fn forged_packets_over_lo(&self) -> Result<AttackResult> {
        let metric = (VERDICTS, ("verdict", "lookup_foreign_source_refused"));
        self.forged("forged_packets_over_lo", metric, &["--device", "lo"])
    }

    /// The same over whatever way the packets take: they seem to come from the network, and are plaintext.
    pub fn forged_packets(&self) -> Result<AttackResult> {
        let metric = (FAILED, ("reason", "plaintext_refused"));
        self.forged("forged_packets", metric, &[])
    }

    fn forged(
        &self,
        id: &str,
        metric: (&str, (&str, &str)),
        more: &[&str],
    ) -> Result<AttackResult> {
        let words = [&["--source", NOBODY], more].concat();
        let words: Vec<String> = words.into_iter().map(str::to_owned).collect();
        let from = |pod: &str| self.attack(pod, "forge", self.lab.pod(pod)?.v4(ECHO), &words);
        let control = || Ok(from("outsider")?.succeeded);
        self.judged(id, metric, || from("intruder"), control)
    }

    /// To the mesh, with the address of a pod that is gone.
    pub fn dead_pods_address(&self) -> Result<AttackResult> {
        let ghost = self
            .lab
            .add_pod(&PodSpec::new("ghost").on(Side::A).strict())?;
        let source = ghost.ip();
        self.lab.wait_enrolled(&ghost)?;
        self.lab.remove_pod("ghost")?;
        self.somebodys_address("dead_pods_address", source)
    }
}

/// Arguments that pose as that one, where a marked connection would be delivered.
pub(super) fn posing(source: IpAddr) -> Vec<String> {
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
