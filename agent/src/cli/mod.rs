//! The subcommands that ask a running agent: `undermesh status|connections|pods|certificates`.
//!
//! They print what the admin endpoint says, in its own tables, so that what is seen here and with
//! `curl` is the same.

mod client;

use std::io::{self, Write};
use std::net::SocketAddr;

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use thiserror::Error;

use client::{Answer, Format, get};

/// Questions to the agent of this node.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Say whether the agent is ready and, if not, what is missing (then the exit code is not 0)
    Status(Query),
    /// List live connections: both identities, addresses, security, bytes
    Connections(ConnectionsQuery),
    /// List the pods of this node and how far each is enrolled
    Pods(Query),
    /// List the certificates that this agent holds
    Certificates(Query),
}

/// Which agent to ask and how to print the answer.
#[derive(Debug, Clone, Args)]
pub struct Query {
    /// Admin address of the agent
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:15000")]
    pub admin: SocketAddr,
    /// Print JSON instead of tables
    #[arg(long)]
    pub json: bool,
}

/// Which connections to list.
#[derive(Debug, Clone, Args)]
pub struct ConnectionsQuery {
    /// Which agent, and how to print.
    #[command(flatten)]
    pub query: Query,
    /// Only connections from or to this namespace
    #[arg(long, value_name = "NAMESPACE", value_parser = name)]
    pub namespace: Option<String>,
    /// Only connections from or to this pod
    #[arg(long, value_name = "NAMESPACE/NAME", value_parser = name)]
    pub pod: Option<String>,
    /// List no more than this many, the oldest first
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    pub limit: usize,
}

/// Why there is no answer, or why it is not a good one.
#[derive(Debug, Error)]
pub enum CliError {
    /// Nobody listens there.
    #[error("no agent answers at {admin}: {source}. Is the agent running on this node?")]
    Unreachable {
        /// Where it was looked for.
        admin: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The agent, or what listens there, did not answer in time.
    #[error("the agent at {0} did not answer in time")]
    TimedOut(SocketAddr),
    /// What listens there does not speak HTTP, or went away.
    #[error("the agent at {admin} broke off: {source}")]
    Http {
        /// Who was asked.
        admin: SocketAddr,
        /// How it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The agent answered with an error.
    #[error("the agent answered {path} with {status}: {body}")]
    Status {
        /// What was asked for.
        path: String,
        /// The HTTP status.
        status: http::StatusCode,
        /// What it said.
        body: String,
    },
    /// The answer is not JSON.
    #[error("the agent's answer is not JSON")]
    Json(#[from] serde_json::Error),
    /// The agent is not ready; what is missing was printed.
    #[error("the agent is not ready")]
    NotReady,
    /// The answer cannot be printed.
    #[error("cannot print the answer")]
    Output(#[source] io::Error),
}

/// Asks the agent, and prints the answer to standard output.
pub async fn run(command: Command) -> Result<(), CliError> {
    run_to(command, &mut io::stdout(), &mut io::stderr()).await
}

/// Asks the agent, and prints the answer to `out` and remarks on it to `remarks`.
pub async fn run_to(
    command: Command,
    out: &mut impl Write,
    remarks: &mut impl Write,
) -> Result<(), CliError> {
    match command {
        Command::Status(query) => status(&query, out).await,
        Command::Connections(query) => connections(&query, out, remarks).await,
        Command::Pods(query) => show(&query, "/pods", out).await,
        Command::Certificates(query) => show(&query, "/certificates", out).await,
    }
}

async fn status(query: &Query, out: &mut impl Write) -> Result<(), CliError> {
    let readiness = get(query.admin, "/readyz", query.format()).await?;
    let ready = match readiness.status {
        http::StatusCode::OK => Ok(()),
        // Without conditions it is not the answer of /readyz but a refusal.
        http::StatusCode::SERVICE_UNAVAILABLE if readiness.body.contains("conditions") => {
            Err(CliError::NotReady)
        }
        _ => return Err(readiness.into_error("/readyz")),
    };
    let health = ok(
        get(query.admin, "/healthz", query.format()).await?,
        "/healthz",
    )?;
    let text = if query.json {
        let both = json!({
            "readiness": serde_json::from_str::<Value>(&readiness.body)?,
            "health": serde_json::from_str::<Value>(&health.body)?,
        });
        format!("{both:#}\n")
    } else {
        format!("{}\n{}", readiness.body, health.body)
    };
    print(out, &text)?;
    ready
}

async fn connections(
    query: &ConnectionsQuery,
    out: &mut impl Write,
    remarks: &mut impl Write,
) -> Result<(), CliError> {
    let mut path = format!("/connections?limit={}", query.limit);
    for (name, value) in [("namespace", &query.namespace), ("pod", &query.pod)] {
        if let Some(value) = value {
            path = format!("{path}&{name}={value}");
        }
    }
    let answer = ok(
        get(query.query.admin, &path, query.query.format()).await?,
        &path,
    )?;
    print(out, &answer.body)?;
    match answer.total {
        Some(total) if total > query.limit => print(
            remarks,
            &format!("{} of {total} connections are shown\n", query.limit),
        ),
        _ => Ok(()),
    }
}

async fn show(query: &Query, path: &str, out: &mut impl Write) -> Result<(), CliError> {
    let answer = ok(get(query.admin, path, query.format()).await?, path)?;
    print(out, &answer.body)
}

impl Query {
    fn format(&self) -> Format {
        if self.json {
            Format::Json
        } else {
            Format::Text
        }
    }
}

fn ok(answer: Answer, path: &str) -> Result<Answer, CliError> {
    match answer.status {
        http::StatusCode::OK => Ok(answer),
        _ => Err(answer.into_error(path)),
    }
}

/// Who pipes into `head` has seen enough: a closed pipe is not an error.
fn print(out: &mut impl Write, text: &str) -> Result<(), CliError> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(CliError::Output(error)),
        _ => Ok(()),
    }
}

/// A name of Kubernetes, or two with a slash: nothing that needs escaping in a query.
fn name(text: &str) -> Result<String, String> {
    let valid = |c: char| c.is_ascii_alphanumeric() || "-./".contains(c);
    if !text.is_empty() && text.chars().all(valid) {
        Ok(text.to_owned())
    } else {
        Err("not a name: a-z, 0-9, '-', '.' and one '/'".to_owned())
    }
}
