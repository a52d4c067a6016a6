//! From a socket to a proven peer and keys.
//!
//! rustls is shown one record at a time, so that it never sees one that comes after the handshake. What it would do there
//! is not all carried over when it hands out its keys: the answer that it owes to a KeyUpdate is lost, and then the peer cannot
//! open what we send.

use std::io;
use std::ops::DerefMut;
use std::sync::Arc;

use bytes::BufMut;
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::pki_types::ServerName;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, Error, InvalidMessage, ServerConfig};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::incoming::Incoming;
use super::outgoing::Outgoing;
use super::post::PostHandshake;
use super::records::{IntoKeys, complete};
use super::{Receiving, TlsStream, invalid};

/// What a peer may send that is not understood yet: no less than rustls' own streams take.
const MAX_FLIGHT: usize = 64 * 1024;

/// One read.
const READ_BYTES: usize = 4 * 1024;

/// A handshake that both sides have finished.
pub(in crate::tunnel) struct Shaken<S, T> {
    session: S,
    io: T,
    /// What the peer said right after it.
    sealed: Vec<u8>,
}

/// As the client. The configuration must let secrets be extracted.
pub(in crate::tunnel) async fn connect<T: AsyncRead + AsyncWrite + Unpin>(
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    io: T,
) -> io::Result<Shaken<UnbufferedClientConnection, T>> {
    let session = UnbufferedClientConnection::new(config, name).map_err(invalid)?;
    shake(session, io).await
}

/// As the server. The configuration must let secrets be extracted.
pub(in crate::tunnel) async fn accept<T: AsyncRead + AsyncWrite + Unpin>(
    config: Arc<ServerConfig>,
    io: T,
) -> io::Result<Shaken<UnbufferedServerConnection, T>> {
    let session = UnbufferedServerConnection::new(config).map_err(invalid)?;
    shake(session, io).await
}

impl<S: Session, T> Shaken<S, T> {
    /// What was agreed, and with whom.
    pub(in crate::tunnel) fn session(&self) -> &CommonState {
        self.session.common()
    }

    /// What is said from now on.
    pub(in crate::tunnel) fn into_stream(self) -> io::Result<TlsStream<T>> {
        let (keys, sealer, opener) = self.session.into_keys().map_err(invalid)?;
        Ok(TlsStream {
            io: self.io,
            keys,
            opener,
            incoming: Incoming::after_handshake(self.sealed),
            outgoing: Outgoing::new(sealer),
            post: PostHandshake::default(),
            idle_messages: 0,
            receiving: Receiving::Open,
        })
    }
}

/// Either side of rustls.
pub(in crate::tunnel) trait Session: IntoKeys {
    type Data;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data>;

    fn common(&self) -> &CommonState;
}

impl Session for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.deref_mut().process_tls_records(incoming)
    }

    fn common(&self) -> &CommonState {
        self
    }
}

impl Session for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.deref_mut().process_tls_records(incoming)
    }

    fn common(&self) -> &CommonState {
        self
    }
}

/// What rustls wants next.
enum Next {
    Process,
    Write,
    Read,
    /// It could send data. Reading may still have to wait for the client's last words.
    Talk,
    Fail(Error),
}

async fn shake<S: Session, T: AsyncRead + AsyncWrite + Unpin>(
    mut session: S,
    mut io: T,
) -> io::Result<Shaken<S, T>> {
    let (mut incoming, mut outgoing) = (Flight::default(), Vec::new());
    loop {
        let UnbufferedStatus { discard, state } = session.process(incoming.shown());
        let next = match state {
            Ok(ConnectionState::EncodeTlsData(data)) => {
                append(data, &mut outgoing)?;
                Next::Process
            }
            Ok(ConnectionState::TransmitTlsData(data)) => {
                data.done();
                Next::Write
            }
            Ok(ConnectionState::BlockedHandshake) => Next::Read,
            Ok(ConnectionState::WriteTraffic(_)) => Next::Talk,
            Ok(other) => Next::Fail(Error::General(format!("{other:?} in a handshake"))),
            Err(error) => Next::Fail(error),
        };
        incoming.discard(discard);
        match next {
            Next::Process => {}
            Next::Write => {
                io.write_all(&outgoing).await?;
                outgoing.clear();
            }
            Next::Talk if !session.common().is_handshaking() => {
                let sealed = incoming.bytes;
                return Ok(Shaken {
                    session,
                    io,
                    sealed,
                });
            }
            Next::Read | Next::Talk => {
                if incoming.show_next() {
                    continue;
                }
                if incoming.bytes.len() >= MAX_FLIGHT {
                    return Err(invalid(InvalidMessage::HandshakePayloadTooLarge.into()));
                }
                io.flush().await?;
                if incoming.read_from(&mut io).await? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                incoming.show_next();
            }
            Next::Fail(error) => {
                last_words(&mut session, &mut outgoing)?;
                // The reason counts, not whether the peer heard it.
                let _ = io.write_all(&outgoing).await;
                return Err(invalid(error));
            }
        }
    }
}

/// What was received and rustls has not done with.
#[derive(Default)]
struct Flight {
    bytes: Vec<u8>,
    /// So much of it are whole records that rustls may see.
    records: usize,
}

impl Flight {
    /// A part of a record is shown as well: it does nothing, and what is no TLS is known by its head.
    fn shown(&mut self) -> &mut [u8] {
        let end = match self.next_record() {
            Some(_) => self.records,
            None => self.bytes.len(),
        };
        &mut self.bytes[..end]
    }

    /// Whether there is one more.
    fn show_next(&mut self) -> bool {
        let next = self.next_record();
        self.records += next.unwrap_or_default();
        next.is_some()
    }

    fn next_record(&self) -> Option<usize> {
        // rustls itself is to see what is too long.
        complete(&self.bytes[self.records..]).unwrap_or_default()
    }

    fn discard(&mut self, length: usize) {
        self.bytes.drain(..length);
        self.records = self.records.saturating_sub(length);
    }

    async fn read_from<T: AsyncRead + Unpin>(&mut self, io: &mut T) -> io::Result<usize> {
        self.bytes.reserve(READ_BYTES);
        io.read_buf(&mut (&mut self.bytes).limit(READ_BYTES)).await
    }
}

/// The alert that says why.
fn last_words(session: &mut impl Session, outgoing: &mut Vec<u8>) -> io::Result<()> {
    // It looks at nothing more of what came while it has something to say, and must not after that.
    while session.common().wants_write() {
        let UnbufferedStatus { state, .. } = session.process(&mut []);
        let Ok(ConnectionState::EncodeTlsData(data)) = state else {
            break;
        };
        append(data, outgoing)?;
    }
    Ok(())
}

fn append<D>(mut data: EncodeTlsData<'_, D>, outgoing: &mut Vec<u8>) -> io::Result<()> {
    let start = outgoing.len();
    let mut room = 0;
    loop {
        outgoing.resize(start + room, 0);
        match data.encode(&mut outgoing[start..]) {
            Ok(length) => {
                outgoing.truncate(start + length);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(more)) if more.required_size > room => {
                room = more.required_size;
            }
            Err(error) => return Err(io::Error::other(error)),
        }
    }
}
