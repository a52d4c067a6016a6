//! Attacks by a process in a pod.

use anyhow::Result;
use serde_json::{Map, Value, json};
use undermesh_lab::hostile;

use crate::programs;
use crate::report::Checks;

/// Taken in turn: calm, flooded, calm, …
const ROUNDS: usize = 5;
/// A bystander may get slower by this factor, in thousandths.
const MOST_SLOWDOWN: u64 = 2_000;

pub fn run() -> Result<(Checks, Map<String, Value>)> {
    let binaries = programs::build()?;
    println!(
        "{:<28} {:>8} {:>9} {:>8} {:>7}  metric, reason",
        "attack", "attempts", "succeeded", "control", "delta"
    );
    let outcome = hostile::run(Some(binaries), ROUNDS, |result| {
        println!(
            "{:<28} {:>8} {:>9} {:>8} {:>7}  {} {}",
            result.id,
            result.attempts,
            result.succeeded,
            result.control_succeeded,
            result.metric_delta,
            result.metric,
            result.log_reason
        );
    })?;
    let mut checks = Checks::default();
    let names = |fails: fn(&hostile::AttackResult) -> bool| {
        let failing = outcome.attacks.iter().filter(|attack| fails(attack));
        let names: Vec<&str> = failing.map(|attack| attack.id.as_str()).collect();
        names.join(" ")
    };
    let none = String::new;
    checks.more_than("attacks", outcome.attacks.len() as u64, 0);
    checks.equal("got through", names(|attack| attack.succeeded > 0), none());
    checks.equal(
        "control did not get through",
        names(|attack| attack.control_succeeded == 0),
        none(),
    );
    checks.equal("not repelled", names(|attack| !attack.repelled()), none());
    checks.less_than(
        "bystander_p99_ratio, in 1/1000",
        thousandths(outcome.bystander_p99_ratio),
        MOST_SLOWDOWN,
    );
    let mut body = Map::new();
    body.insert("attacks".to_owned(), json!(outcome.attacks));
    let ratio = json!(outcome.bystander_p99_ratio);
    body.insert("bystander_p99_ratio".to_owned(), ratio);
    Ok((checks, body))
}

/// A ratio that is no number, because nothing was measured, is the worst.
fn thousandths(ratio: f64) -> u64 {
    if !ratio.is_finite() {
        return u64::MAX;
    }
    // Ratios of latencies are small and positive.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let whole = (ratio * 1e3).round() as u64;
    whole
}
