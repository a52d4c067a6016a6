//! The server.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::options::SinkOptions;
use super::report::SinkReport;
use super::{http, pin};
use crate::traffic::{asked_to_stop, control, listen};

/// Largest read of a connection that sends in bulk.
const BULK_BYTES: usize = 256 * 1024;
/// Of any other.
const SMALL_BYTES: usize = 4096;

#[derive(Debug, Default)]
struct Counts {
    accepted: AtomicU64,
    received: AtomicU64,
}

/// Serves until SIGTERM or SIGINT.
pub async fn run(options: SinkOptions) -> Result<()> {
    if let Some(cpu) = options.cpu {
        pin(cpu)?;
    }
    let counts = Arc::<Counts>::default();
    for port in options.port {
        let listener = listen(port).with_context(|| format!("port {port}"))?;
        tokio::spawn(accept(listener, Arc::clone(&counts)));
    }
    let report = Arc::clone(&counts);
    control::listen(
        options.control,
        Arc::new(move || SinkReport {
            accepted: report.accepted.load(Ordering::Relaxed),
            received: report.received.load(Ordering::Relaxed),
        }),
    )?;
    Ok(asked_to_stop().await?)
}

async fn accept(listener: TcpListener, counts: Arc<Counts>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors: some will come back.
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        counts.accepted.fetch_add(1, Ordering::Relaxed);
        let counts = Arc::clone(&counts);
        tokio::spawn(async move {
            // How a connection ended is for the client to say.
            let _ = serve(stream, &counts).await;
        });
    }
}

async fn serve(mut stream: TcpStream, counts: &Counts) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut first = [0; 1];
    if stream.peek(&mut first).await? == 0 {
        return Ok(());
    }
    match &first {
        b"S" => {
            let mut buffer = vec![0; BULK_BYTES];
            loop {
                let length = stream.read(&mut buffer).await?;
                if length == 0 {
                    return Ok(());
                }
                counts.received.fetch_add(length as u64, Ordering::Relaxed);
            }
        }
        b"G" => answer(stream).await,
        _ => {
            let mut buffer = [0; SMALL_BYTES];
            loop {
                let length = stream.read(&mut buffer).await?;
                if length == 0 {
                    return Ok(());
                }
                stream.write_all(&buffer[..length]).await?;
            }
        }
    }
}

async fn answer(mut stream: TcpStream) -> io::Result<()> {
    let answer = http::answer();
    let mut buffer = Vec::with_capacity(SMALL_BYTES);
    while stream.read_buf(&mut buffer).await? > 0 {
        let (count, length) = http::requests(&buffer)?;
        buffer.drain(..length);
        for _ in 0..count {
            stream.write_all(&answer).await?;
        }
    }
    Ok(())
}
