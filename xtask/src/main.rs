//! Everything a developer of Undermesh runs.

mod build;
mod debian;
mod toolchain;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Everything a developer of Undermesh runs")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the kernel programs and the agent that embeds them.
    Build(build::Options),
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Build(options) => build::run(&options),
    }
}
