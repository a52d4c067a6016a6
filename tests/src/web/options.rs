//! Command lines.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

/// An HTTP server.
#[derive(Debug, Clone, Args)]
pub struct WebOptions {
    /// Port, on both families; HTTP/1.1, and HTTP/2 by prior knowledge.
    #[arg(long)]
    pub port: u16,
    /// What the answers say in `x-served-by`.
    #[arg(long)]
    pub name: String,
    /// Unix socket that gives the report so far.
    #[arg(long)]
    pub control: Option<PathBuf>,
}

impl WebOptions {
    /// A server of this name on this port.
    #[must_use]
    pub fn new(name: &str, port: u16) -> Self {
        Self {
            port,
            name: name.to_owned(),
            control: None,
        }
    }

    /// As arguments of `undermesh-traffic`.
    #[must_use]
    pub fn to_args(&self) -> Vec<String> {
        let mut args = vec![
            "web".to_owned(),
            format!("--port={}", self.port),
            format!("--name={}", self.name),
        ];
        if let Some(control) = &self.control {
            args.push(format!("--control={}", control.display()));
        }
        args
    }
}

/// An HTTP client.
#[derive(Debug, Clone, Args)]
pub struct LoadOptions {
    /// Where to connect.
    #[arg(long)]
    pub to: SocketAddr,
    /// `Host` or `:authority`.
    #[arg(long, default_value = "web")]
    pub host: String,
    /// Path and query.
    #[arg(long, default_value = "/")]
    pub path: String,
    /// Method.
    #[arg(long, default_value = "GET")]
    pub method: String,
    /// Requests a second, sent when they are due whatever became of those before; 0 is one after the other on
    /// every connection.
    #[arg(long, default_value_t = 0)]
    pub rate: u32,
    /// How long at most, in milliseconds.
    #[arg(long, default_value_t = 1000)]
    pub milliseconds: u64,
    /// Connections, each with one request at a time.
    #[arg(long, default_value_t = 16)]
    pub connections: u32,
    /// HTTP/2 rather than HTTP/1.1.
    #[arg(long)]
    pub http2: bool,
    /// Headers, as `name: value`.
    #[arg(long = "header")]
    pub headers: Vec<String>,
    /// Bytes of the request's body.
    #[arg(long, default_value_t = 0)]
    pub body: usize,
    /// Milliseconds after which a request is given up.
    #[arg(long, default_value_t = 10_000)]
    pub timeout_ms: u64,
    /// Unix socket that gives the report so far.
    #[arg(long)]
    pub control: Option<PathBuf>,
}

impl LoadOptions {
    /// GETs for a second, one after the other on 16 connections.
    #[must_use]
    pub fn new(to: SocketAddr) -> Self {
        Self {
            to,
            host: "web".to_owned(),
            path: "/".to_owned(),
            method: "GET".to_owned(),
            rate: 0,
            milliseconds: 1000,
            connections: 16,
            http2: false,
            headers: Vec::new(),
            body: 0,
            timeout_ms: 10_000,
            control: None,
        }
    }

    /// This many a second.
    #[must_use]
    pub fn rate(mut self, rate: u32) -> Self {
        self.rate = rate;
        self
    }

    /// For so long.
    #[must_use]
    pub fn during(mut self, duration: Duration) -> Self {
        self.milliseconds = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        self
    }

    /// On this many connections.
    #[must_use]
    pub fn connections(mut self, connections: u32) -> Self {
        self.connections = connections;
        self
    }

    /// Over HTTP/2.
    #[must_use]
    pub fn http2(mut self) -> Self {
        self.http2 = true;
        self
    }

    /// With another method.
    #[must_use]
    pub fn method(mut self, method: &str) -> Self {
        method.clone_into(&mut self.method);
        self
    }

    /// With a header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push(format!("{name}: {value}"));
        self
    }

    /// As arguments of `undermesh-traffic`.
    #[must_use]
    pub fn to_args(&self) -> Vec<String> {
        let mut args = vec![
            "load".to_owned(),
            format!("--to={}", self.to),
            format!("--host={}", self.host),
            format!("--path={}", self.path),
            format!("--method={}", self.method),
            format!("--rate={}", self.rate),
            format!("--milliseconds={}", self.milliseconds),
            format!("--connections={}", self.connections),
            format!("--body={}", self.body),
            format!("--timeout-ms={}", self.timeout_ms),
        ];
        if self.http2 {
            args.push("--http2".to_owned());
        }
        args.extend(self.headers.iter().map(|one| format!("--header={one}")));
        if let Some(control) = &self.control {
            args.push(format!("--control={}", control.display()));
        }
        args
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    enum Cli {
        Load(LoadOptions),
        Web(WebOptions),
    }

    fn parse(args: Vec<String>) -> Cli {
        Cli::parse_from(std::iter::once("undermesh-traffic".to_owned()).chain(args))
    }

    #[test]
    fn options_survive_the_command_line() {
        let load = LoadOptions::new("[fd00::1]:80".parse().unwrap())
            .rate(500)
            .during(Duration::from_secs(3))
            .http2()
            .header("x-version", "v2");
        let Cli::Load(parsed) = parse(load.to_args()) else {
            panic!("not load");
        };
        assert_eq!(parsed.to_args(), load.to_args());
        let web = WebOptions::new("v1", 8080);
        let Cli::Web(parsed) = parse(web.to_args()) else {
            panic!("not web");
        };
        assert_eq!(parsed.to_args(), web.to_args());
    }
}
