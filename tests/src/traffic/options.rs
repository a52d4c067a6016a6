//! What the traffic program is told, on its command line and by tests.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

/// What the server does on which ports. Every port is served on IPv4 and IPv6.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct ServeOptions {
    /// Sends back what it gets, then half-closes.
    #[arg(long, value_name = "PORT")]
    pub echo: Vec<u16>,
    /// Checks what it gets and sends as much as it is asked for, both at once.
    #[arg(long, value_name = "PORT")]
    pub exchange: Vec<u16>,
    /// Speaks first, as SMTP and MySQL do, then echoes.
    #[arg(long, value_name = "PORT")]
    pub banner: Vec<u16>,
    /// Compares the address that the client says is its own with the one that it sees, says which it is, and
    /// reads until the end.
    #[arg(long, value_name = "PORT")]
    pub origin: Vec<u16>,
    /// Ends in order in the middle of what it announced: what must never happen to a stream.
    #[arg(long, value_name = "PORT")]
    pub truncate: Vec<u16>,
    /// Reads until the end.
    #[arg(long, value_name = "PORT")]
    pub sink: Vec<u16>,
    /// Sends until the client has had enough.
    #[arg(long, value_name = "PORT")]
    pub source: Vec<u16>,
    /// Sends UDP datagrams back.
    #[arg(long, value_name = "PORT")]
    pub udp_echo: Vec<u16>,
    /// A unix socket; whoever connects gets the report so far.
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
}

impl ServeOptions {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Echoes on `port`.
    #[must_use]
    pub fn echo(mut self, port: u16) -> Self {
        self.echo.push(port);
        self
    }

    /// Exchanges on `port`.
    #[must_use]
    pub fn exchange(mut self, port: u16) -> Self {
        self.exchange.push(port);
        self
    }

    /// Speaks first on `port`.
    #[must_use]
    pub fn banner(mut self, port: u16) -> Self {
        self.banner.push(port);
        self
    }

    /// Tells direct connections from others on `port`.
    #[must_use]
    pub fn origin(mut self, port: u16) -> Self {
        self.origin.push(port);
        self
    }

    /// Truncates on `port`.
    #[must_use]
    pub fn truncate(mut self, port: u16) -> Self {
        self.truncate.push(port);
        self
    }

    /// Reads on `port`.
    #[must_use]
    pub fn sink(mut self, port: u16) -> Self {
        self.sink.push(port);
        self
    }

    /// Sends on `port`.
    #[must_use]
    pub fn source(mut self, port: u16) -> Self {
        self.source.push(port);
        self
    }

    /// Echoes datagrams on `port`.
    #[must_use]
    pub fn udp_echo(mut self, port: u16) -> Self {
        self.udp_echo.push(port);
        self
    }

    /// TCP ports it listens on.
    #[must_use]
    pub fn tcp_ports(&self) -> Vec<u16> {
        [
            &self.echo,
            &self.exchange,
            &self.banner,
            &self.origin,
            &self.truncate,
            &self.sink,
            &self.source,
        ]
        .into_iter()
        .flatten()
        .copied()
        .collect()
    }

    /// As arguments of `undermesh-traffic`.
    #[must_use]
    pub fn to_args(&self) -> Vec<String> {
        let mut args = vec!["serve".to_owned()];
        for (name, ports) in [
            ("--echo", &self.echo),
            ("--exchange", &self.exchange),
            ("--banner", &self.banner),
            ("--origin", &self.origin),
            ("--truncate", &self.truncate),
            ("--sink", &self.sink),
            ("--source", &self.source),
            ("--udp-echo", &self.udp_echo),
        ] {
            for port in ports {
                args.extend([name.to_owned(), port.to_string()]);
            }
        }
        if let Some(path) = &self.control {
            args.extend(["--control".to_owned(), path.display().to_string()]);
        }
        args
    }
}

/// What a client does on one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Kind {
    /// To `--echo`: `requests` round trips of `bytes`, each sent and read back at once, then a half-close that
    /// must be answered by the end.
    #[default]
    Echo,
    /// To `--exchange`: `bytes` up and `answer` bytes down at the same time, both checked, with half-closes.
    Exchange,
    /// To `--banner`: reads the banner before it sends anything, then as `echo`.
    Banner,
    /// To `--origin`: says its own address, and counts what the server says.
    Origin,
    /// To `--source`: reads `bytes`, then closes while the server still sends.
    EarlyClose,
    /// Connects, and closes.
    Connect,
    /// To `--udp-echo`: `requests` datagrams of `bytes`.
    Udp,
}

impl Kind {
    fn as_arg(self) -> &'static str {
        match self {
            Self::Echo => "echo",
            Self::Exchange => "exchange",
            Self::Banner => "banner",
            Self::Origin => "origin",
            Self::EarlyClose => "early-close",
            Self::Connect => "connect",
            Self::Udp => "udp",
        }
    }
}

/// What the client does.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct ClientOptions {
    /// Where to; several are taken in turn.
    #[arg(long, value_name = "ADDR:PORT", required = true)]
    pub to: Vec<SocketAddr>,
    /// What to do on each connection.
    #[arg(long, value_enum, default_value_t)]
    pub kind: Kind,
    /// How many connections in all; 0: as many as fit into the duration.
    #[arg(long, default_value_t = 1)]
    pub connections: u64,
    /// How many at a time.
    #[arg(long, default_value_t = 1)]
    pub concurrency: u64,
    /// Opens no more connections after this time; those that are open finish.
    #[arg(long, value_parser = parse_duration)]
    pub duration: Option<Duration>,
    /// Payload of a request, in bytes.
    #[arg(long, default_value_t = 1024)]
    pub bytes: u64,
    /// Payload that the server sends in an exchange, in bytes.
    #[arg(long, default_value_t = 0)]
    pub answer: u64,
    /// Round trips on each connection.
    #[arg(long, default_value_t = 1)]
    pub requests: u64,
    /// Pause between the round trips of a connection.
    #[arg(long, value_parser = parse_duration)]
    pub think: Option<Duration>,
    /// Pause of each worker between its connections.
    #[arg(long, value_parser = parse_duration)]
    pub pause: Option<Duration>,
    /// A slow reader: bytes per second that each connection reads at most.
    #[arg(long)]
    pub read_rate: Option<u64>,
    /// A string in every 64 bytes of payload, of at most 44 bytes.
    #[arg(long, default_value = "undermesh-traffic")]
    pub marker: String,
    /// Time for one connection, from connect to end.
    #[arg(long, value_parser = parse_duration, default_value = "30s")]
    pub timeout: Duration,
    /// A unix socket; whoever connects gets the report so far.
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
}

impl ClientOptions {
    /// One connection of `kind`.
    #[must_use]
    pub fn new(kind: Kind, to: SocketAddr) -> Self {
        Self {
            to: vec![to],
            kind,
            connections: 1,
            concurrency: 1,
            duration: None,
            bytes: 1024,
            answer: 0,
            requests: 1,
            think: None,
            pause: None,
            read_rate: None,
            marker: "undermesh-traffic".to_owned(),
            timeout: Duration::from_secs(30),
            control: None,
        }
    }

    /// One connection, one round trip of 1 KiB.
    #[must_use]
    pub fn echo(to: SocketAddr) -> Self {
        Self::new(Kind::Echo, to)
    }

    /// `up` bytes to the server and `down` bytes from it, at the same time.
    #[must_use]
    pub fn exchange(to: SocketAddr, up: u64, down: u64) -> Self {
        Self {
            bytes: up,
            answer: down,
            ..Self::new(Kind::Exchange, to)
        }
    }

    /// One more destination.
    #[must_use]
    pub fn and_to(mut self, to: SocketAddr) -> Self {
        self.to.push(to);
        self
    }

    /// How many connections; 0 for as many as fit into the duration.
    #[must_use]
    pub fn connections(mut self, count: u64) -> Self {
        self.connections = count;
        self
    }

    /// How many at a time.
    #[must_use]
    pub fn concurrency(mut self, count: u64) -> Self {
        self.concurrency = count;
        self
    }

    /// As many connections as fit into `duration`.
    #[must_use]
    pub fn during(mut self, duration: Duration) -> Self {
        self.duration = Some(duration);
        self.connections = 0;
        self
    }

    /// Payload of a request in bytes.
    #[must_use]
    pub fn bytes(mut self, bytes: u64) -> Self {
        self.bytes = bytes;
        self
    }

    /// Round trips on each connection.
    #[must_use]
    pub fn requests(mut self, count: u64) -> Self {
        self.requests = count;
        self
    }

    /// Pause between round trips.
    #[must_use]
    pub fn think(mut self, pause: Duration) -> Self {
        self.think = Some(pause);
        self
    }

    /// Pause of each worker between its connections.
    #[must_use]
    pub fn pause(mut self, pause: Duration) -> Self {
        self.pause = Some(pause);
        self
    }

    /// Bytes per second that each connection reads at most.
    #[must_use]
    pub fn read_rate(mut self, rate: u64) -> Self {
        self.read_rate = Some(rate);
        self
    }

    /// The string in every payload.
    #[must_use]
    pub fn marker(mut self, marker: &str) -> Self {
        marker.clone_into(&mut self.marker);
        self
    }

    /// Time for one connection.
    #[must_use]
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.timeout = limit;
        self
    }

    /// As arguments of `undermesh-traffic`.
    #[must_use]
    pub fn to_args(&self) -> Vec<String> {
        let mut args = vec!["client".to_owned()];
        let mut add = |name: &str, value: String| args.extend([name.to_owned(), value]);
        for to in &self.to {
            add("--to", to.to_string());
        }
        add("--kind", self.kind.as_arg().to_owned());
        add("--connections", self.connections.to_string());
        add("--concurrency", self.concurrency.to_string());
        add("--bytes", self.bytes.to_string());
        add("--answer", self.answer.to_string());
        add("--requests", self.requests.to_string());
        add("--marker", self.marker.clone());
        add("--timeout", format_duration(self.timeout));
        for (name, value) in [
            ("--duration", self.duration),
            ("--think", self.think),
            ("--pause", self.pause),
        ] {
            if let Some(value) = value {
                add(name, format_duration(value));
            }
        }
        if let Some(rate) = self.read_rate {
            add("--read-rate", rate.to_string());
        }
        if let Some(path) = &self.control {
            add("--control", path.display().to_string());
        }
        args
    }
}

pub(crate) fn format_duration(duration: Duration) -> String {
    format!("{}us", duration.as_micros())
}

pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number
        .parse()
        .map_err(|_| format!("{text:?} is not a duration such as 5s or 200ms"))?;
    match unit {
        "us" => Ok(Duration::from_micros(number)),
        "ms" => Ok(Duration::from_millis(number)),
        "s" | "" => Ok(Duration::from_secs(number)),
        "m" => Ok(Duration::from_secs(number.saturating_mul(60))),
        _ => Err(format!("{unit:?} is not one of us, ms, s, m")),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Client {
        #[command(flatten)]
        options: ClientOptions,
    }

    #[derive(Parser)]
    struct Serve {
        #[command(flatten)]
        options: ServeOptions,
    }

    #[test]
    fn client_options_survive_the_command_line() {
        let options = ClientOptions::exchange("[fd00::1]:80".parse().unwrap(), 5, 6)
            .and_to("10.0.0.1:81".parse().unwrap())
            .concurrency(7)
            .during(Duration::from_millis(1500))
            .requests(3)
            .think(Duration::from_secs(2))
            .pause(Duration::from_micros(9))
            .read_rate(100)
            .marker("m")
            .timeout(Duration::from_secs(4));
        let parsed = Client::parse_from(options.to_args()).options;
        assert_eq!(parsed, options);
    }

    #[test]
    fn serve_options_survive_the_command_line() {
        let mut options = ServeOptions::new()
            .echo(1)
            .echo(2)
            .exchange(3)
            .banner(4)
            .origin(8)
            .truncate(9)
            .sink(5)
            .source(6)
            .udp_echo(7);
        options.control = Some("/tmp/x".into());
        let parsed = Serve::parse_from(options.to_args()).options;
        assert_eq!(parsed, options);
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(parse_duration("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(parse_duration("200ms"), Ok(Duration::from_millis(200)));
        assert!(parse_duration("5 s").is_err());
        assert!(parse_duration("s").is_err());
    }
}
