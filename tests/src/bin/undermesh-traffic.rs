//! Clients and servers that check every byte and count for themselves.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use undermesh_lab::traffic::{ClientOptions, ServeOptions, run_client, run_server};
use undermesh_lab::web::{
    HttpAttackOptions, LoadOptions, WebOptions, run_attack, run_load, run_web,
};

#[derive(Parser)]
#[command(about, version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serves until SIGTERM, then writes a report in JSON.
    Serve(ServeOptions),
    /// Opens connections and writes a report in JSON; exits 1 if any failed.
    Client(ClientOptions),
    /// Serves HTTP until SIGTERM, then writes a report in JSON.
    Web(WebOptions),
    /// Sends HTTP requests and writes a report in JSON; exits 1 if any was not answered 2xx.
    Load(LoadOptions),
    /// Attacks an HTTP server and writes a report in JSON.
    Attack(HttpAttackOptions),
}

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    // 1,024 descriptors are not enough for 1,000 connections and what else is open.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        match cli.command {
            Command::Serve(options) => {
                run_server(options).await?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Client(options) => Ok(exit(run_client(options).await?)),
            Command::Web(options) => {
                run_web(options).await?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Attack(options) => {
                run_attack(options).await?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Load(options) => Ok(exit(run_load(options).await?)),
        }
    })
}

fn exit(well: bool) -> ExitCode {
    if well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
