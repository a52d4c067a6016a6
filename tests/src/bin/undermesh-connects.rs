//! Makes connections of every kind, and attacks as a process in a container could.

use std::net::SocketAddr;

use anyhow::Result;
use clap::{Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use undermesh_lab::connects::{ConnectOptions, give, make};
use undermesh_lab::hostile::{AttackOptions, attack};

#[derive(Parser)]
#[command(about, version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Opens connections of one kind and writes a report in JSON.
    Connect(ConnectOptions),
    /// Makes a socket and hands it over through stdin.
    Give {
        /// Of the family of this.
        #[arg(long)]
        to: SocketAddr,
    },
    /// Attacks, and writes a report in JSON.
    Attack(AttackOptions),
}

fn main() -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    match Cli::parse().command {
        Command::Connect(options) => println!("{}", serde_json::to_string(&make(&options)?)?),
        Command::Give { to } => give(to)?,
        Command::Attack(options) => println!("{}", serde_json::to_string(&attack(&options)?)?),
    }
    Ok(())
}
