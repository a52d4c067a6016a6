//! Messages after the handshake: keys, tickets, alerts.

use rustls::{AlertDescription, ContentType, Error, HandshakeType, InvalidMessage, PeerMisbehaved};

/// Type and length of a handshake message (RFC 8446 section 4).
const HEAD: usize = 4;

/// The longest message that is put together from records, as rustls bounds it.
const MAX_MESSAGE: usize = 0xffff;

/// What has come of a message that records carry in pieces.
///
/// At most [`MAX_MESSAGE`] bytes.
#[derive(Default)]
pub(super) struct PostHandshake {
    pieces: Vec<u8>,
}

/// What a record without data is about.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said {
    Alert(AlertDescription),
    /// See [`PostHandshake::next_message`].
    Handshake,
}

#[cfg_attr(test, derive(Debug, PartialEq, Eq))]
pub(super) enum Message {
    /// The body of a NewSessionTicket.
    Ticket(Vec<u8>),
    KeyUpdate(Answer),
}

/// Whether the peer wants our keys updated too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Requested,
    NotRequested,
}

impl PostHandshake {
    /// Takes a record that carries nothing for the reader.
    pub(super) fn take(&mut self, typ: ContentType, payload: &[u8]) -> Result<Option<Said>, Error> {
        if typ == ContentType::Handshake {
            if payload.is_empty() {
                return Err(InvalidMessage::InvalidEmptyPayload.into());
            }
            if self.pieces.len() + payload.len() > MAX_MESSAGE {
                return Err(InvalidMessage::HandshakePayloadTooLarge.into());
            }
            self.pieces.extend_from_slice(payload);
            return Ok(Some(Said::Handshake));
        }
        self.require_none()?;
        match (typ, payload) {
            // Padding, to mislead an observer (section 5.4).
            (ContentType::ApplicationData, []) => Ok(None),
            (ContentType::Alert, &[_, alert]) => Ok(Some(Said::Alert(alert.into()))),
            (ContentType::Alert, []) => Err(InvalidMessage::InvalidEmptyPayload.into()),
            (ContentType::Alert, _) => Err(InvalidMessage::MissingData("alert").into()),
            (got_type, _) => Err(Error::InappropriateMessage {
                expect_types: vec![ContentType::ApplicationData, ContentType::Handshake],
                got_type,
            }),
        }
    }

    /// A message in pieces may not be interrupted, nor go on under other keys (section 5.1).
    pub(super) fn require_none(&self) -> Result<(), Error> {
        if self.pieces.is_empty() {
            Ok(())
        } else {
            Err(PeerMisbehaved::MessageInterleavedWithHandshakeMessage.into())
        }
    }

    /// The next message, once all of it is here.
    pub(super) fn next_message(&mut self) -> Result<Option<Message>, Error> {
        let Some(&[typ, a, b, c]) = self.pieces.first_chunk::<HEAD>() else {
            return Ok(None);
        };
        let typ = HandshakeType::from(typ);
        let end = HEAD + u32::from_be_bytes([0, a, b, c]) as usize;
        if !matches!(
            typ,
            HandshakeType::KeyUpdate | HandshakeType::NewSessionTicket
        ) {
            return Err(Error::InappropriateHandshakeMessage {
                expect_types: vec![HandshakeType::KeyUpdate, HandshakeType::NewSessionTicket],
                got_type: typ,
            });
        }
        if end > MAX_MESSAGE {
            return Err(InvalidMessage::HandshakePayloadTooLarge.into());
        }
        if typ == HandshakeType::KeyUpdate && end != HEAD + 1 {
            return Err(InvalidMessage::TrailingData("KeyUpdate").into());
        }
        if self.pieces.len() < end {
            return Ok(None);
        }
        let rest = self.pieces.split_off(end);
        let body = std::mem::replace(&mut self.pieces, rest).split_off(HEAD);
        Ok(Some(match (typ, &body[..]) {
            (HandshakeType::KeyUpdate, [0]) => Message::KeyUpdate(Answer::NotRequested),
            (HandshakeType::KeyUpdate, [1]) => Message::KeyUpdate(Answer::Requested),
            (HandshakeType::KeyUpdate, _) => return Err(InvalidMessage::InvalidKeyUpdate.into()),
            _ => Message::Ticket(body),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(post: &mut PostHandshake) -> Vec<Message> {
        std::iter::from_fn(|| post.next_message().unwrap()).collect()
    }

    #[test]
    fn messages_are_taken_from_records_however_they_are_cut() {
        let all = [
            &[4, 0, 0, 2, 8, 9][..],
            &[24, 0, 0, 1, 1],
            &[24, 0, 0, 1, 0],
        ]
        .concat();
        for length in 1..=all.len() {
            let mut post = PostHandshake::default();
            let mut got = Vec::new();
            for record in all.chunks(length) {
                let said = post.take(ContentType::Handshake, record).unwrap();
                assert_eq!(said, Some(Said::Handshake));
                got.extend(messages(&mut post));
            }
            let ticket = Message::Ticket(vec![8, 9]);
            let updates = [Answer::Requested, Answer::NotRequested].map(Message::KeyUpdate);
            assert_eq!(got[0], ticket);
            assert_eq!(got[1..], updates);
            post.require_none().unwrap();
        }
    }

    #[test]
    fn what_may_not_come_after_the_handshake_is_an_error() {
        for message in [
            &[1, 0, 0, 0][..],
            &[13, 0, 0, 0],
            &[24, 0, 0, 1, 2],
            &[24, 0, 0, 0],
        ] {
            let mut post = PostHandshake::default();
            post.take(ContentType::Handshake, message).unwrap();
            assert!(post.next_message().is_err(), "{message:?}");
        }
        let mut post = PostHandshake::default();
        for (typ, payload) in [
            (ContentType::Handshake, &[][..]),
            (ContentType::Alert, &[1]),
            (ContentType::Alert, &[1, 0, 1, 0]),
            (ContentType::Heartbeat, &[1]),
        ] {
            assert!(post.take(typ, payload).is_err(), "{typ:?}");
        }
    }

    #[test]
    fn a_message_in_pieces_is_not_interrupted_and_does_not_grow_for_ever() {
        let mut post = PostHandshake::default();
        post.take(ContentType::Handshake, &[4, 0, 0xff]).unwrap();
        assert!(post.take(ContentType::Alert, &[1, 0]).is_err());
        assert!(post.take(ContentType::ApplicationData, &[]).is_err());
        let record = [0; 1 << 14];
        let taken = (0..9).take_while(|_| post.take(ContentType::Handshake, &record).is_ok());
        assert_eq!(taken.count(), 3);

        let mut post = PostHandshake::default();
        post.take(ContentType::Handshake, &[4, 1, 0, 0]).unwrap();
        assert!(post.next_message().is_err(), "of 64 KiB");
    }
}
