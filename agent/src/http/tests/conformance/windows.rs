//! Flow control and the number of streams: RFC 9113 sections 5.1.2, 5.2 and 6.9.

use super::*;

#[tokio::test]
async fn windows_that_cannot_be_end_the_stream_or_the_connection() {
    let flow = FLOW_CONTROL_ERROR;
    let most = (1 << 31) - 1;
    hold(vec![
        case(
            "6.9",
            "an increment of 0",
            window_update(0, 0),
            Connection(PROTOCOL_ERROR),
        ),
        case(
            "6.9",
            "an increment of 0 on a stream",
            all(&[open(1), window_update(1, 0)]),
            Stream(PROTOCOL_ERROR),
        )
        // A frame that cannot be read, to the crate h2.
        .instead(Connection(PROTOCOL_ERROR)),
        case(
            "6.9.1",
            "a window above 2^31-1",
            window_update(0, most),
            Connection(flow),
        ),
        case(
            "6.9.1",
            "a stream's window above 2^31-1",
            all(&[open(1), window_update(1, most)]),
            Stream(flow),
        ),
        case(
            "6.9.2",
            "settings that take an open stream's window above 2^31-1",
            all(&[open(1), window_update(1, 1), settings(&[(4, most)])]),
            Connection(flow),
        ),
    ])
    .await;
}

/// What a server sends at first to a client with this window for each stream.
async fn first_data(settings: &[(u16, u32)]) -> (Peer, Vec<u8>) {
    let upstream = answering(b"hello").await;
    let proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let mut peer = Peer::connect(&proxy).await;
    peer.send(&all(&[super::settings(settings), request(1)]))
        .await;
    let (_, _, payload) = peer.next(&[raw::DATA]).await.unwrap();
    (peer, payload)
}

#[tokio::test]
async fn no_more_is_sent_than_the_window_allows() {
    let (_, sent) = first_data(&[(4, 1)]).await;
    assert_eq!(sent, b"h");
}

#[tokio::test]
async fn settings_in_one_frame_are_taken_in_their_order() {
    let (_, sent) = first_data(&[(4, 100), (4, 1)]).await;
    assert_eq!(sent, b"h");
}

#[tokio::test]
async fn a_change_of_the_initial_window_reaches_streams_that_are_open() {
    let upstream = answering(b"hello").await;
    let proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let mut peer = Peer::connect(&proxy).await;
    peer.send(&all(&[settings(&[(4, 0)]), request(1)])).await;
    peer.next(&[raw::HEADERS]).await.unwrap();
    peer.send(&settings(&[(4, 2)])).await;
    let (_, _, payload) = peer.next(&[raw::DATA]).await.unwrap();
    assert_eq!(payload, b"he");
}

#[tokio::test]
async fn a_window_that_fell_below_zero_is_filled_up_before_more_is_sent() {
    let (mut peer, sent) = first_data(&[(4, 3)]).await;
    assert_eq!(sent, b"hel");
    // Three were sent of a window of two: -1, and then 1.
    peer.send(&all(&[settings(&[(4, 2)]), window_update(1, 2)]))
        .await;
    let (_, _, payload) = peer.next(&[raw::DATA]).await.unwrap();
    assert_eq!(payload, b"l");
}

#[tokio::test]
async fn a_stream_above_the_limit_is_refused_and_the_others_go_on() {
    let upstream = answering(b"ok").await;
    let limits = ServerLimits {
        streams: 2,
        ..ServerLimits::default()
    };
    let proxy = Proxy::bounded(upstream.address, Wire::Http2, limits).await;
    let mut peer = Peer::connect(&proxy).await;
    peer.send(&all(&[open(1), open(3), open(5)])).await;
    let (_, id, code) = peer.next(&[raw::RST_STREAM]).await.unwrap();
    assert_eq!((id, code), (5, REFUSED_STREAM.to_be_bytes().to_vec()));
    peer.send(&data(1, raw::END_STREAM, b"x")).await;
    let (_, id, block) = peer.next(&[raw::HEADERS, raw::GOAWAY]).await.unwrap();
    assert_eq!((id, raw::status(&block)), (1, 200));
}

#[tokio::test]
async fn more_than_the_window_of_a_connection_ends_it() {
    // Taken by nobody, so that no window is given back.
    let upstream = Upstream::new(|mut stream| async move {
        raw::read_until_headers(&mut stream).await;
        std::future::pending::<()>().await;
    })
    .await;
    let limits = ServerLimits {
        streams: 1,
        ..ServerLimits::default()
    };
    let proxy = Proxy::bounded(upstream.address, Wire::Http2, limits).await;
    let mut peer = Peer::connect(&proxy).await;
    peer.send(&open(1)).await;
    let (mut read, mut write) = peer.stream.into_split();
    let flood = tokio::spawn(async move {
        let frame = data(1, 0, &[0; 1 << 14]);
        while write.write_all(&frame).await.is_ok() {}
    });
    let mut said = Vec::new();
    let _ = timeout(FAR, read.read_to_end(&mut said)).await.unwrap();
    flood.await.unwrap();
    let error = [
        &[raw::GOAWAY, 0, 0, 0, 0, 0, 0, 0, 0, 1][..],
        &FLOW_CONTROL_ERROR.to_be_bytes(),
    ]
    .concat();
    let goaway = said.windows(error.len()).any(|one| one == error);
    let reset = [
        &[raw::RST_STREAM, 0, 0, 0, 0, 1][..],
        &FLOW_CONTROL_ERROR.to_be_bytes(),
    ]
    .concat();
    let reset = said.windows(reset.len()).any(|one| one == reset);
    assert!(goaway || reset, "{said:x?}");
}
