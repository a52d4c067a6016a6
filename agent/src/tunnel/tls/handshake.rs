//! From a socket to a proven peer and keys.

use std::io;
use std::ops::DerefMut;
use std::sync::Arc;

use bytes::BufMut;
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::pki_types::ServerName;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, Error, ServerConfig};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::incoming::Incoming;
use super::outgoing::Outgoing;
use super::post::PostHandshake;
use super::records::IntoKeys;
use super::{Receiving, TlsStream, invalid};

/// What a peer may send that is not understood yet: the longest message that rustls takes.
const MAX_FLIGHT: usize = 64 * 1024;

/// One read.
const READ_BYTES: usize = 4 * 1024;

/// A handshake that both sides have finished.
pub(in crate::tunnel) struct Shaken<S, T> {
    session: S,
    io: T,
    /// What the peer said right after it: opened, and still sealed.
    early: Vec<u8>,
    sealed: Vec<u8>,
    receiving: Receiving,
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
            incoming: Incoming::after_handshake(self.early, self.sealed),
            outgoing: Outgoing::new(sealer),
            post: PostHandshake::default(),
            idle_records: 0,
            receiving: self.receiving,
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
    let (mut incoming, mut outgoing, mut early) = (Vec::new(), Vec::new(), Vec::new());
    let mut receiving = Receiving::Open;
    loop {
        let UnbufferedStatus { mut discard, state } = session.process(&mut incoming);
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
            Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                while let Some(record) = traffic.next_record() {
                    let record = record.map_err(invalid)?;
                    early.extend_from_slice(record.payload);
                    discard += record.discard;
                }
                Next::Process
            }
            Ok(ConnectionState::PeerClosed) => {
                receiving = Receiving::Closed;
                Next::Process
            }
            Ok(other) => Next::Fail(Error::General(format!("{other:?} in a handshake"))),
            Err(error) => Next::Fail(error),
        };
        incoming.drain(..discard);
        match next {
            Next::Process => {}
            Next::Write => {
                io.write_all(&outgoing).await?;
                outgoing.clear();
            }
            Next::Talk if !session.common().is_handshaking() => {
                return Ok(Shaken {
                    session,
                    io,
                    early,
                    sealed: incoming,
                    receiving,
                });
            }
            Next::Read | Next::Talk => {
                if incoming.len() >= MAX_FLIGHT {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                io.flush().await?;
                incoming.reserve(READ_BYTES);
                let room = &mut (&mut incoming).limit(READ_BYTES);
                if io.read_buf(room).await? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
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
