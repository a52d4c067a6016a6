//! `cargo xtask simulate`: failures under the agent's resilience and under that of others. Needs no
//! root and no kernel programs.

use std::env;
use std::path::{PathBuf, absolute};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::build::workspace;

#[derive(Args)]
pub struct Options {
    /// Only this scenario.
    #[arg(long)]
    scenario: Option<String>,
    /// Write the results here.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Also leave out each mechanism in turn.
    #[arg(long)]
    ablation: bool,
    /// Draw the timelines into this folder.
    #[arg(long)]
    svg: Option<PathBuf>,
    /// The same seed gives the same run.
    #[arg(long)]
    seed: Option<u64>,
}

/// Builds the simulator and runs it.
pub fn run(options: &Options) -> Result<ExitCode> {
    println!("building the simulator");
    let mut simulator = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    simulator.current_dir(workspace());
    simulator.args([
        "run",
        "--quiet",
        "--release",
        "-p",
        "undermesh-simulation",
        "--",
    ]);
    if let Some(scenario) = &options.scenario {
        simulator.args(["--scenario", scenario]);
    }
    if let Some(seed) = options.seed {
        simulator.args(["--seed", &seed.to_string()]);
    }
    if options.ablation {
        simulator.arg("--ablation");
    }
    // The simulator runs in the workspace, the caller need not.
    for (name, path) in [("--json", &options.json), ("--svg", &options.svg)] {
        if let Some(path) = path {
            let path = absolute(path).with_context(|| format!("where is {}?", path.display()))?;
            simulator.arg(name).arg(path);
        }
    }
    let status = simulator
        .status()
        .with_context(|| format!("cannot run {simulator:?}"))?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
