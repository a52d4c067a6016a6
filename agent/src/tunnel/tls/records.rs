//! The keys of one direction, and how often they were used.

use std::fmt;

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::crypto::cipher::{
    AeadKey, InboundOpaqueMessage, InboundPlainMessage, Iv, MessageDecrypter, MessageEncrypter,
    OutboundChunks, OutboundPlainMessage,
};
use rustls::kernel::KernelConnection;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::{
    ConnectionTrafficSecrets, ContentType, Error, ExtractedSecrets, HandshakeType, InvalidMessage,
    ProtocolVersion, SupportedCipherSuite, Tls13CipherSuite,
};

/// Type, version and length before each record (RFC 8446 section 5.1).
pub(super) const HEAD: usize = 5;

/// What one record carries at most.
pub(super) const MAX_PLAIN: usize = 1 << 14;

/// What follows the head at most: plaintext, its type, padding and tag (section 5.2).
pub(super) const MAX_SEALED: usize = MAX_PLAIN + 256;

/// The version of every sealed record (section 5.2).
const VERSION: [u8; 2] = [3, 3];

/// The length of the first record, head and all, if all of it is here.
pub(super) fn complete(sealed: &[u8]) -> Result<Option<usize>, Error> {
    let Some(&[_, _, _, high, low]) = sealed.first_chunk::<HEAD>() else {
        return Ok(None);
    };
    let length = usize::from(u16::from_be_bytes([high, low]));
    if length > MAX_SEALED {
        return Err(Error::PeerSentOversizedRecord);
    }
    Ok((sealed.len() >= HEAD + length).then_some(HEAD + length))
}

/// What knows the next keys.
pub(in crate::tunnel) struct Keys {
    agreed: Agreed,
    suite: &'static Tls13CipherSuite,
}

enum Agreed {
    AsClient(KernelConnection<ClientConnectionData>),
    AsServer(KernelConnection<ServerConnectionData>),
}

/// A connection of rustls, done with its handshake, that gives its keys away.
pub(in crate::tunnel) trait IntoKeys {
    /// What knows the next keys, and those to seal and open with from now on.
    fn into_keys(self) -> Result<(Keys, Sealer, Opener), Error>;
}

impl IntoKeys for UnbufferedClientConnection {
    fn into_keys(self) -> Result<(Keys, Sealer, Opener), Error> {
        let (secrets, agreed) = self.dangerous_into_kernel_connection()?;
        let suite = agreed.negotiated_cipher_suite();
        Keys::of(Agreed::AsClient(agreed), suite, secrets)
    }
}

impl IntoKeys for UnbufferedServerConnection {
    fn into_keys(self) -> Result<(Keys, Sealer, Opener), Error> {
        let (secrets, agreed) = self.dangerous_into_kernel_connection()?;
        let suite = agreed.negotiated_cipher_suite();
        Keys::of(Agreed::AsServer(agreed), suite, secrets)
    }
}

impl Keys {
    fn of(
        agreed: Agreed,
        suite: SupportedCipherSuite,
        secrets: ExtractedSecrets,
    ) -> Result<(Self, Sealer, Opener), Error> {
        let other = || Error::General("not a suite of TLS 1.3".to_owned());
        let suite = suite.tls13().ok_or_else(other)?;
        let sealer = Sealer::new(suite, secrets.tx)?;
        let opener = Opener::new(suite, secrets.rx)?;
        Ok((Self { agreed, suite }, sealer, opener))
    }

    pub(super) fn next_opener(&mut self) -> Result<Opener, Error> {
        let secrets = match &mut self.agreed {
            Agreed::AsClient(agreed) => agreed.update_rx_secret(),
            Agreed::AsServer(agreed) => agreed.update_rx_secret(),
        };
        Opener::new(self.suite, secrets?)
    }

    pub(super) fn next_sealer(&mut self) -> Result<Sealer, Error> {
        let secrets = match &mut self.agreed {
            Agreed::AsClient(agreed) => agreed.update_tx_secret(),
            Agreed::AsServer(agreed) => agreed.update_tx_secret(),
        };
        Sealer::new(self.suite, secrets?)
    }

    /// A ticket for later sessions, which only servers give.
    pub(super) fn ticket(&mut self, ticket: &[u8]) -> Result<(), Error> {
        match &mut self.agreed {
            Agreed::AsClient(agreed) => agreed.handle_new_session_ticket(ticket),
            Agreed::AsServer(_) => Err(Error::InappropriateHandshakeMessage {
                expect_types: vec![HandshakeType::KeyUpdate],
                got_type: HandshakeType::NewSessionTicket,
            }),
        }
    }
}

/// Opens what the peer sealed with its present keys.
pub(in crate::tunnel) struct Opener {
    cipher: Box<dyn MessageDecrypter>,
    sequence: u64,
}

impl Opener {
    fn new(
        suite: &Tls13CipherSuite,
        (sequence, secrets): (u64, ConnectionTrafficSecrets),
    ) -> Result<Self, Error> {
        let (key, iv) = key_of(secrets)?;
        let cipher = suite.aead_alg.decrypter(key, iv);
        Ok(Self { cipher, sequence })
    }

    /// Opens a whole record in its place.
    pub(super) fn open<'a>(
        &mut self,
        record: &'a mut [u8],
    ) -> Result<InboundPlainMessage<'a>, Error> {
        // Nothing is unprotected any more, not even an alert.
        let got_type = ContentType::from(record[0]);
        if got_type != ContentType::ApplicationData {
            return Err(Error::InappropriateMessage {
                expect_types: vec![ContentType::ApplicationData],
                got_type,
            });
        }
        // The cipher takes it for granted, and does not look.
        if record[1..3] != VERSION {
            return Err(InvalidMessage::UnknownProtocolVersion.into());
        }
        let sealed = InboundOpaqueMessage::new(
            ContentType::ApplicationData,
            ProtocolVersion::TLSv1_2,
            &mut record[HEAD..],
        );
        let message = self.cipher.decrypt(sealed, self.sequence)?;
        self.sequence = next(self.sequence)?;
        Ok(message)
    }
}

/// Seals for the peer with our present keys.
pub(in crate::tunnel) struct Sealer {
    cipher: Box<dyn MessageEncrypter>,
    sequence: u64,
    limit: u64,
}

impl Sealer {
    fn new(
        suite: &Tls13CipherSuite,
        (sequence, secrets): (u64, ConnectionTrafficSecrets),
    ) -> Result<Self, Error> {
        if sequence != 0 {
            // AWS-LC counts from the first that it is given, and refuses what does not look larger than the last.
            return Err(Error::General("keys that have sealed before".to_owned()));
        }
        let (key, iv) = key_of(secrets)?;
        Ok(Self {
            cipher: suite.aead_alg.encrypter(key, iv),
            sequence,
            limit: suite.common.confidentiality_limit,
        })
    }

    /// A record, head and all.
    pub(super) fn seal(
        &mut self,
        typ: ContentType,
        payload: OutboundChunks<'_>,
    ) -> Result<Vec<u8>, Error> {
        let sequence = self.sequence;
        self.sequence = next(sequence)?;
        let plain = OutboundPlainMessage {
            typ,
            version: ProtocolVersion::TLSv1_3,
            payload,
        };
        Ok(self.cipher.encrypt(plain, sequence)?.encode())
    }

    /// Whether these keys must not seal more than the message that announces others.
    pub(super) fn is_used_up(&self) -> bool {
        self.sequence.saturating_add(1) >= self.limit
    }

    #[cfg(test)]
    pub(super) fn limit_to(&mut self, records: u64) {
        self.limit = records;
    }

    #[cfg(test)]
    pub(super) fn is_limited(&self) -> bool {
        self.limit < 1 << 20
    }
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealer").finish_non_exhaustive()
    }
}

/// A number is used once (section 5.3).
fn next(sequence: u64) -> Result<u64, Error> {
    let over = || Error::General("out of sequence numbers".to_owned());
    sequence.checked_add(1).ok_or_else(over)
}

fn key_of(secrets: ConnectionTrafficSecrets) -> Result<(AeadKey, Iv), Error> {
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => Ok((key, iv)),
        _ => Err(Error::General("a cipher without known keys".to_owned())),
    }
}
