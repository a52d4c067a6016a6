//! Everything a developer of Undermesh runs.

mod bench;
mod build;
mod cluster;
mod crds;
mod debian;
mod demo;
mod fuzz;
mod kernels;
mod lab;
mod programs;
mod report;
mod scenario;
mod simulate;
mod test;
mod toolchain;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use undermesh_lab::interrupt;

#[derive(Parser)]
#[command(about = "Everything a developer of Undermesh runs")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure what Undermesh costs, beside no proxy and beside Envoy.
    Bench(bench::Options),
    /// Build the kernel programs and the agent that embeds them.
    Build(build::Options),
    /// Write deploy/crds anew from the types.
    Crds,
    /// Two simulated nodes with an agent each, and real programs that talk through them.
    Demo(demo::Options),
    /// Every parser of our own against inputs that nobody meant.
    Fuzz(fuzz::Options),
    /// Two simulated nodes to drive by hand.
    Lab(lab::Options),
    /// Failures under the resilience of Undermesh and of others, simulated.
    Simulate(simulate::Options),
    /// What happens when something goes wrong, or somebody means it to.
    Scenario(scenario::Options),
    /// Run every test: units, kernel programs, and end to end.
    Test(test::Options),
}

fn main() -> ExitCode {
    let outcome = fuzz::as_rustc().unwrap_or_else(|| run(&Arguments::parse().command));
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(command: &Command) -> Result<ExitCode> {
    ctrlc::set_handler(interrupt::interrupt)?;
    match command {
        Command::Bench(options) => bench::run(options),
        Command::Build(options) => build::run(options).map(|()| ExitCode::SUCCESS),
        Command::Crds => crds::run().map(|()| ExitCode::SUCCESS),
        Command::Demo(options) => demo::run(options),
        Command::Fuzz(options) => fuzz::run(options),
        Command::Lab(options) => lab::run(options),
        Command::Simulate(options) => simulate::run(options),
        Command::Scenario(options) => scenario::run(options),
        Command::Test(options) => test::run(options),
    }
}
