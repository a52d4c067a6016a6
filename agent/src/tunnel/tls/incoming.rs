//! What was received, sealed and opened.

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use parking_lot::Mutex;
use rustls::Error;
use tokio::io::{AsyncRead, ReadBuf};

use super::records::complete;

/// One read: seven full records and a part of the next. It stays in the processor's cache.
const READ_BYTES: usize = 128 * 1024;

/// Free buffers that are kept (4 MiB); more are freed when given back.
const IDLE_BUFFERS: usize = 32;

static IDLE: Mutex<Vec<Box<[u8]>>> = Mutex::new(Vec::new());

/// Frees the buffers that wait for the next records.
pub fn free_buffers() {
    let idle = std::mem::take(&mut *IDLE.lock());
    drop(idle);
}

/// The records of one direction. Nothing that waits for the peer holds a buffer: of a record that
/// came in part, that part is kept.
#[derive(Default)]
pub(super) struct Incoming {
    buffer: Box<[u8]>,
    /// Opened and not given yet. It lies before what is sealed.
    plain: Range<usize>,
    /// Received and not opened yet.
    sealed: Range<usize>,
    /// The whole record in front of `sealed`.
    record: usize,
    /// What is sealed while there is no buffer: less than a record, but after the handshake.
    parked: Vec<u8>,
}

impl Incoming {
    /// What came with the peer's last words of the handshake: no more than a buffer has room for.
    pub(super) fn after_handshake(sealed: Vec<u8>) -> Self {
        let mut incoming = Self::default();
        incoming.parked = sealed;
        incoming
    }

    /// Gives the reader what is opened, as far as it fits.
    pub(super) fn give(&mut self, into: &mut ReadBuf<'_>) {
        let length = self.plain.len().min(into.remaining());
        if length == 0 {
            return;
        }
        let end = self.plain.start + length;
        into.put_slice(&self.buffer[self.plain.start..end]);
        self.plain.start = end;
        if self.plain.is_empty() && self.sealed.is_empty() {
            self.give_back();
        }
    }

    /// The next record, head and all, if all of it is here. Only when everything that is opened was given.
    pub(super) fn next_record(&mut self) -> Result<Option<&mut [u8]>, Error> {
        if self.buffer.is_empty() {
            // All that is there of it may be more than a record, after the handshake.
            if complete(&self.parked)?.is_none() {
                return Ok(None);
            }
            self.unpark();
        }
        let sealed = &mut self.buffer[self.sealed.clone()];
        let Some(length) = complete(sealed)? else {
            return Ok(None);
        };
        self.record = length;
        Ok(Some(&mut sealed[..length]))
    }

    /// The record was opened, and what it carries begins at this address.
    pub(super) fn opened(&mut self, plain: usize, length: usize) {
        let start = plain - self.buffer.as_ptr().addr();
        self.plain = start..start + length;
        self.sealed.start += self.record;
    }

    /// The record was opened, and carries nothing for the reader.
    pub(super) fn skip(&mut self) {
        self.sealed.start += self.record;
        if self.sealed.is_empty() {
            self.give_back();
        }
    }

    /// Reads what the transport has. Only when there is no whole record.
    pub(super) fn poll_fill<R: AsyncRead + Unpin>(
        &mut self,
        source: &mut R,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if self.buffer.is_empty() {
            self.unpark();
        }
        self.buffer.copy_within(self.sealed.clone(), 0);
        self.sealed = 0..self.sealed.len();
        let mut room = ReadBuf::new(&mut self.buffer[self.sealed.end..]);
        let read = Pin::new(source).poll_read(cx, &mut room);
        let length = room.filled().len();
        self.sealed.end += length;
        if length == 0 {
            // Nothing yet, the end, or an error.
            self.park();
        }
        ready!(read)?;
        Poll::Ready(Ok(length))
    }

    /// Nothing more is opened: what came after the last record means nothing.
    pub(super) fn close(&mut self) {
        self.parked = Vec::new();
        self.sealed = 0..0;
        if self.plain.is_empty() && !self.buffer.is_empty() {
            self.give_back();
        }
    }

    fn unpark(&mut self) {
        let idle = IDLE.lock().pop();
        self.buffer = idle.unwrap_or_else(|| vec![0; READ_BYTES].into());
        self.buffer[..self.parked.len()].copy_from_slice(&self.parked);
        self.sealed = 0..self.parked.len();
        self.parked = Vec::new();
    }

    fn park(&mut self) {
        self.parked = self.buffer[self.sealed.clone()].to_vec();
        self.give_back();
    }

    fn give_back(&mut self) {
        (self.plain, self.sealed) = (0..0, 0..0);
        let buffer = std::mem::take(&mut self.buffer);
        let mut idle = IDLE.lock();
        if idle.len() < IDLE_BUFFERS {
            idle.push(buffer);
        }
    }

    #[cfg(test)]
    pub(super) fn holds_a_buffer(&self) -> bool {
        !self.buffer.is_empty()
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.buffer.is_empty() {
            self.give_back();
        }
    }
}
