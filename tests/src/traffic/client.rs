//! The client.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::signal::unix::{SignalKind, signal};

use super::control;
use super::options::{ClientOptions, Kind};
use super::payload::Pattern;
use super::report::{ClientReport, Failure, Latencies};
use super::serve::{BANNER, Exchange};

const BUFFER: usize = 64 * 1024;

#[derive(Debug, Default)]
struct Counts {
    report: ClientReport,
    connect: Latencies,
    operation: Latencies,
}

#[derive(Debug)]
struct Client {
    options: ClientOptions,
    counts: Mutex<Counts>,
    tickets: AtomicU64,
    end: Option<Instant>,
}

/// Does what it is told, writes its report to stdout, and says whether nothing failed. SIGTERM and SIGINT make
/// it open no more connections.
pub async fn run(options: ClientOptions) -> Result<bool> {
    let client = Arc::new(Client {
        end: options.duration.map(|duration| Instant::now() + duration),
        counts: Mutex::default(),
        tickets: AtomicU64::new(0),
        options,
    });
    if let Some(path) = client.options.control.clone() {
        let client = Arc::clone(&client);
        control::listen(path, Arc::new(move || client.report(false)))?;
    }
    let workers: Vec<_> = (0..client.options.concurrency.max(1))
        .map(|_| tokio::spawn(Arc::clone(&client).work()))
        .collect();
    let stopper = {
        let client = Arc::clone(&client);
        tokio::spawn(async move {
            if asked_to_stop().await.is_ok() {
                // No ticket is left.
                client.tickets.store(u64::MAX / 2, Ordering::SeqCst);
            }
        })
    };
    for worker in workers {
        worker.await?;
    }
    stopper.abort();
    let report = client.report(true);
    println!("{}", serde_json::to_string(&report)?);
    Ok(report.failed == 0)
}

/// Returns at SIGTERM or SIGINT.
pub(crate) async fn asked_to_stop() -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// `left`, but no more than `bound`.
pub(super) fn at_most(left: u64, bound: usize) -> usize {
    usize::try_from(left).map_or(bound, |left| left.min(bound))
}

impl Client {
    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, finished: bool) -> ClientReport {
        let counts = self.lock();
        ClientReport {
            connect: counts.connect.summary(),
            operation: counts.operation.summary(),
            finished,
            ..counts.report.clone()
        }
    }

    /// The number of the next connection, if there is to be one.
    fn ticket(&self) -> Option<u64> {
        let number = self.tickets.fetch_add(1, Ordering::SeqCst);
        let total = match self.options.connections {
            // As many as fit; the bound is where a request to stop puts the counter.
            0 => u64::MAX / 2,
            total => total,
        };
        let in_time = self.end.is_none_or(|end| Instant::now() < end);
        (number < total && in_time).then_some(number)
    }

    async fn work(self: Arc<Self>) {
        while let Some(number) = self.ticket() {
            let to = self.options.to[at_most(number % self.options.to.len() as u64, usize::MAX)];
            let limit = self.options.timeout;
            let outcome = tokio::time::timeout(limit, Box::pin(self.connection(number, to))).await;
            let outcome = outcome.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            {
                let mut counts = self.lock();
                match outcome {
                    Ok(()) => counts.report.ok += 1,
                    Err(error) => counts
                        .report
                        .fail(Failure::from(&error), format!("#{number} to {to}: {error}")),
                }
            }
            if let Some(pause) = self.options.pause {
                tokio::time::sleep(pause).await;
            }
        }
    }

    async fn connection(&self, number: u64, to: SocketAddr) -> io::Result<()> {
        if self.options.kind == Kind::Udp {
            return self.datagrams(number, to).await;
        }
        self.lock().report.attempted += 1;
        let start = Instant::now();
        let stream = TcpStream::connect(to).await?;
        let elapsed = start.elapsed();
        let (local, peer) = (stream.local_addr()?, stream.peer_addr()?);
        {
            let mut counts = self.lock();
            counts.connect.record(elapsed);
            counts.report.connected(local.ip(), peer);
        }
        stream.set_nodelay(true)?;
        let seed = u32::try_from(number.wrapping_mul(2) & 0xffff_ffff).unwrap_or(0);
        match self.options.kind {
            Kind::Connect | Kind::Udp => Ok(()),
            Kind::Echo => self.round_trips(stream, seed, &[]).await,
            Kind::Banner => self.round_trips(stream, seed, BANNER).await,
            Kind::Exchange => self.exchange(stream, seed).await,
            Kind::EarlyClose => self.early_close(stream).await,
        }
    }

    async fn round_trips(&self, stream: TcpStream, seed: u32, greeting: &[u8]) -> io::Result<()> {
        let pattern = Pattern::new(&self.options.marker, seed);
        let (mut read, mut write) = stream.into_split();
        if !greeting.is_empty() {
            let mut got = vec![0; greeting.len()];
            read.read_exact(&mut got).await?;
            if got != greeting {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        let bytes = self.options.bytes;
        for request in 0..self.options.requests {
            if let Some(think) = self.options.think.filter(|_| request > 0) {
                tokio::time::sleep(think).await;
            }
            let start = Instant::now();
            let offset = request * bytes;
            tokio::try_join!(
                self.send(&mut write, &pattern, offset, bytes),
                self.receive(&mut read, &pattern, offset, bytes),
            )?;
            self.lock().operation.record(start.elapsed());
        }
        write.shutdown().await?;
        expect_end(&mut read).await
    }

    async fn exchange(&self, stream: TcpStream, seed: u32) -> io::Result<()> {
        let exchange = Exchange {
            send: self.options.bytes,
            answer: self.options.answer,
            seed,
            marker: self.options.marker.clone(),
        };
        let (mut read, mut write) = stream.into_split();
        let start = Instant::now();
        let upward = Pattern::new(&exchange.marker, seed);
        let downward = Pattern::new(&exchange.marker, seed.wrapping_add(1));
        let send = async {
            let mut header = serde_json::to_vec(&exchange)?;
            header.push(b'\n');
            write.write_all(&header).await?;
            self.send(&mut write, &upward, 0, exchange.send).await?;
            write.shutdown().await
        };
        let receive = async {
            self.receive(&mut read, &downward, 0, exchange.answer)
                .await?;
            let verdict = exchange.verdict();
            let mut got = vec![0; verdict.len()];
            read.read_exact(&mut got).await?;
            if got != verdict.as_bytes() {
                return Err(io::ErrorKind::InvalidData.into());
            }
            expect_end(&mut read).await
        };
        tokio::try_join!(send, receive)?;
        self.lock().operation.record(start.elapsed());
        Ok(())
    }

    async fn early_close(&self, mut stream: TcpStream) -> io::Result<()> {
        let pattern = Pattern::new("source", 0);
        self.receive(&mut stream, &pattern, 0, self.options.bytes)
            .await
    }

    async fn send<W: AsyncWrite + Unpin>(
        &self,
        write: &mut W,
        pattern: &Pattern,
        offset: u64,
        bytes: u64,
    ) -> io::Result<()> {
        let mut buffer = vec![0; at_most(bytes, BUFFER)];
        let mut sent = 0;
        while sent < bytes {
            let length = at_most(bytes - sent, BUFFER);
            pattern.fill(offset + sent, &mut buffer[..length]);
            write.write_all(&buffer[..length]).await?;
            sent += length as u64;
            self.lock().report.bytes_sent += length as u64;
        }
        Ok(())
    }

    async fn receive<R: AsyncRead + Unpin>(
        &self,
        read: &mut R,
        pattern: &Pattern,
        offset: u64,
        bytes: u64,
    ) -> io::Result<()> {
        let mut buffer = vec![0; at_most(bytes, BUFFER)];
        let mut scratch = Vec::new();
        let mut received = 0;
        let start = Instant::now();
        while received < bytes {
            let length = at_most(bytes - received, BUFFER);
            let length = read.read(&mut buffer[..length]).await?;
            if length == 0 {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    format!("end after {received} of {bytes} bytes"),
                ));
            }
            if !pattern.matches(offset + received, &buffer[..length], &mut scratch) {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("wrong bytes at {}", offset + received),
                ));
            }
            received += length as u64;
            self.lock().report.bytes_received += length as u64;
            if let Some(rate) = self.options.read_rate.filter(|rate| *rate > 0) {
                let due = Duration::from_nanos(
                    u64::try_from(u128::from(received) * 1_000_000_000 / u128::from(rate))
                        .unwrap_or(u64::MAX),
                );
                tokio::time::sleep(due.saturating_sub(start.elapsed())).await;
            }
        }
        Ok(())
    }

    async fn datagrams(&self, number: u64, to: SocketAddr) -> io::Result<()> {
        let any: SocketAddr = if to.is_ipv4() {
            ([0, 0, 0, 0], 0).into()
        } else {
            ([0u16; 8], 0).into()
        };
        let socket = UdpSocket::bind(any).await?;
        self.lock().report.attempted += 1;
        socket.connect(to).await?;
        let (local, peer) = (socket.local_addr()?, socket.peer_addr()?);
        self.lock().report.connected(local.ip(), peer);
        let seed = u32::try_from(number & 0xffff_ffff).unwrap_or(0);
        let pattern = Pattern::new(&self.options.marker, seed);
        let length = at_most(self.options.bytes, 1400);
        let (mut sent, mut got) = (vec![0; length], vec![0; BUFFER]);
        for request in 0..self.options.requests {
            pattern.fill(request * length as u64, &mut sent);
            let start = Instant::now();
            socket.send(&sent).await?;
            let received = socket.recv(&mut got).await?;
            if got[..received] != sent {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let mut counts = self.lock();
            counts.operation.record(start.elapsed());
            counts.report.bytes_sent += length as u64;
            counts.report.bytes_received += length as u64;
        }
        Ok(())
    }
}

async fn expect_end<R: AsyncRead + Unpin>(read: &mut R) -> io::Result<()> {
    if read.read(&mut [0; 1]).await? == 0 {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "bytes after the end",
        ))
    }
}
