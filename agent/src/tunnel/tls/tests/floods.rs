//! What brings the reader nothing: as much of it as is useful, and no more.

use super::*;

#[tokio::test]
async fn key_updates_without_end_are_an_error() {
    let (client, server) = both().await;
    let (mut client, mut server) = (client.into_stream().unwrap(), server.into_stream().unwrap());
    for _ in 0..=MAX_IDLE_MESSAGES {
        client.outgoing.update_key_for_test(&mut client.keys);
    }
    client.flush().await.unwrap();
    let error = within(server.read_u8()).await.unwrap_err();
    assert_eq!(
        *tls_error(&error),
        PeerMisbehaved::TooManyKeyUpdateRequests.into()
    );
    let error = within(client.read_u8()).await.unwrap_err();
    let alert = AlertDescription::UnexpectedMessage;
    assert_eq!(*tls_error(&error), Error::AlertReceived(alert));
}

#[tokio::test]
async fn many_requests_for_keys_get_one_answer_while_nothing_is_written() {
    let (client, server) = both().await;
    let (mut client, mut server) = (client.into_stream().unwrap(), server.into_stream().unwrap());
    for _ in 0..5 {
        client.outgoing.update_key_for_test(&mut client.keys);
    }
    carries(&mut client, &mut server, b"then data").await;
    assert_eq!(server.outgoing.waiting_records(), 1);
    carries(&mut server, &mut client, b"an answer").await;
}

/// A record of these, each `count` times.
fn repeated(client: &mut Ours, typ: ContentType, payload: &[u8], count: usize) -> Vec<u8> {
    (0..count)
        .flat_map(|_| seal(client, typ, payload))
        .collect()
}

#[tokio::test]
async fn what_carries_nothing_is_taken_between_data_and_is_an_error_in_a_row() {
    let most = usize::from(MAX_IDLE_MESSAGES);
    for (typ, payload, flood) in [
        (
            ContentType::ApplicationData,
            &[][..],
            PeerMisbehaved::TooManyEmptyFragments,
        ),
        (
            ContentType::Alert,
            &[1, 90],
            PeerMisbehaved::TooManyWarningAlertsReceived,
        ),
    ] {
        let (mut client, mut server) = streams().await;
        for _ in 0..3 {
            let mut bytes = repeated(&mut client, typ, payload, most);
            bytes.extend(seal(&mut client, ContentType::ApplicationData, b"x"));
            client.io.write_all(&bytes).await.unwrap();
            assert_eq!(within(server.read_u8()).await.unwrap(), b'x');
        }
        let bytes = repeated(&mut client, typ, payload, most + 1);
        client.io.write_all(&bytes).await.unwrap();
        let error = within(server.read_u8()).await.unwrap_err();
        assert_eq!(*tls_error(&error), flood.into());
    }
}

/// A NewSessionTicket (section 4.6.1) of a day.
pub(super) const TICKET: [u8; 20] = [
    4, 0, 0, 16, 0, 1, 0x51, 0x80, 1, 2, 3, 4, 1, 7, 0, 2, 8, 9, 0, 0,
];

#[tokio::test]
async fn tickets_are_taken_one_by_one_or_many_in_a_record_but_not_without_end() {
    let most = usize::from(MAX_IDLE_MESSAGES);
    for in_a_record in [1, 8, 32] {
        let (mut client, mut server) = streams().await;
        let record = TICKET.repeat(in_a_record);
        let records = most / in_a_record;
        let mut bytes = repeated(&mut server, ContentType::Handshake, &record, records);
        bytes.extend(seal(&mut server, ContentType::ApplicationData, b"x"));
        server.io.write_all(&bytes).await.unwrap();
        assert_eq!(within(client.read_u8()).await.unwrap(), b'x');

        let bytes = repeated(&mut server, ContentType::Handshake, &record, records + 1);
        server.io.write_all(&bytes).await.unwrap();
        let error = within(client.read_u8()).await.unwrap_err();
        let flood = PeerMisbehaved::TooManyKeyUpdateRequests;
        assert_eq!(*tls_error(&error), flood.into());
    }
}

#[tokio::test]
async fn a_ticket_that_is_none_is_an_error() {
    let (mut client, mut server) = streams().await;
    let record = seal(&mut server, ContentType::Handshake, &[4, 0, 0, 2, 0, 0]);
    server.io.write_all(&record).await.unwrap();
    let error = within(client.read_u8()).await.unwrap_err();
    assert!(matches!(tls_error(&error), Error::InvalidMessage(_)));
    let told = within(server.read_u8()).await.unwrap_err();
    let alert = AlertDescription::DecodeError;
    assert_eq!(*tls_error(&told), Error::AlertReceived(alert));
}

#[tokio::test]
async fn pieces_of_a_message_without_end_are_an_error() {
    let (mut client, mut server) = streams().await;
    let mut bytes = seal(&mut server, ContentType::Handshake, &[4, 0, 0xff, 0]);
    bytes.extend(repeated(&mut server, ContentType::Handshake, &[0], 100));
    server.io.write_all(&bytes).await.unwrap();
    let error = within(client.read_u8()).await.unwrap_err();
    let flood = PeerMisbehaved::TooManyEmptyFragments;
    assert_eq!(*tls_error(&error), flood.into());
}

#[tokio::test]
async fn both_sides_may_ask_each_other_for_new_keys_at_once() {
    let (mut ours, mut theirs) = pair().await;
    for round in 0..50 {
        ours.outgoing.update_key_for_test(&mut ours.keys);
        theirs.get_mut().1.refresh_traffic_keys().unwrap();
        let bytes = pattern(100 + round);
        carries(&mut ours, &mut theirs, &bytes).await;
        carries(&mut theirs, &mut ours, &bytes).await;
    }
}
