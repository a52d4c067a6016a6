//! `cargo xtask scenario NAME`: what Undermesh does when something goes wrong, or somebody means it to.

mod capture;
mod cells;
mod hostile;
mod requests;
mod restart;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::{Args, Subcommand};
use serde_json::{Map, Value};
use undermesh_lab::machine;

use crate::report::{self, Checks};

#[derive(Args)]
pub struct Options {
    #[command(subcommand)]
    scenario: Scenario,
}

#[derive(Subcommand)]
enum Scenario {
    /// Every kind of connect.
    Capture(File),
    /// What the mesh does for pods that are not enrolled or forward, for destinations outside, and while an agent
    /// hangs.
    Cells(File),
    /// Attacks by a process in a pod.
    Hostile(File),
    /// An agent that ends, and comes back or has a successor, under a connect storm.
    Restart {
        #[command(flatten)]
        options: restart::Options,
        #[command(flatten)]
        file: File,
    },
    /// Every server of a Service fails every request for a while.
    Outage {
        #[command(flatten)]
        args: requests::OutageArgs,
        #[command(flatten)]
        file: File,
    },
    /// A new version that gets a share of the requests begins to fail.
    Canary(File),
    /// One pod sends as much as it can.
    Flood(File),
}

#[derive(Args)]
struct File {
    /// Where to write the figures, in JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    machine::require_root()?;
    match &options.scenario {
        Scenario::Capture(file) => shown("scenario capture", file, capture::run),
        Scenario::Cells(file) => shown("scenario cells", file, cells::run),
        Scenario::Hostile(file) => shown("scenario hostile", file, hostile::run),
        Scenario::Restart { options, file } => {
            shown("scenario restart", file, || restart::run(options))
        }
        Scenario::Outage { args, file } => {
            shown("scenario outage", file, || requests::outage(args))
        }
        Scenario::Canary(file) => shown("scenario canary", file, requests::canary),
        Scenario::Flood(file) => shown("scenario flood", file, requests::flood),
    }
}

type Shown = (Checks, Map<String, Value>);

fn shown(command: &str, file: &File, scenario: impl FnOnce() -> Result<Shown>) -> Result<ExitCode> {
    let start = Instant::now();
    let (checks, body) = scenario().unwrap_or_else(|error| {
        let mut checks = Checks::default();
        checks.equal("ran to its end", format!("{error:#}"), "yes".to_owned());
        (checks, Map::new())
    });
    println!("\n{}", if checks.passed() { "passed" } else { "FAILED" });
    checks.print();
    if let Some(file) = &file.json {
        report::write(file, &report::envelope(command, start, &checks, body))?;
    }
    Ok(if checks.passed() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
