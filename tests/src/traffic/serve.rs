//! The server.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use super::options::ServeOptions;
use super::payload::Pattern;
use super::report::ServerReport;
use super::{client, control};

pub(super) const BANNER: &[u8] = b"220 undermesh-traffic speaks first\r\n";
/// What `--origin` answers.
pub(super) const DIRECT: &str = "direct\n";
pub(super) const PROXIED: &str = "proxied\n";
const BUFFER: usize = 64 * 1024;
const BACKLOG: i32 = 4096;
const LONGEST_HEADER: u64 = 1024;

/// The first line of an exchange, in JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Exchange {
    /// Bytes that the client will send, of the pattern with `seed`.
    pub send: u64,
    /// Bytes that it wants, of the pattern with `seed + 1`.
    pub answer: u64,
    /// Seed.
    pub seed: u32,
    /// Marker of both patterns.
    pub marker: String,
}

impl Exchange {
    /// What the server says after the last byte that it sends, if all it got was right.
    pub fn verdict(&self) -> String {
        format!("received {}\n", self.send)
    }
}

#[derive(Debug, Clone, Copy)]
enum Service {
    Echo,
    Exchange,
    Banner,
    Origin,
    Truncate,
    Sink,
    Source,
}

type Shared = Arc<Mutex<ServerReport>>;

/// Serves until SIGTERM or SIGINT, then writes its report to stdout.
pub async fn run(options: ServeOptions) -> Result<()> {
    let report = Shared::default();
    let services = [
        (Service::Echo, &options.echo),
        (Service::Exchange, &options.exchange),
        (Service::Banner, &options.banner),
        (Service::Origin, &options.origin),
        (Service::Truncate, &options.truncate),
        (Service::Sink, &options.sink),
        (Service::Source, &options.source),
    ];
    for (service, ports) in services {
        for port in ports {
            let listener = listen(*port).with_context(|| format!("port {port}"))?;
            tokio::spawn(accept(listener, service, Arc::clone(&report)));
        }
    }
    for port in &options.udp_echo {
        let socket = UdpSocket::from_std(bind(Type::DGRAM, Protocol::UDP, *port)?.into())?;
        tokio::spawn(echo_datagrams(socket, Arc::clone(&report)));
    }
    // Last: whoever finds it may connect to all the rest.
    if let Some(path) = options.control {
        let report = Arc::clone(&report);
        control::listen(path, Arc::new(move || lock(&report).clone()))?;
    }
    client::asked_to_stop().await?;
    println!("{}", serde_json::to_string(&*lock(&report))?);
    Ok(())
}

fn lock(report: &Shared) -> MutexGuard<'_, ServerReport> {
    report.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Listens on IPv4 and IPv6.
pub(crate) fn listen(port: u16) -> io::Result<TcpListener> {
    let socket = bind(Type::STREAM, Protocol::TCP, port)?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Both families on one socket, or IPv4 alone where there is no IPv6.
fn bind(kind: Type, protocol: Protocol, port: u16) -> io::Result<Socket> {
    let both = || {
        let socket = Socket::new(Domain::IPV6, kind, Some(protocol))?;
        socket.set_only_v6(false)?;
        Ok((socket, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))))
    };
    let one = || {
        let socket = Socket::new(Domain::IPV4, kind, Some(protocol))?;
        io::Result::Ok((socket, SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))))
    };
    let (socket, address) = both().or_else(|_: io::Error| one())?;
    if kind == Type::STREAM {
        socket.set_reuse_address(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

async fn accept(listener: TcpListener, service: Service, report: Shared) {
    loop {
        let Ok((stream, peer)) = listener.accept().await else {
            // Out of descriptors: some will come back.
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let Ok(local) = stream.local_addr() else {
            continue;
        };
        lock(&report).accept(peer, local);
        let report = Arc::clone(&report);
        tokio::spawn(async move {
            let end = serve(stream, service, &report).await;
            lock(&report).end(end);
        });
    }
}

async fn serve(mut stream: TcpStream, service: Service, report: &Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    match service {
        Service::Echo => echo(stream, report).await,
        Service::Banner => {
            stream.write_all(BANNER).await?;
            lock(report).bytes_sent += BANNER.len() as u64;
            echo(stream, report).await
        }
        Service::Origin => origin(stream, report).await,
        Service::Truncate => truncate(stream).await,
        Service::Sink => sink(stream, report).await,
        Service::Source => source(stream, report).await,
        Service::Exchange => exchange(stream, report).await,
    }
}

async fn echo(mut stream: TcpStream, report: &Shared) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = stream.read(&mut buffer).await?;
        if length == 0 {
            return stream.shutdown().await;
        }
        lock(report).bytes_received += length as u64;
        stream.write_all(&buffer[..length]).await?;
        lock(report).bytes_sent += length as u64;
    }
}

/// A proxy comes from a port of its own; a client that came by itself is seen as it sees itself.
async fn origin(stream: TcpStream, report: &Shared) -> io::Result<()> {
    let peer = stream.peer_addr()?;
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port()).to_string();
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    let mut read = BufReader::new(read.take(LONGEST_HEADER));
    read.read_line(&mut line).await?;
    let Some((_, says)) = line.trim_end().rsplit_once(' ') else {
        return Err(io::ErrorKind::UnexpectedEof.into());
    };
    let answer = if says == peer {
        lock(report).direct += 1;
        DIRECT
    } else {
        lock(report).proxied += 1;
        PROXIED
    };
    write.write_all(answer.as_bytes()).await?;
    write.shutdown().await
}

/// Announces nothing and answers an exchange with half of what was asked for, and a clean end.
async fn truncate(stream: TcpStream) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::with_capacity(BUFFER, read);
    let mut header = String::new();
    (&mut read)
        .take(LONGEST_HEADER)
        .read_line(&mut header)
        .await?;
    let exchange: Exchange = serde_json::from_str(&header)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    let answer = Pattern::new(&exchange.marker, exchange.seed.wrapping_add(1));
    let mut half = vec![0; client::at_most(exchange.answer / 2, BUFFER)];
    answer.fill(0, &mut half);
    write.write_all(&half).await?;
    write.shutdown().await?;
    tokio::io::copy(&mut read, &mut tokio::io::sink()).await?;
    Ok(())
}

async fn sink(mut stream: TcpStream, report: &Shared) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = stream.read(&mut buffer).await?;
        if length == 0 {
            return stream.shutdown().await;
        }
        lock(report).bytes_received += length as u64;
    }
}

/// Ends when the client goes: that is how a source is meant to end, so a reset is in order here.
async fn source(mut stream: TcpStream, report: &Shared) -> io::Result<()> {
    let pattern = Pattern::new("source", 0);
    let mut buffer = vec![0; BUFFER];
    let mut offset = 0;
    loop {
        pattern.fill(offset, &mut buffer);
        match stream.write_all(&buffer).await {
            Ok(()) => {}
            Err(error) if super::Failure::from(&error) == super::Failure::Reset => return Ok(()),
            Err(error) => return Err(error),
        }
        offset += buffer.len() as u64;
        lock(report).bytes_sent += buffer.len() as u64;
    }
}

async fn exchange(stream: TcpStream, report: &Shared) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::with_capacity(BUFFER, read);
    let mut header = String::new();
    (&mut read)
        .take(LONGEST_HEADER)
        .read_line(&mut header)
        .await?;
    let exchange: Exchange = serde_json::from_str(&header)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;

    let wanted = Pattern::new(&exchange.marker, exchange.seed);
    let receive = async {
        let mut buffer = vec![0; BUFFER];
        let mut scratch = Vec::new();
        let mut offset = 0;
        loop {
            let length = read.read(&mut buffer).await?;
            if length == 0 {
                break;
            }
            if !wanted.matches(offset, &buffer[..length], &mut scratch) {
                return Err(io::ErrorKind::InvalidData.into());
            }
            offset += length as u64;
            lock(report).bytes_received += length as u64;
        }
        if offset == exchange.send {
            Ok(())
        } else {
            Err(io::Error::from(io::ErrorKind::UnexpectedEof))
        }
    };
    let answer = Pattern::new(&exchange.marker, exchange.seed.wrapping_add(1));
    let send = async {
        let mut buffer = vec![0; BUFFER];
        let mut offset = 0;
        while offset < exchange.answer {
            let length = client::at_most(exchange.answer - offset, BUFFER);
            answer.fill(offset, &mut buffer[..length]);
            write.write_all(&buffer[..length]).await?;
            offset += length as u64;
            lock(report).bytes_sent += length as u64;
        }
        Ok(())
    };
    let ((), ()) = tokio::try_join!(receive, send)?;
    write.write_all(exchange.verdict().as_bytes()).await?;
    write.shutdown().await
}

async fn echo_datagrams(socket: UdpSocket, report: Shared) {
    let mut buffer = vec![0; BUFFER];
    loop {
        if let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
            {
                let mut report = lock(&report);
                report.datagrams += 1;
                report.bytes_received += length as u64;
            }
            // A datagram that cannot be sent is lost, as datagrams are.
            let _ = socket.send_to(&buffer[..length], peer).await;
        }
    }
}
