//! The subcommands that ask a running agent: `undermesh
//! status|connections|pods|routes|certificates|breakers|policies`.
//!
//! They print what the admin endpoint says, in its own tables, so that what is seen here and with
//! `curl` is the same.

mod client;

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use futures_util::future::BoxFuture;
use serde_json::{Value, json};
use thiserror::Error;

use crate::admin::{FORCE_PATH, ForceAnswer, ForceRequest, ForceTo};
use client::{Answer, Format, get, post};

/// Questions to the agent of this node.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Say whether the agent is ready and, if not, what is missing (then the exit code is not 0)
    Status(Query),
    /// List live connections: both identities, addresses, security, bytes
    Connections(ConnectionsQuery),
    /// List the pods of this node and how far each is enrolled
    Pods(Query),
    /// List routes, whether they are in force, and what is wrong with those that are not
    Routes(Query),
    /// List the certificates that this agent holds
    Certificates(Query),
    /// List the circuit breakers of this node's destinations, or force them open or closed
    Breakers(BreakersQuery),
    /// List the policies, what each is attached to, and whether it is in force there
    Policies(Query),
}

/// Which breakers to list or to force.
#[derive(Debug, Clone, Args)]
pub struct BreakersQuery {
    /// Which agent, and how to print.
    #[command(flatten)]
    pub query: Query,
    /// Hold the breakers of DESTINATION open (reject everything) or closed (pass everything), or
    /// release them (none). Holds until released or the agent is started anew. Needs root
    #[arg(long, value_enum, value_name = "STATE", requires = "destination")]
    pub force: Option<Force>,
    /// The agent's control socket
    #[arg(long, value_name = "PATH", default_value = CONTROL_SOCKET)]
    pub admin_socket: PathBuf,
    /// What to force, as the list names it: NAMESPACE/SERVICE:PORT
    #[arg(requires = "force")]
    pub destination: Option<String>,
    /// One route of it, as the list names it. Default: all
    #[arg(requires = "force")]
    pub route: Option<String>,
}

/// What to impose on breakers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Force {
    /// Rejects everything.
    Open,
    /// Passes everything.
    Closed,
    /// Releases.
    None,
}

/// Where the agent's control socket is, unless it is told otherwise.
pub const CONTROL_SOCKET: &str = "/run/undermesh/control.sock";

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
    /// List those that ended last instead, newest first, with how they ended
    #[arg(long)]
    pub ended: bool,
    /// Only connections from or to this namespace
    #[arg(long, value_name = "NAMESPACE", value_parser = name)]
    pub namespace: Option<String>,
    /// Only connections from or to this pod
    #[arg(long, value_name = "NAMESPACE/NAME", value_parser = name)]
    pub pod: Option<String>,
    /// List no more than this many: the oldest live ones, the newest ended ones
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    pub limit: usize,
}

/// Why there is no answer, or why it is not a good one.
#[derive(Debug, Error)]
pub enum CliError {
    /// Nobody listens there.
    #[error("no agent answers at {at}: {source}. Is the agent running on this node?")]
    Unreachable {
        /// Where it was looked for.
        at: String,
        /// Why.
        source: io::Error,
    },
    /// The agent, or what listens there, did not answer in time.
    #[error("the agent at {0} did not answer in time")]
    TimedOut(String),
    /// What listens there does not speak HTTP, or went away.
    #[error("the agent at {at} broke off: {source}")]
    Http {
        /// Who was asked.
        at: String,
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

/// Asks the agent, and prints the answer to standard output. Boxed, so that it is compiled here and not once more with
/// the program.
pub fn run(command: Command) -> BoxFuture<'static, Result<(), CliError>> {
    Box::pin(async { run_to(command, &mut io::stdout(), &mut io::stderr()).await })
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
        Command::Routes(query) => show(&query, "/routes", out).await,
        Command::Certificates(query) => show(&query, "/certificates", out).await,
        Command::Breakers(query) => breakers(&query, out).await,
        Command::Policies(query) => show(&query, "/policies", out).await,
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
    let list = if query.ended {
        "/connections/ended"
    } else {
        "/connections"
    };
    let mut path = format!("{list}?limit={}", query.limit);
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

async fn breakers(query: &BreakersQuery, out: &mut impl Write) -> Result<(), CliError> {
    let (Some(force), Some(destination)) = (query.force, &query.destination) else {
        return show(&query.query, "/breakers", out).await;
    };
    let request = ForceRequest {
        destination: destination.clone(),
        route: query.route.clone(),
        force: match force {
            Force::Open => Some(ForceTo::Open),
            Force::Closed => Some(ForceTo::Closed),
            Force::None => None,
        },
    };
    let request = serde_json::to_string(&request)?;
    let answer = post(&query.admin_socket, FORCE_PATH, request).await?;
    let answer = ok(answer, FORCE_PATH)?;
    if query.query.json {
        return print(out, &format!("{}\n", answer.body));
    }
    let forced: ForceAnswer = serde_json::from_str(&answer.body)?;
    let what = match force {
        Force::Open => "held open",
        Force::Closed => "held closed",
        Force::None => "released",
    };
    print(
        out,
        &format!(
            "{what}: {} of {destination}\n",
            breakers_of(forced.breakers)
        ),
    )
}

fn breakers_of(count: usize) -> String {
    match count {
        1 => "1 breaker".to_owned(),
        _ => format!("{count} breakers"),
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use clap::Parser;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::admin::breakers::testing::{DESTINATION, OneBreaker, ROUTE};
    use crate::admin::{Admin, AdminOptions, AdminState, Condition, Control};
    use crate::resilience::breaker::Forced;
    use crate::telemetry::Telemetry;
    use crate::telemetry::testing::{info, info_from};

    #[derive(Debug, Parser)]
    struct Line {
        #[command(subcommand)]
        command: Command,
    }

    async fn serve(state: AdminState) -> (SocketAddr, CancellationToken) {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let options = AdminOptions {
            admin: any,
            metrics: any,
            readiness: any,
            ..AdminOptions::default()
        };
        let admin = Admin::bind(&options, Arc::new(state)).await.unwrap();
        let address = admin.addresses().admin;
        let stop = CancellationToken::new();
        tokio::spawn(admin.run(stop.clone()));
        (address, stop)
    }

    /// Runs a line of the command line: the result, what was printed, and the remarks.
    async fn run_line(admin: SocketAddr, line: &[&str]) -> (Result<(), CliError>, String, String) {
        let admin = admin.to_string();
        let words = ["undermesh"].iter().chain(line).copied();
        let parsed = Line::try_parse_from(words.chain(["--admin", &admin])).unwrap();
        let (mut out, mut remarks) = (Vec::new(), Vec::new());
        let result = run_to(parsed.command, &mut out, &mut remarks).await;
        (
            result,
            String::from_utf8(out).unwrap(),
            String::from_utf8(remarks).unwrap(),
        )
    }

    fn state() -> AdminState {
        AdminState::new("node-a", Telemetry::new())
    }

    #[tokio::test]
    async fn connections_are_printed_as_the_table_and_as_json() {
        let telemetry = Telemetry::new();
        let _web = telemetry.open(info());
        let api = telemetry.open(info_from("api"));
        let (admin, _stop) = serve(AdminState::new("node-a", telemetry)).await;
        let (result, table, remarks) = run_line(admin, &["connections"]).await;
        result.unwrap();
        assert!(table.starts_with("ID"), "{table}");
        assert_eq!(table.lines().count(), 3);
        assert_eq!(remarks, "");
        let (result, listed, _) = run_line(admin, &["connections", "--json"]).await;
        result.unwrap();
        let listed: Vec<Value> = serde_json::from_str(&listed).unwrap();
        assert_eq!(listed[1]["source_workload"], "api");
        let chosen = ["connections", "--pod", "shop/api-0"];
        assert_eq!(run_line(admin, &chosen).await.1.lines().count(), 2);
        let (_, table, remarks) = run_line(admin, &["connections", "--limit", "1"]).await;
        assert_eq!(table.lines().count(), 2);
        assert_eq!(remarks, "1 of 2 connections are shown\n");
        drop(api);
        let (result, table, _) = run_line(admin, &["connections", "--ended"]).await;
        result.unwrap();
        assert!(table.contains("aborted"), "{table}");
    }

    #[tokio::test]
    async fn status_prints_conditions_and_health_and_fails_while_not_ready() {
        let state = state()
            .condition("capture", || Condition::Ready("4 pods".into()))
            .condition("certificates", || Condition::NotReady("CA away".into()));
        let (admin, _stop) = serve(state).await;
        let (result, printed, _) = run_line(admin, &["status"]).await;
        assert!(matches!(result, Err(CliError::NotReady)));
        assert!(printed.contains("CA away"), "{printed}");
        assert!(printed.contains("node-a"), "{printed}");
        let (_, printed, _) = run_line(admin, &["status", "--json"]).await;
        let printed: Value = serde_json::from_str(&printed).unwrap();
        assert_eq!(printed["readiness"]["ready"], false);
        assert_eq!(printed["health"]["node"], "node-a");
    }

    #[tokio::test]
    async fn status_of_a_ready_agent_succeeds() {
        let ready = state().condition("capture", || Condition::Ready("4 pods".into()));
        let (admin, _stop) = serve(ready).await;
        run_line(admin, &["status"]).await.0.unwrap();
    }

    #[tokio::test]
    async fn breakers_are_forced_and_released_over_the_control_socket() {
        let directory = tempfile::TempDir::new().unwrap();
        let socket = directory.path().join("control.sock");
        let book = Arc::new(OneBreaker::default());
        let control = Control::bind(&socket, book.clone()).unwrap();
        let stop = CancellationToken::new();
        let serving = tokio::spawn(control.run(stop.clone()));
        let (admin, _stop) = serve(state()).await;
        let path = socket.to_str().unwrap();
        let force = |words: &[&str]| -> Vec<String> {
            let first = ["breakers", "--admin-socket", path, "--force"];
            let words = first.iter().chain(words);
            words.map(|word| (*word).to_owned()).collect()
        };
        for (words, printed, forced) in [
            (
                force(&["open", DESTINATION]),
                "held open: 1 breaker of shop/cart:80\n",
                Some(Forced::Open),
            ),
            (
                force(&["closed", DESTINATION, ROUTE]),
                "held closed: 1 breaker of shop/cart:80\n",
                Some(Forced::Closed),
            ),
            (
                force(&["none", DESTINATION]),
                "released: 1 breaker of shop/cart:80\n",
                None,
            ),
        ] {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            let (result, out, _) = run_line(admin, &words).await;
            result.unwrap();
            assert_eq!(out, printed);
            assert_eq!(*book.forced.lock(), forced);
        }
        let words = force(&["open", "shop/other:80"]);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let error = run_line(admin, &words).await.0.unwrap_err();
        assert!(error.to_string().contains("shop/other:80"), "{error}");
        stop.cancel();
        serving.await.unwrap();
        let error = run_line(admin, &words).await.0.unwrap_err();
        assert!(matches!(error, CliError::Unreachable { .. }), "{error}");
    }

    #[test]
    fn forcing_needs_a_destination_and_a_destination_needs_forcing() {
        for line in [["breakers", "--force=open"], ["breakers", "shop/cart:80"]] {
            assert!(Line::try_parse_from(["undermesh"].into_iter().chain(line)).is_err());
        }
    }

    #[tokio::test]
    async fn pods_routes_and_certificates_are_the_views_of_those_names() {
        let views = state()
            .view("pods", &[], || json!([{"name": "shop/web-0"}]))
            .view("routes", &[], || json!([{"route": "HTTPRoute/shop/r"}]))
            .view(
                "certificates",
                &[],
                || json!([{"id": "spiffe://x/ns/a/sa/b"}]),
            );
        let (admin, _stop) = serve(views).await;
        assert_eq!(run_line(admin, &["pods"]).await.1, "NAME\nshop/web-0\n");
        let routes = run_line(admin, &["routes"]).await.1;
        assert_eq!(routes, "ROUTE\nHTTPRoute/shop/r\n");
        let (result, printed, _) = run_line(admin, &["certificates", "--json"]).await;
        result.unwrap();
        assert!(printed.contains("spiffe://x/ns/a/sa/b"));
    }

    #[tokio::test]
    async fn an_agent_that_does_not_run_is_a_clear_error() {
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let admin = closed.local_addr().unwrap();
        drop(closed);
        let (result, printed, _) = run_line(admin, &["status"]).await;
        let message = result.unwrap_err().to_string();
        assert!(message.contains(&format!("no agent answers at {admin}")));
        assert_eq!(printed, "");
    }

    #[tokio::test]
    async fn what_the_agent_refuses_is_told_with_its_status() {
        let (admin, _stop) = serve(state()).await;
        let message = run_line(admin, &["pods"]).await.0.unwrap_err().to_string();
        assert!(message.contains("/pods with 404"), "{message}");
    }

    #[tokio::test]
    async fn something_else_on_the_port_is_an_error_and_not_an_answer() {
        let other = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let admin = other.local_addr().unwrap();
        tokio::spawn(async move { while other.accept().await.is_ok() {} });
        let (result, _, _) = run_line(admin, &["status"]).await;
        assert!(matches!(result, Err(CliError::Http { .. })), "{result:?}");
    }

    #[test]
    fn names_that_would_need_escaping_are_refused() {
        for bad in ["a b", "a&limit=1", "", "a#b", "a%2f"] {
            let line = ["undermesh", "connections", "--pod", bad];
            assert!(Line::try_parse_from(line).is_err(), "{bad}");
        }
    }
}
