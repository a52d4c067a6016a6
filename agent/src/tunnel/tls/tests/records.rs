//! Single records: those that may come, and those that may not.

use super::*;

#[tokio::test]
async fn records_that_no_peer_may_send_end_it_with_the_alert_for_them() {
    let sealed = |typ, payload: &'static [u8]| move |client: &mut Ours| seal(client, typ, payload);
    let raw = |record: &'static [u8]| move |_: &mut Ours| record.to_vec();
    type Make = Box<dyn Fn(&mut Ours) -> Vec<u8>>;
    let cases: [(Make, AlertDescription); 20] = [
        // A replay: sealed under a number that was used.
        (
            Box::new(|client| {
                let record = seal(client, ContentType::ApplicationData, b"x");
                [&record[..], &record[..]].concat()
            }),
            AlertDescription::BadRecordMac,
        ),
        (
            Box::new(raw(&[23, 3, 3, 0, 1, 7])),
            AlertDescription::BadRecordMac,
        ),
        (
            Box::new(raw(&[23, 3, 3, 0x41, 1])),
            AlertDescription::RecordOverflow,
        ),
        // Unprotected: as an attacker between both could.
        (
            Box::new(raw(&[21, 3, 3, 0, 2, 1, 0])),
            AlertDescription::UnexpectedMessage,
        ),
        (
            Box::new(raw(&[20, 3, 3, 0, 1, 1])),
            AlertDescription::UnexpectedMessage,
        ),
        // A server takes no ticket, and nobody a second handshake.
        (
            Box::new(sealed(ContentType::Handshake, &[4, 0, 0, 0])),
            AlertDescription::UnexpectedMessage,
        ),
        (
            Box::new(sealed(ContentType::Handshake, &[24, 0, 0, 1, 2])),
            AlertDescription::IllegalParameter,
        ),
        // Keys change at the end of a record only.
        (
            Box::new(sealed(ContentType::Handshake, &[24, 0, 0, 1, 0, 24])),
            AlertDescription::UnexpectedMessage,
        ),
        // A sealed record of another version than the one that its tag stands for.
        (
            Box::new(|client| {
                let mut record = seal(client, ContentType::ApplicationData, b"x");
                record[2] = 1;
                record
            }),
            AlertDescription::ProtocolVersion,
        ),
        // One byte more than a record may carry; and nothing but padding.
        (
            Box::new(|client| {
                seal(
                    client,
                    ContentType::ApplicationData,
                    &pattern(MAX_PLAIN + 1),
                )
            }),
            AlertDescription::RecordOverflow,
        ),
        (
            Box::new(sealed(ContentType::Unknown(0), &[0; 10])),
            AlertDescription::UnexpectedMessage,
        ),
        // Kinds that are not of this place, sealed.
        (
            Box::new(sealed(ContentType::ChangeCipherSpec, &[1])),
            AlertDescription::UnexpectedMessage,
        ),
        (
            Box::new(sealed(ContentType::Heartbeat, &[1, 0, 0])),
            AlertDescription::UnexpectedMessage,
        ),
        // Neither a handshake message nor an alert may be empty, and an alert is alone in its record.
        (
            Box::new(sealed(ContentType::Handshake, &[])),
            AlertDescription::UnexpectedMessage,
        ),
        (
            Box::new(sealed(ContentType::Alert, &[])),
            AlertDescription::UnexpectedMessage,
        ),
        (
            Box::new(sealed(ContentType::Alert, &[1, 90, 1, 0])),
            AlertDescription::DecodeError,
        ),
        // A second handshake, and a KeyUpdate of two bytes.
        (
            Box::new(sealed(ContentType::Handshake, &[1, 0, 0, 0])),
            AlertDescription::UnexpectedMessage,
        ),
        (
            Box::new(sealed(ContentType::Handshake, &[24, 0, 0, 2, 0, 0])),
            AlertDescription::DecodeError,
        ),
        // A message in pieces with data, or with nothing, in between.
        (
            Box::new(|client| {
                let piece = seal(client, ContentType::Handshake, &[24, 0, 0]);
                [piece, seal(client, ContentType::ApplicationData, b"x")].concat()
            }),
            AlertDescription::UnexpectedMessage,
        ),
        (
            Box::new(|client| {
                let piece = seal(client, ContentType::Handshake, &[24, 0, 0]);
                [piece, seal(client, ContentType::ApplicationData, b"")].concat()
            }),
            AlertDescription::UnexpectedMessage,
        ),
    ];
    for (make, alert) in cases {
        let (client, server) = both().await;
        let mut client = client.into_stream().unwrap();
        let mut server = server.into_stream().unwrap();
        let record = make(&mut client);
        client.io.write_all(&record).await.unwrap();
        let mut all = Vec::new();
        let error = within(server.read_to_end(&mut all)).await.unwrap_err();
        tls_error(&error);
        let told = within(client.read_u8()).await.unwrap_err();
        assert_eq!(*tls_error(&told), Error::AlertReceived(alert), "{error}");
    }
}

#[tokio::test]
async fn what_pads_a_record_is_not_data() {
    let (mut client, mut server) = streams().await;
    // The type comes after the data, and zeros after it (section 5.4).
    let padded = seal(&mut client, ContentType::Unknown(0), b"padded\x17\0\0\0\0");
    let longest = [&pattern(MAX_PLAIN - 1)[..], &[23]].concat();
    let longest = seal(&mut client, ContentType::Unknown(0), &longest);
    client
        .io
        .write_all(&[padded, longest].concat())
        .await
        .unwrap();
    let mut got = vec![0; 6 + MAX_PLAIN - 1];
    within(server.read_exact(&mut got)).await.unwrap();
    assert_eq!(&got[..6], b"padded");
    assert!(got[6..] == pattern(MAX_PLAIN - 1));
}

#[tokio::test]
async fn an_alert_is_fatal_whatever_level_it_claims_and_nothing_is_written_after_it() {
    for level in [1, 2, 77] {
        for alert in [
            AlertDescription::InternalError,
            AlertDescription::Unknown(200),
        ] {
            let (mut client, mut server) = streams().await;
            let record = [level, alert.into()];
            let record = seal(&mut client, ContentType::Alert, &record);
            client.io.write_all(&record).await.unwrap();
            let error = within(server.read_u8()).await.unwrap_err();
            assert_eq!(*tls_error(&error), Error::AlertReceived(alert));
            let error = server.write_all(b"more").await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
            // Nor is it answered.
            server.shutdown().await.unwrap();
            let error = within(client.read_u8()).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}

#[tokio::test]
async fn what_follows_close_notify_is_ignored_and_holds_no_memory() {
    let (mut client, mut server) = streams().await;
    let records = [
        seal(&mut client, ContentType::ApplicationData, b"last"),
        seal(&mut client, ContentType::Alert, &[1, 90]),
        seal(&mut client, ContentType::Alert, &[1, 0]),
        seal(&mut client, ContentType::ApplicationData, b"too late"),
    ];
    client.io.write_all(&records.concat()).await.unwrap();
    let mut got = Vec::new();
    within(server.read_to_end(&mut got)).await.unwrap();
    assert_eq!(got, b"last");
    assert!(!server.incoming.holds_a_buffer());
    // The other direction goes on.
    carries(&mut server, &mut client, b"an answer").await;
}

#[tokio::test]
async fn a_transport_that_ends_without_close_notify_is_cut_off_wherever_it_ends() {
    let length = {
        let (mut client, _) = streams().await;
        seal(&mut client, ContentType::ApplicationData, b"cut").len()
    };
    for kept in 0..=length {
        let (mut client, mut server) = streams().await;
        let record = seal(&mut client, ContentType::ApplicationData, b"cut");
        client.io.write_all(&record[..kept]).await.unwrap();
        drop(client);
        let mut got = Vec::new();
        for _ in 0..2 {
            let error = within(server.read_to_end(&mut got)).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{kept}");
        }
        assert_eq!(got, if kept == length { &b"cut"[..] } else { b"" });
    }
}
