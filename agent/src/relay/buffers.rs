//! Pooled buffers, for bytes that have to pass through user space.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::half::Broken;
use super::{failed, splice};
use crate::tunnel::MAX_CHUNK;

/// Size of one read: what a tunnel sends at once.
const BUFFER_BYTES: usize = MAX_CHUNK;

/// Chunks up to this size are copied out, so that a few bytes that wait for a slow receiver do not
/// hold a whole buffer.
const COPIED_BYTES: usize = 4 * 1024;

/// Free buffers kept for the next bytes (16 MiB); more are freed when given back.
const IDLE_BUFFERS: usize = 64;

static IDLE: Mutex<Vec<BytesMut>> = Mutex::new(Vec::new());

/// Frees the buffers that wait for the next bytes.
pub fn free_buffers() {
    let idle = std::mem::take(&mut *IDLE.lock());
    drop(idle);
}

/// A buffer for reading, taken when bytes are there and given back when it is dropped.
pub(super) struct ReadBuffer(BytesMut);

impl ReadBuffer {
    pub(super) fn take() -> Self {
        let pooled = IDLE.lock().pop();
        Self(pooled.unwrap_or_else(|| BytesMut::with_capacity(BUFFER_BYTES)))
    }

    /// What the socket has now: none if there is nothing yet, empty at its end.
    pub(super) fn read(&mut self, source: &TcpStream) -> io::Result<Option<Bytes>> {
        if self.0.capacity() < BUFFER_BYTES / 4 {
            // Reuses the allocation if no chunk of it is alive any more.
            self.0.reserve(BUFFER_BYTES);
        }
        let room = self.0.capacity() - self.0.len();
        loop {
            let mut read = 0;
            let outcome = source.try_io(Interest::READABLE, || {
                read = source.try_read_buf(&mut self.0)?;
                if read > 0 && read < room {
                    // Less than there was room for: that was all. To tokio this is an empty socket,
                    // and the next read needs no system call to find it so.
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                Ok(())
            });
            match outcome {
                _ if read > 0 => {}
                Ok(()) => return Ok(Some(Bytes::new())),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            if read > COPIED_BYTES {
                return Ok(Some(self.0.split().freeze()));
            }
            let chunk = Bytes::copy_from_slice(&self.0);
            self.0.clear();
            return Ok(Some(chunk));
        }
    }
}

impl Drop for ReadBuffer {
    fn drop(&mut self) {
        // A buffer that a chunk still points into is freed with that chunk.
        if self.0.try_reclaim(BUFFER_BYTES) {
            let mut idle = IDLE.lock();
            if idle.len() < IDLE_BUFFERS {
                idle.push(std::mem::take(&mut self.0));
            }
        }
    }
}

/// Moves bytes until the source ends, then ends the sink's sending side.
pub(super) async fn pump(
    source: &TcpStream,
    sink: &TcpStream,
    count: &AtomicU64,
) -> Result<(), Broken> {
    loop {
        source.readable().await.map_err(|_| Broken::Source)?;
        let mut buffer = ReadBuffer::take();
        while let Some(chunk) = buffer.read(source).map_err(|_| Broken::Source)? {
            if chunk.is_empty() {
                return splice::end(sink);
            }
            tokio::select! {
                biased;
                written = write_all(sink, &chunk) => written.map_err(|_| Broken::Sink)?,
                () = failed(source) => return Err(Broken::Source),
            }
            count.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            tokio::task::coop::consume_budget().await;
        }
    }
}

/// Writes what the receiver takes now, and says how much that was.
pub(super) fn try_write(sink: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    let mut written = 0;
    while written < bytes.len() {
        match sink.try_write(&bytes[written..]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(more) => written += more,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(written)
}

/// Writes all of it, waiting as long as the receiver takes.
pub(super) async fn write_all(sink: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    loop {
        let written = try_write(sink, bytes)?;
        if written == bytes.len() {
            return Ok(());
        }
        bytes = &bytes[written..];
        sink.writable().await?;
    }
}
