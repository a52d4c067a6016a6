//! What a pod with NET_ADMIN can do, which containers do not have by default: it owns its network, so it can cut
//! itself off. That must be noticed, said and mended.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::field::{ECHO, EVENTS, Field};
use super::trial::AttackResult;
use crate::figures::Witness;
use crate::lab::{PodHandle, Side};
use crate::{interrupt, wait};

/// Verification is due every 5 s, spread by a fifth, and takes two probes; a busy machine gets as much again.
const NOTICED: Duration = Duration::from_secs(15);
const REPAIRED: (&str, &str) = ("event", "repaired");
const FAMILIES: [&str; 2] = ["-4", "-6"];
/// Connections that are tried once it is said to be repaired.
const AFTERWARDS: &str = "50";

impl Field<'_> {
    /// The intruder deletes the rules and routes that capture it, and connects to a pod that takes plaintext. What
    /// comes out there until the repair is counted apart; afterwards nothing may. The control is a pod with the
    /// same rules and no agent: they stay away.
    pub fn cut_itself_off(&self) -> Result<AttackResult> {
        let (intruder, outsider) = (self.lab.pod("intruder")?, self.lab.pod("outsider")?);
        let to = self.lab.pod("open")?.v4(ECHO);
        let (name, label) = (EVENTS, REPAIRED);
        ensure!(!rules(&outsider, "-4")?.is_empty(), "nothing to cut off");
        let (said, counted) = (self.said()?, self.count(name, label)?);
        let witness = Witness::start(self.lab)?;
        cut(&intruder)?;
        cut(&outsider)?;
        let start = Instant::now();
        let (mut attempts, mut answered) = (0, 0);
        let noticed = loop {
            let made = self.attack("intruder", "speak", to, &["--attempts".into(), "1".into()])?;
            attempts += made.attempts;
            answered += made.succeeded;
            if self.said()? > said {
                break true;
            }
            if start.elapsed() > NOTICED {
                break false;
            }
            interrupt::check()?;
            wait::pause(Duration::from_millis(20))?;
        };
        let after = start.elapsed();
        // The last of them may be answered by the app before the other agent has counted it.
        let seen = witness.until("connections", |seen| seen.inbound >= answered)?;
        let passed = seen.inbound_plaintext;
        let witness = Witness::start(self.lab)?;
        let made = self.attack(
            "intruder",
            "speak",
            to,
            &["--attempts".into(), AFTERWARDS.into()],
        )?;
        let seen = witness.until("connections", |seen| seen.inbound >= made.succeeded)?;
        let mut control_succeeded = 0;
        for family in FAMILIES {
            control_succeeded += u64::from(rules(&outsider, family)?.is_empty());
        }
        let state = if noticed { "repaired" } else { "not noticed" };
        Ok(AttackResult {
            id: "net_admin_cuts_itself_off".to_owned(),
            attempts: attempts + made.attempts,
            succeeded: seen.inbound_plaintext + u64::from(!noticed),
            control_succeeded,
            metric: format!("{name}{{{}=\"{}\"}}", label.0, label.1),
            metric_delta: self.count(name, label)?.saturating_sub(counted),
            log_reason: format!("{state} after {:.1} s", after.as_secs_f64()),
            passed_until_repair: Some(passed),
        })
    }

    /// How much `/pods` says was repaired for the intruder.
    fn said(&self) -> Result<u64> {
        let pods = self.lab.node(Side::A)?.agent().admin("/pods")?;
        let mut pods = pods.as_array().context("/pods is no list")?.iter();
        let own = pods.find(|pod| pod["name"] == "default/intruder");
        own.and_then(|pod| pod["repaired"].as_u64())
            .context("/pods does not say what was repaired")
    }
}

/// By rules as `ip` shows them: whatever asks for a mark, and the table that it leads to.
fn cut(pod: &PodHandle) -> Result<()> {
    for family in FAMILIES {
        for rule in rules(pod, family)? {
            let priority = rule["priority"].to_string();
            let table = rule["table"].as_str().unwrap_or_default().to_owned();
            pod.run("ip", &[family, "rule", "del", "pref", &priority])?;
            pod.run("ip", &[family, "route", "flush", "table", &table])?;
        }
    }
    Ok(())
}

fn rules(pod: &PodHandle, family: &str) -> Result<Vec<Value>> {
    let output = pod.run("ip", &[family, "-json", "rule", "show"])?;
    let rules: Vec<Value> = serde_json::from_str(&output).context(output)?;
    let marked = rules.into_iter().filter(|rule| !rule["fwmark"].is_null());
    Ok(marked.collect())
}
