//! What becomes of requests: an outage, a bad version, a flood.

use std::fmt::Display;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};
use undermesh_lab::requests::{
    Canary, CanaryOptions, Flood, FloodOptions, Outage, OutageOptions, Switch,
};

use super::Shown;
use crate::programs;
use crate::report::{Checks, thousandths};

/// The victim's p99 under a flood in the mesh, over that under one beside it, in thousandths.
const MOST_SLOWDOWN: u64 = 2_000;
/// Servers that are well again serve everybody within this, in milliseconds.
const MOST_RECOVERY: u64 = 2_000;
const MOST_CONTAINMENT: u64 = 3_000;

#[derive(Clone, Copy, ValueEnum)]
pub enum Is {
    On,
    Off,
}

impl From<Is> for Switch {
    fn from(is: Is) -> Self {
        match is {
            Is::On => Self::On,
            Is::Off => Self::Off,
        }
    }
}

#[derive(Args)]
pub struct OutageArgs {
    /// The circuit breaker.
    #[arg(long, value_enum, default_value = "on")]
    breaker: Is,
    /// The retry budget.
    #[arg(long, value_enum, default_value = "on")]
    budget: Is,
}

/// Every server of a Service fails for a while.
pub fn outage(args: &OutageArgs) -> Result<Shown> {
    let binaries = programs::build()?;
    let mut options = OutageOptions {
        breaker: args.breaker.into(),
        budget: args.budget.into(),
        ..OutageOptions::default()
    };
    if options.breaker == Switch::Off {
        // Twice the budget's window: what was paid for while all was well is spent in the first seconds.
        options.outage = Duration::from_secs(20);
    }
    let outage = Outage::run(Some(binaries), &options, &tell)?;
    let mut checks = Checks::default();
    checks.more_than("ok", outage.client.ok, 0);
    if options.budget == Switch::On {
        checks.less_than(
            "received while all failed",
            outage.outage.upstream_received,
            outage.most_received() + 1,
        );
    }
    match options.breaker {
        Switch::On => {
            let went = outage.went_round();
            let went = went.map_or_else(|error| format!("{error:#}"), |()| "yes".to_owned());
            checks.equal("closed → open → half open → closed", went, "yes".to_owned());
            checks.more_than("rejected", outage.rejected, 0);
        }
        Switch::Off => {
            checks.equal("transitions", outage.transitions.len(), 0);
            checks.equal("rejected", outage.rejected, 0);
        }
    }
    checks.less_than("recover_ms", outage.recover_ms, MOST_RECOVERY);
    Ok((checks, body(json!(outage))))
}

/// A canary fails.
pub fn canary() -> Result<Shown> {
    let binaries = programs::build()?;
    let canary = Canary::run(Some(binaries), &CanaryOptions::default(), &tell)?;
    let mut checks = Checks::default();
    let weight = thousandths(canary.weight_share());
    let seen = thousandths(canary.share_while_well);
    checks.more_than("canary's share, in 1/1000", seen, weight * 7 / 10);
    checks.less_than("canary's share, in 1/1000", seen, weight * 13 / 10);
    checks.less_than(
        "client_error_share, in 1/1000",
        thousandths(canary.client_error_share),
        weight + 1,
    );
    checks.equal("errors after containment", canary.errors_after, 0);
    checks.less_than("contained_ms", canary.contained_ms, MOST_CONTAINMENT);
    let errors = canary.backends.iter().map(|backend| backend.errors).sum();
    checks.more_than("errors of the canary", errors, 0);
    Ok((checks, body(json!(canary))))
}

/// A pod floods.
pub fn flood() -> Result<Shown> {
    let binaries = programs::build()?;
    let flood = Flood::run(Some(binaries), &FloodOptions::default())?;
    let p99 = flood.victim_p99_ms;
    let mut checks = Checks::default();
    checks.equal("victim's failed requests", flood.victim_failed, 0);
    checks.more_than("flood, requests", flood.flooder.sent, 0);
    checks.more_than(
        "flood beside the mesh, requests",
        flood.flooder.sent_direct,
        0,
    );
    checks.less_than(
        "flood_mesh / flood_direct, in 1/1000",
        thousandths(p99.flood_mesh / p99.flood_direct),
        MOST_SLOWDOWN,
    );
    print_p99("alone", p99.alone);
    print_p99("flood beside the mesh", p99.flood_direct);
    print_p99("flood in the mesh", p99.flood_mesh);
    Ok((checks, body(json!(flood))))
}

fn tell(what: &str) {
    println!("{what}");
}

fn print_p99(when: impl Display, p99: f64) {
    println!("victim's p99, {when}: {p99:.2} ms");
}

fn body(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(body) => body,
        _ => Map::new(),
    }
}
