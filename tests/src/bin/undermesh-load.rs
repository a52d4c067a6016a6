//! Load that is measured, and a server for it.

use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use undermesh_lab::load::{LoadOptions, SinkOptions, run_load, run_sink, spin};

#[derive(Parser)]
#[command(about, version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serves until SIGTERM.
    Serve(SinkOptions),
    /// Loads, measures, and writes a report in JSON.
    Run(LoadOptions),
    /// Keeps a processor from halting: under SCHED_IDLE.
    Spin {
        /// The processor.
        #[arg(long)]
        cpu: usize,
        /// Ends by itself after so many seconds.
        #[arg(long, default_value_t = 600)]
        seconds: u64,
    },
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    // One thread: where it runs is part of the measurement.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    match cli.command {
        Command::Serve(options) => runtime.block_on(run_sink(options)),
        Command::Run(options) => runtime.block_on(run_load(options)),
        Command::Spin { cpu, seconds } => spin(cpu, Duration::from_secs(seconds)),
    }
}
