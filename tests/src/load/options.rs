//! What the load program is told, on its command line and by the bench.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::traffic::{format_duration, parse_duration};

/// A server. The first byte of a connection says what it is for: `S` is read and counted, `E` is echoed,
/// `G` is the start of an HTTP/1.1 GET, which is answered with 1 KiB.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct SinkOptions {
    /// Ports, on IPv4 and IPv6.
    #[arg(long, value_name = "PORT", required = true)]
    pub port: Vec<u16>,
    /// The processor to run on.
    #[arg(long)]
    pub cpu: Option<usize>,
    /// A unix socket; whoever connects gets the report so far.
    #[arg(long, value_name = "PATH")]
    pub control: PathBuf,
}

impl SinkOptions {
    /// As arguments of `undermesh-load`.
    #[must_use]
    pub fn to_args(&self) -> Vec<String> {
        let mut args = vec!["serve".to_owned()];
        for port in &self.port {
            args.extend(["--port".to_owned(), port.to_string()]);
        }
        if let Some(cpu) = self.cpu {
            args.extend(["--cpu".to_owned(), cpu.to_string()]);
        }
        args.extend(["--control".to_owned(), self.control.display().to_string()]);
        args
    }
}

/// What a client does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LoadKind {
    /// Sends as much as goes through; the server counts.
    Bulk,
    /// 64 bytes there and back, again and again.
    PingPong,
    /// Connects, sends one byte, waits for its echo, closes.
    Connect,
    /// HTTP/1.1 GET with an answer of 1 KiB, on connections that stay: as many as go through, or `rate`.
    Http,
    /// Opens connections, says so, and keeps them idle until SIGTERM.
    Hold,
}

impl LoadKind {
    fn as_arg(self) -> &'static str {
        match self {
            Self::Bulk => "bulk",
            Self::PingPong => "ping-pong",
            Self::Connect => "connect",
            Self::Http => "http",
            Self::Hold => "hold",
        }
    }
}

/// One run of the client.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct LoadOptions {
    /// Where to; several are taken in turn.
    #[arg(long, value_name = "ADDR:PORT", required = true)]
    pub to: Vec<SocketAddr>,
    /// What to do.
    #[arg(long, value_enum)]
    pub kind: LoadKind,
    /// Connections at a time.
    #[arg(long, default_value_t = 1)]
    pub connections: usize,
    /// Requests per second that are due, whether or not those before were answered (an open loop): latency
    /// counts from the moment at which a request was due.
    #[arg(long)]
    pub rate: Option<u32>,
    /// Runs for this long before it measures.
    #[arg(long, value_parser = parse_duration, default_value = "500ms")]
    pub warm_up: Duration,
    /// Measures for this long.
    #[arg(long, value_parser = parse_duration, default_value = "5s")]
    pub window: Duration,
    /// The processor to run on.
    #[arg(long)]
    pub cpu: Option<usize>,
    /// Processes whose processor time in the window is measured.
    #[arg(long, value_name = "PID")]
    pub watch: Vec<i32>,
    /// The server's unix socket, to ask what it received in the window.
    #[arg(long, value_name = "PATH")]
    pub server: Option<PathBuf>,
}

impl LoadOptions {
    /// One connection, for 5 s.
    #[must_use]
    pub fn new(kind: LoadKind, to: Vec<SocketAddr>) -> Self {
        Self {
            to,
            kind,
            connections: 1,
            rate: None,
            warm_up: Duration::from_millis(500),
            window: Duration::from_secs(5),
            cpu: None,
            watch: Vec::new(),
            server: None,
        }
    }

    /// As arguments of `undermesh-load`.
    #[must_use]
    pub fn to_args(&self) -> Vec<String> {
        let mut args = vec!["run".to_owned()];
        let mut add = |name: &str, value: String| args.extend([name.to_owned(), value]);
        for to in &self.to {
            add("--to", to.to_string());
        }
        add("--kind", self.kind.as_arg().to_owned());
        add("--connections", self.connections.to_string());
        add("--warm-up", format_duration(self.warm_up));
        add("--window", format_duration(self.window));
        if let Some(rate) = self.rate {
            add("--rate", rate.to_string());
        }
        if let Some(cpu) = self.cpu {
            add("--cpu", cpu.to_string());
        }
        for pid in &self.watch {
            add("--watch", pid.to_string());
        }
        if let Some(path) = &self.server {
            add("--server", path.display().to_string());
        }
        args
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Run {
        #[command(flatten)]
        options: LoadOptions,
    }

    #[test]
    fn load_options_survive_the_command_line() {
        let options = LoadOptions {
            connections: 64,
            rate: Some(5000),
            window: Duration::from_millis(1500),
            cpu: Some(1),
            watch: vec![1, 2],
            server: Some("/tmp/x".into()),
            ..LoadOptions::new(LoadKind::PingPong, vec!["[fd00::1]:80".parse().unwrap()])
        };
        assert_eq!(Run::parse_from(options.to_args()).options, options);
    }
}
