//! What was sealed and waits for the socket.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustls::crypto::cipher::OutboundChunks;
use rustls::{AlertDescription, ContentType, Error};
use tokio::io::AsyncWrite;

use super::invalid;
use super::records::{Keys, MAX_PLAIN, Sealer};
use crate::tunnel::limits::TLS_BUFFER;

/// KeyUpdate (RFC 8446 section 4.6.3) that asks for the same of the peer, and one that does not.
const KEY_UPDATE_REQUESTED: [u8; 5] = [24, 0, 0, 1, 1];
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];

/// Levels of alerts (section 6).
const WARNING: u8 = 1;
const FATAL: u8 = 2;

/// Slices that are sealed, and records that are written, at once.
const SLICES: usize = 8;
const RECORDS: usize = 32;

/// What a record counts for at least, however little it carries: it has a head, a tag and a place in memory.
const LEAST_COST: usize = 256;

/// The records of one direction: no more of them than count for `TLS_BUFFER` bytes, and what the protocol asks for.
pub(super) struct Outgoing {
    sealer: Sealer,
    records: VecDeque<Vec<u8>>,
    /// How much of the first of them was written.
    written: usize,
    /// What those that wait count for: their plaintext, or `LEAST_COST`.
    waiting: usize,
    /// The answer to a peer's KeyUpdate is the last of them: one answers all that come until there is data again.
    answering: bool,
    /// The last alert was sealed or received, or sealing has failed: nothing more is sealed.
    closed: bool,
}

impl Outgoing {
    pub(super) fn new(sealer: Sealer) -> Self {
        Self {
            sealer,
            records: VecDeque::new(),
            written: 0,
            waiting: 0,
            answering: false,
            closed: false,
        }
    }

    /// Whether the socket has to take some first.
    pub(super) fn is_full(&self) -> bool {
        self.waiting >= TLS_BUFFER
    }

    /// Seals as much as there is room for.
    pub(super) fn data(&mut self, slices: &[IoSlice<'_>], keys: &mut Keys) -> io::Result<usize> {
        if self.closed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let mut chunks: [&[u8]; SLICES] = [&[]; SLICES];
        let mut count = 0;
        let some = slices.iter().filter(|slice| !slice.is_empty());
        for (chunk, slice) in chunks.iter_mut().zip(some) {
            *chunk = slice;
            count += 1;
        }
        let all = OutboundChunks::new(&chunks[..count]);
        let (data, _) = all.split_at(TLS_BUFFER.saturating_sub(self.waiting));
        let taken = data.len();
        if let Err(error) = self.seal_data(data, keys) {
            self.closed = true;
            return Err(invalid(error));
        }
        Ok(taken)
    }

    fn seal_data(&mut self, mut rest: OutboundChunks<'_>, keys: &mut Keys) -> Result<(), Error> {
        while !rest.is_empty() {
            if self.sealer.is_used_up() {
                self.update_key(&KEY_UPDATE_REQUESTED, keys)?;
            }
            let (fragment, more) = rest.split_at(MAX_PLAIN);
            self.seal(ContentType::ApplicationData, fragment)?;
            self.answering = false;
            rest = more;
        }
        Ok(())
    }

    /// Our next keys, as the peer asked for them. It gets one answer at a time.
    pub(super) fn answer_key_update(&mut self, keys: &mut Keys) -> Result<(), Error> {
        if self.closed || self.answering {
            return Ok(());
        }
        self.answering = true;
        self.update_key(&KEY_UPDATE, keys)
    }

    fn update_key(&mut self, message: &[u8], keys: &mut Keys) -> Result<(), Error> {
        self.seal(ContentType::Handshake, message.into())?;
        self.sealer = keys.next_sealer()?;
        Ok(())
    }

    fn seal(&mut self, typ: ContentType, payload: OutboundChunks<'_>) -> Result<(), Error> {
        let cost = payload.len().max(LEAST_COST);
        self.records.push_back(self.sealer.seal(typ, payload)?);
        self.waiting += cost;
        Ok(())
    }

    /// The orderly end. Once.
    pub(super) fn close_notify(&mut self) {
        self.last_alert(WARNING, AlertDescription::CloseNotify);
    }

    /// The end, and why.
    pub(super) fn fatal_alert(&mut self, alert: AlertDescription) {
        self.last_alert(FATAL, alert);
    }

    fn last_alert(&mut self, level: u8, alert: AlertDescription) {
        if std::mem::replace(&mut self.closed, true) {
            return;
        }
        let alert = [level, alert.into()];
        // Without numbers left, the end of the transport must do.
        let _ = self.seal(ContentType::Alert, (&alert[..]).into());
    }

    /// Nothing more is sealed: the peer has ended it.
    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    /// Writes what waits; ready when nothing does.
    pub(super) fn poll_write_out<W: AsyncWrite + Unpin>(
        &mut self,
        sink: &mut W,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while let Some(first) = self.records.front() {
            let mut slices = [IoSlice::new(&[]); RECORDS];
            slices[0] = IoSlice::new(&first[self.written..]);
            for (slice, record) in slices.iter_mut().zip(&self.records).skip(1) {
                *slice = IoSlice::new(record);
            }
            let count = self.records.len().min(RECORDS);
            let sink = Pin::new(&mut *sink);
            match ready!(sink.poll_write_vectored(cx, &slices[..count]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.wrote(written),
            }
        }
        self.waiting = 0;
        self.answering = false;
        Poll::Ready(Ok(()))
    }

    fn wrote(&mut self, written: usize) {
        self.written += written;
        while let Some(first) = self.records.front()
            && self.written >= first.len()
        {
            self.written -= first.len();
            self.records.pop_front();
        }
    }
}

/// What tests see and do.
#[cfg(test)]
impl Outgoing {
    pub(super) fn limit_to(&mut self, records: u64) {
        self.sealer.limit_to(records);
    }

    pub(super) fn is_limited(&self) -> bool {
        self.sealer.is_limited()
    }

    pub(super) fn waiting_records(&self) -> usize {
        self.records.len()
    }

    pub(super) fn seal_for_test(&mut self, typ: ContentType, payload: &[u8]) -> Vec<u8> {
        self.sealer.seal(typ, payload.into()).unwrap()
    }

    pub(super) fn update_key_for_test(&mut self, keys: &mut Keys) {
        self.update_key(&KEY_UPDATE_REQUESTED, keys).unwrap();
    }

    pub(super) fn next_key_for_test(&mut self, keys: &mut Keys) {
        self.sealer = keys.next_sealer().unwrap();
    }
}
