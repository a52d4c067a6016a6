//! The command line of Undermesh.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use undermesh::agent::{self, AgentOptions};
use undermesh::cli;
use undermesh::identity::authority::{self, AuthorityOptions};
use undermesh::mesh::TrustDomain;
use undermesh::mesh::parse_duration;
use undermesh::telemetry::{LogFormat, Logging};
use undermesh::watchdog::Watchdog;
use undermesh::workers::Workers;

// Threads free what others allocated: what the control plane makes, connections hold.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// A service mesh that lives under the pods.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the agent of this node
    Agent {
        #[command(flatten)]
        options: Box<AgentOptions>,
        /// Threads that serve connections. A connection stays on one of them
        #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=256))]
        workers: u16,
        #[command(flatten)]
        log: Log,
    },
    /// Run a certificate authority for meshes without one
    Ca {
        #[command(flatten)]
        options: CaOptions,
        #[command(flatten)]
        log: Log,
    },
    #[command(flatten)]
    Ask(cli::Command),
}

#[derive(Args)]
struct Log {
    /// Format of the log on standard output
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Args)]
struct CaOptions {
    /// Where to listen
    #[arg(long, value_name = "ADDR")]
    listen: SocketAddr,
    /// Directory of the key and the root certificate, made on first start
    #[arg(long, value_name = "DIR")]
    state_dir: PathBuf,
    /// Trust domain of all identities
    #[arg(long, value_name = "DOMAIN", default_value = "cluster.local")]
    trust_domain: TrustDomain,
    /// YAML file: which node may ask for which identities
    #[arg(long, value_name = "FILE")]
    authenticator: PathBuf,
    /// Validity of certificates, with a unit: 24h, 90m, 5s
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = duration)]
    certificate_lifetime: Duration,
    /// A DNS name or address that agents know this CA by; may be repeated
    #[arg(long = "server-name", value_name = "NAME")]
    server_names: Vec<String>,
}

fn main() -> ExitCode {
    match run(CommandLine::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("undermesh: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The soft limit is low for programs that use select(2), which this one does not. Where it cannot be
/// raised, the bounds that follow from it are lower.
fn take_descriptors() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// How long the workers may take to drop what they still do when the agent ends.
const LAST_WORDS: Duration = Duration::from_secs(1);

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Agent {
            options,
            workers,
            log,
        } => {
            let logging = Logging::init(log.log_format)?;
            take_descriptors();
            let workers = Workers::start(workers).context("cannot start the workers")?;
            let runtime = Builder::new_multi_thread()
                .worker_threads(1)
                .thread_name("control")
                .enable_all()
                .build()
                .context("cannot start the control plane")?;
            let watched = workers.runtimes().chain([runtime.handle()]);
            let _watchdog = Watchdog::start(watched).context("cannot start the watchdog")?;
            let served = runtime.block_on(async {
                let stop = stop_on_signal()?;
                anyhow::Ok(agent::run(*options, &logging, workers.clone(), stop).await?)
            });
            // Tasks that still relay are dropped with their sockets, which resets them.
            workers.stop(LAST_WORDS);
            runtime.shutdown_background();
            served
        }
        Command::Ca { options, log } => {
            let _logging = Logging::init(log.log_format)?;
            let runtime = Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()?;
            runtime.block_on(async {
                let stop = stop_on_signal()?;
                let options = AuthorityOptions {
                    listen: options.listen,
                    state_dir: options.state_dir,
                    trust_domain: options.trust_domain,
                    authenticator_file: options.authenticator,
                    certificate_lifetime: options.certificate_lifetime,
                    server_names: options.server_names,
                };
                Ok(authority::serve(options, stop).await?)
            })
        }
        Command::Ask(command) => {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            Ok(runtime.block_on(cli::run(command))?)
        }
    }
}

/// Cancelled at SIGTERM and at SIGINT.
fn stop_on_signal() -> anyhow::Result<CancellationToken> {
    let stop = CancellationToken::new();
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind).context("cannot listen for signals")?;
        let stop = stop.clone();
        tokio::spawn(async move {
            signals.recv().await;
            stop.cancel();
        });
    }
    Ok(stop)
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text)
        .ok_or_else(|| "numbers with units h, m, s, ms, like 24h or 1m30s".to_owned())
}
