//! The client: one thread, so that it is one processor that loads and not the scheduler.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, LocalSet};

use super::clock::Pace;
use super::options::{LoadKind, LoadOptions};
use super::report::{Latencies, LoadReport, SinkReport};
use super::{http, pin};
use crate::process;
use crate::traffic::{asked_to_stop, query};

const BULK_BYTES: usize = 128 * 1024;
const MESSAGE: [u8; 64] = [b'E'; 64];
/// Requests that are due and not sent: beyond it they count as failed.
const MOST_WAITING: usize = 100_000;
/// For what was due in the window and is under way at its end.
const GRACE: Duration = Duration::from_secs(2);
/// Connections of `hold` that are being opened at a time.
const OPENING: usize = 64;
/// After a failure, so that a dead server is not a busy loop.
const PAUSE: Duration = Duration::from_millis(5);

/// What the connections share.
struct Shared {
    options: LoadOptions,
    measuring: RefCell<Measuring>,
    due: RefCell<VecDeque<Instant>>,
    waiting: Semaphore,
    opening: Semaphore,
}

struct Measuring {
    from: Option<Instant>,
    until: Option<Instant>,
    report: LoadReport,
    latencies: Latencies,
    /// Of an open loop: due in the window, and not answered yet.
    outstanding: u64,
    /// Of an open loop: until when it is known what was due.
    known: Option<Instant>,
}

impl Measuring {
    fn in_window(&self, at: Instant) -> bool {
        self.from.is_some_and(|from| at >= from) && self.until.is_none_or(|until| at < until)
    }

    /// Of an open loop: whether all that was due in the window is known and answered.
    fn is_over(&self) -> bool {
        self.known >= self.until && self.outstanding == 0
    }
}

/// Does what it is told and writes its report to stdout.
pub async fn run(options: LoadOptions) -> Result<()> {
    if let Some(cpu) = options.cpu {
        pin(cpu)?;
    }
    let shared = Rc::new(Shared {
        options,
        measuring: RefCell::new(Measuring {
            from: None,
            until: None,
            report: LoadReport::default(),
            latencies: Latencies::new()?,
            outstanding: 0,
            known: None,
        }),
        due: RefCell::default(),
        waiting: Semaphore::new(0),
        opening: Semaphore::new(OPENING),
    });
    LocalSet::new().run_until(load(shared)).await
}

async fn load(shared: Rc<Shared>) -> Result<()> {
    let mut connections = JoinSet::new();
    for number in 0..shared.options.connections.max(1) {
        let shared = Rc::clone(&shared);
        connections.spawn_local(async move { Box::pin(shared.connection(number)).await });
    }
    if shared.options.kind == LoadKind::Hold {
        return hold(&shared, connections).await;
    }
    if let Some(rate) = shared.options.rate {
        let mut pace = Pace::start(rate)?;
        let shared = Rc::clone(&shared);
        tokio::task::spawn_local(async move {
            while let Some(due) = pace.due().await {
                shared.add(&due);
            }
        });
    }
    tokio::time::sleep(shared.options.warm_up).await;
    let before = shared.look()?;
    shared.measuring.borrow_mut().from = Some(before.at);
    tokio::time::sleep(shared.options.window).await;
    let after = shared.look()?;
    shared.measuring.borrow_mut().until = Some(after.at);
    let grace = Instant::now() + GRACE;
    if shared.options.rate.is_some() {
        while !shared.measuring.borrow().is_over() && Instant::now() < grace {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    let mut measuring = shared.measuring.borrow_mut();
    for _ in 0..measuring.outstanding {
        measuring.report.fail("no answer in time");
    }
    let mut report = std::mem::take(&mut measuring.report);
    report.latency = measuring.latencies.summary();
    report.seconds = (after.at - before.at).as_secs_f64();
    report.bytes = after.received - before.received;
    report.watched_cpu_seconds = after.cpu.saturating_sub(before.cpu).as_secs_f64();
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

/// Says when all are open, and closes them at the end.
async fn hold(shared: &Shared, mut connections: JoinSet<Option<TcpStream>>) -> Result<()> {
    let mut open = Vec::new();
    while let Some(connection) = connections.join_next().await {
        open.extend(connection?);
    }
    let mut report = std::mem::take(&mut shared.measuring.borrow_mut().report);
    report.operations = open.len() as u64;
    println!("{}", serde_json::to_string(&report)?);
    asked_to_stop().await?;
    Ok(())
}

/// What others counted so far.
struct Look {
    at: Instant,
    received: u64,
    cpu: Duration,
}

impl Shared {
    fn look(&self) -> Result<Look> {
        let received = match &self.options.server {
            Some(path) => query::<SinkReport>(path)?.received,
            None => 0,
        };
        let mut cpu = Duration::ZERO;
        for pid in &self.options.watch {
            cpu += process::cpu_time(*pid).with_context(|| format!("process {pid} is gone"))?;
        }
        Ok(Look {
            at: Instant::now(),
            received,
            cpu,
        })
    }

    fn add(&self, due: &[Instant]) {
        let mut queue = self.due.borrow_mut();
        let mut measuring = self.measuring.borrow_mut();
        for &at in due {
            let counts = measuring.in_window(at);
            if queue.len() >= MOST_WAITING {
                measuring.report.fail("too many requests wait");
                continue;
            }
            measuring.outstanding += u64::from(counts);
            queue.push_back(at);
            self.waiting.add_permits(1);
        }
        measuring.known = due.last().copied().or(measuring.known);
    }

    /// Of a closed loop: counts if it ended in the window.
    fn done(&self, start: Instant) {
        let now = Instant::now();
        let mut measuring = self.measuring.borrow_mut();
        if measuring.in_window(now) {
            measuring.report.operations += 1;
            measuring.latencies.record(now - start);
        }
    }

    /// Of an open loop: counts if it was due in the window.
    fn answered(&self, due: Instant, outcome: io::Result<()>) -> io::Result<()> {
        let now = Instant::now();
        let mut measuring = self.measuring.borrow_mut();
        if measuring.in_window(due) {
            measuring.outstanding = measuring.outstanding.saturating_sub(1);
            if outcome.is_ok() {
                measuring.report.operations += 1;
                measuring.latencies.record(now - due);
            }
        }
        outcome
    }

    fn to(&self, number: usize) -> SocketAddr {
        self.options.to[number % self.options.to.len()]
    }

    /// Keeps one connection busy to the end of the program; gives it back where it is to be idle.
    async fn connection(&self, number: usize) -> Option<TcpStream> {
        let mut turn = number;
        loop {
            let to = self.to(turn);
            turn += self.options.connections;
            let outcome = match self.options.kind {
                LoadKind::Bulk => bulk(to).await,
                LoadKind::PingPong => self.ping_pong(to).await,
                LoadKind::Connect => self.connect(to).await,
                LoadKind::Http => self.http(to).await,
                LoadKind::Hold => match self.open(to).await {
                    Ok(stream) => return Some(stream),
                    Err(error) => Err(error),
                },
            };
            if let Err(error) = outcome {
                self.measuring.borrow_mut().report.fail(error);
                if self.options.kind == LoadKind::Hold {
                    return None;
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    }

    async fn ping_pong(&self, to: SocketAddr) -> io::Result<()> {
        let mut stream = open(to).await?;
        let mut echo = [0; MESSAGE.len()];
        loop {
            let start = Instant::now();
            stream.write_all(&MESSAGE).await?;
            stream.read_exact(&mut echo).await?;
            self.done(start);
        }
    }

    async fn connect(&self, to: SocketAddr) -> io::Result<()> {
        let start = Instant::now();
        echo_once(&mut open(to).await?).await?;
        self.done(start);
        Ok(())
    }

    async fn http(&self, to: SocketAddr) -> io::Result<()> {
        let mut stream = open(to).await?;
        let mut buffer = Vec::with_capacity(4096);
        loop {
            if self.options.rate.is_none() {
                let start = Instant::now();
                exchange(&mut stream, &mut buffer).await?;
                self.done(start);
                continue;
            }
            if let Ok(turn) = self.waiting.acquire().await {
                turn.forget();
            }
            let due = self.due.borrow_mut().pop_front();
            if let Some(due) = due {
                let outcome = exchange(&mut stream, &mut buffer).await;
                self.answered(due, outcome)?;
            }
        }
    }

    /// One that has carried a byte, so that all of its way is there.
    async fn open(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let _turn = self.opening.acquire().await.map_err(io::Error::other)?;
        let mut stream = open(to).await?;
        echo_once(&mut stream).await?;
        Ok(stream)
    }
}

async fn open(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn echo_once(stream: &mut TcpStream) -> io::Result<()> {
    let mut echo = [0; 1];
    stream.write_all(&MESSAGE[..1]).await?;
    stream.read_exact(&mut echo).await?;
    Ok(())
}

async fn exchange(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<()> {
    stream.write_all(http::REQUEST).await?;
    http::read_answer(stream, buffer).await
}

async fn bulk(to: SocketAddr) -> io::Result<()> {
    let mut stream = open(to).await?;
    let buffer = vec![b'S'; BULK_BYTES];
    loop {
        stream.write_all(&buffer).await?;
    }
}
