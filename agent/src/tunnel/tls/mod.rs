//! TLS 1.3 under a tunnel: rustls shakes hands, agrees on keys and computes the next ones, and its ciphers seal and open
//! records; this moves the records.
//!
//! rustls' own stream copies what it receives three times before a reader has it, and asks for 4 KiB at a time. Bulk costs
//! the receiver more in that than in AES. Here a read takes what the socket has, records are opened where they
//! lie, and copied once: to the reader. That is what rustls' `kernel` module is made for (there for the kernel's
//! TLS), and what it leaves to its caller is done here: counting records, both sides' updates of keys, alerts, the end.
//!
//! - [`handshake`] ends with a proven peer, and keys.
//! - `records` are one direction's keys and the count of what they were used for.
//! - `incoming` is what was received, `outgoing` what waits for the socket.
//! - `post` are the messages that may still come after the handshake.

mod handshake;
mod incoming;
mod outgoing;
mod post;
mod records;

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustls::{AlertDescription, ContentType, Error, InvalidMessage, PeerMisbehaved};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

pub(super) use self::handshake::{accept, connect};
pub use self::incoming::free_buffers;

use self::incoming::Incoming;
use self::outgoing::Outgoing;
use self::post::{PostHandshake, Said};
use self::records::{Keys, Opener};

/// Records in a row without a byte for the reader: keys, tickets, warnings, nothing at all. As BoringSSL bounds each of
/// these.
const MAX_IDLE_RECORDS: u8 = 32;

/// A connection after its handshake, as plaintext.
///
/// A shutdown sends close_notify. An end of the transport without the peer's close_notify is an error, as is whatever
/// else RFC 8446 forbids: the peer is told by an alert, as far as the socket takes one at once.
pub(super) struct TlsStream<T> {
    io: T,
    keys: Keys,
    opener: Opener,
    incoming: Incoming,
    outgoing: Outgoing,
    post: PostHandshake,
    /// Since the last byte for the reader.
    idle_records: u8,
    receiving: Receiving,
}

/// Whether more may come.
enum Receiving {
    Open,
    /// The peer said close_notify.
    Closed,
    /// It broke the protocol, or said so of us.
    Failed(Error),
}

impl<T: AsyncRead + AsyncWrite + Unpin> TlsStream<T> {
    /// Opens the next record, if all of it is here.
    fn open_next(&mut self) -> Result<Opened, Error> {
        let Some(record) = self.incoming.next_record()? else {
            return Ok(Opened::Incomplete);
        };
        let message = self.opener.open(record)?;
        if message.typ == ContentType::ApplicationData && !message.payload.is_empty() {
            self.post.require_none()?;
            self.idle_records = 0;
            let plain = message.payload.as_ptr().addr();
            let length = message.payload.len();
            self.incoming.opened(plain, length);
            return Ok(Opened::Record);
        }
        self.idle_records += 1;
        if self.idle_records > MAX_IDLE_RECORDS {
            return Err(PeerMisbehaved::TooManyKeyUpdateRequests.into());
        }
        let said = self.post.take(message.typ, message.payload)?;
        self.incoming.skip();
        match said {
            Some(Said::Alert(alert)) => return self.heed(alert),
            Some(Said::Handshake) => self.heed_handshake()?,
            None => {}
        }
        Ok(Opened::Record)
    }

    fn heed(&mut self, alert: AlertDescription) -> Result<Opened, Error> {
        match alert {
            AlertDescription::CloseNotify => {
                self.receiving = Receiving::Closed;
                Ok(Opened::Record)
            }
            // Which says nothing: close_notify follows (RFC 8446 section 6.1).
            AlertDescription::UserCanceled => Ok(Opened::Record),
            // Everything else is fatal, whatever level it claims (section 6).
            other => Err(Error::AlertReceived(other)),
        }
    }

    fn heed_handshake(&mut self) -> Result<(), Error> {
        while let Some(message) = self.post.next_message()? {
            match message {
                post::Message::Ticket(ticket) => self.keys.ticket(&ticket)?,
                post::Message::KeyUpdate(answer) => {
                    // The next record is under other keys, so nothing may hang over (section 5.1).
                    self.post.require_none()?;
                    if answer == post::Answer::Requested {
                        self.outgoing.answer_key_update(&mut self.keys)?;
                    }
                    self.opener = self.keys.next_opener()?;
                }
            }
        }
        Ok(())
    }

    /// The peer is told why nothing more is read.
    fn fail(&mut self, cx: &mut Context<'_>, error: Error) {
        if let Some(alert) = alert_for(&error) {
            self.outgoing.fatal_alert(alert);
            // Whatever becomes of it, the error comes first.
            let _ = self.outgoing.poll_write_out(&mut self.io, cx);
        }
        self.receiving = Receiving::Failed(error);
    }

    fn ended(&self) -> Option<io::Result<()>> {
        match &self.receiving {
            Receiving::Open => None,
            Receiving::Closed => Some(Ok(())),
            Receiving::Failed(error) => Some(Err(invalid(error.clone()))),
        }
    }
}

/// What came of looking for a record.
enum Opened {
    /// There was one, with or without something for the reader.
    Record,
    /// The rest of it has not come yet.
    Incomplete,
}

/// Which alert says so (RFC 8446 section 6.2); none where the peer has spoken its last.
fn alert_for(error: &Error) -> Option<AlertDescription> {
    Some(match error {
        Error::AlertReceived(_) => return None,
        Error::DecryptError => AlertDescription::BadRecordMac,
        Error::PeerSentOversizedRecord => AlertDescription::RecordOverflow,
        Error::InvalidMessage(InvalidMessage::InvalidKeyUpdate) => {
            AlertDescription::IllegalParameter
        }
        Error::InvalidMessage(_) => AlertDescription::DecodeError,
        Error::General(_) | Error::EncryptError => AlertDescription::InternalError,
        _ => AlertDescription::UnexpectedMessage,
    })
}

/// As tokio-rustls reports what rustls says.
fn invalid(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = into.filled().len();
        loop {
            this.incoming.give(into);
            if into.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            let some = into.filled().len() > before;
            if let Some(end) = this.ended() {
                // What came before it is given first.
                return Poll::Ready(if some { Ok(()) } else { end });
            }
            match this.open_next() {
                Ok(Opened::Record) => continue,
                Ok(Opened::Incomplete) if some => return Poll::Ready(Ok(())),
                Ok(Opened::Incomplete) => {}
                Err(error) => {
                    this.fail(cx, error);
                    continue;
                }
            }
            if ready!(this.incoming.poll_fill(&mut this.io, cx))? == 0 {
                // Cut off, perhaps by somebody between (section 6.1).
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.outgoing.is_full() {
            ready!(this.outgoing.poll_write_out(&mut this.io, cx))?;
        }
        let taken = this.outgoing.data(slices, &mut this.keys)?;
        match this.outgoing.poll_write_out(&mut this.io, cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            // What the socket did not take waits, and is written before what comes next.
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(taken)),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.outgoing.poll_write_out(&mut this.io, cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.outgoing.close_notify();
        ready!(this.outgoing.poll_write_out(&mut this.io, cx))?;
        match ready!(Pin::new(&mut this.io).poll_shutdown(cx)) {
            // The peer was faster.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            shut => Poll::Ready(shut),
        }
    }
}

#[cfg(test)]
mod tests;
