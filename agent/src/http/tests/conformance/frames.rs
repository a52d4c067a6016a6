//! Frames and streams: RFC 9113 sections 3 to 6.

use super::*;

#[tokio::test]
async fn frames_that_may_come_do_no_harm() {
    let ping = |flags: u8| raw::frame(raw::PING, flags, 0, b"opaque\0\0");
    let reserved = {
        let mut frame = ping(0);
        frame[5] |= 0x80;
        frame
    };
    let half = &raw::request()[..3];
    let rest = &raw::request()[3..];
    let in_parts = all(&[
        raw::frame(raw::HEADERS, raw::END_STREAM, 1, half),
        raw::frame(raw::CONTINUATION, 0, 1, &rest[..1]),
        raw::frame(raw::CONTINUATION, raw::END_HEADERS, 1, &rest[1..]),
    ]);
    let padded = |block: &[u8], prefix: &[u8]| {
        let flags = raw::END_STREAM | raw::END_HEADERS | raw::PADDED | raw::PRIORITIZED;
        let payload = [&[3], prefix, block, &[0; 3]].concat();
        raw::frame(raw::HEADERS, flags, 1, &payload)
    };
    hold(vec![
        case(
            "4.1",
            "a frame of unknown type",
            raw::frame(0x16, 0, 0, b"x"),
            Ignored,
        ),
        case("4.1", "flags that mean nothing", ping(0xfe), Ignored),
        case("4.1", "the reserved bit", reserved, Ignored),
        case(
            "4.2",
            "DATA of 2^14 octets",
            all(&[open(1), data(1, raw::END_STREAM, &[0; 1 << 14])]),
            Answered(200),
        ),
        case("5.1", "PRIORITY on an idle stream", priority(1, 3), Ignored),
        case(
            "5.1",
            "PRIORITY, RST_STREAM and WINDOW_UPDATE after the end of a request",
            all(&[request(1), priority(1, 3), window_update(1, 1), reset(1)]),
            Ignored,
        ),
        case("5.1", "PRIORITY on a closed stream", request(1), Ignored).then(priority(1, 3)),
        case(
            "5.1",
            "WINDOW_UPDATE and RST_STREAM on a closed stream",
            request(1),
            Ignored,
        )
        .then(all(&[window_update(1, 1), reset(1)])),
        case(
            "6.2",
            "padding and priority",
            padded(&raw::request(), &[0, 0, 0, 3, 16]),
            Answered(200),
        ),
        case(
            "6.1",
            "padded DATA",
            all(&[
                open(1),
                data(1, raw::END_STREAM | raw::PADDED, b"\x02hi\0\0"),
            ]),
            Answered(200),
        ),
        case(
            "6.5.2",
            "an unknown setting",
            settings(&[(0xff, 1)]),
            Ignored,
        ),
        case(
            "6.7",
            "a PING's ACK that was not asked for",
            ping(raw::ACK),
            Ignored,
        ),
        case("6.10", "a block in three frames", in_parts, Answered(200)),
        case(
            "7",
            "RST_STREAM with an unknown code",
            all(&[
                open(1),
                raw::frame(raw::RST_STREAM, 0, 1, &0xff_u32.to_be_bytes()),
            ]),
            Ignored,
        ),
        case(
            "8.1",
            "a body and trailers",
            all(&[
                open(1),
                data(1, 0, b"body"),
                raw::frame(
                    raw::HEADERS,
                    raw::END_STREAM | raw::END_HEADERS,
                    1,
                    &raw::field(b"x-sum", b"4"),
                ),
            ]),
            Answered(200),
        ),
    ])
    .await;
}

fn priority(stream: u32, on: u32) -> Vec<u8> {
    let payload = [&on.to_be_bytes()[..], &[16]].concat();
    raw::frame(raw::PRIORITY, 0, stream, &payload)
}

/// The crate h2 takes a frame that it cannot read for a PROTOCOL_ERROR, whatever is wrong with it.
fn unreadable(case: Case) -> Case {
    case.instead(Connection(PROTOCOL_ERROR))
}

#[tokio::test]
async fn frames_of_a_wrong_size_end_the_connection() {
    let begun = |rest: Vec<u8>| all(&[open(1), rest]);
    let wrong = Connection(FRAME_SIZE_ERROR);
    hold(vec![
        case(
            "4.2",
            "DATA above 2^14 octets",
            begun(data(1, 0, &[0; (1 << 14) + 1])),
            wrong,
        ),
        case(
            "4.2",
            "HEADERS above 2^14 octets",
            of_block(&[0; (1 << 14) + 1]),
            wrong,
        ),
        unreadable(case(
            "6.3",
            "PRIORITY of 4 octets",
            begun(raw::frame(raw::PRIORITY, 0, 1, &[0; 4])),
            Stream(FRAME_SIZE_ERROR),
        )),
        unreadable(case(
            "6.4",
            "RST_STREAM of 3 octets",
            begun(raw::frame(raw::RST_STREAM, 0, 1, &[0; 3])),
            wrong,
        )),
        unreadable(case(
            "6.5",
            "SETTINGS of 3 octets",
            raw::frame(raw::SETTINGS, 0, 0, &[0; 3]),
            wrong,
        )),
        unreadable(case(
            "6.5",
            "an ACK of SETTINGS that has a payload",
            raw::frame(raw::SETTINGS, raw::ACK, 0, &[0; 6]),
            wrong,
        )),
        unreadable(case(
            "6.7",
            "PING of 6 octets",
            raw::frame(raw::PING, 0, 0, &[0; 6]),
            wrong,
        )),
        unreadable(case(
            "6.9",
            "WINDOW_UPDATE of 3 octets",
            raw::frame(raw::WINDOW_UPDATE, 0, 0, &[0; 3]),
            wrong,
        )),
    ])
    .await;
}

#[tokio::test]
async fn frames_on_a_stream_that_cannot_have_them_end_it_or_the_connection() {
    let wrong = Connection(PROTOCOL_ERROR);
    let closed = Stream(STREAM_CLOSED);
    let continuation = raw::frame(raw::CONTINUATION, raw::END_HEADERS, 1, &raw::request());
    let cut = raw::frame(raw::HEADERS, raw::END_STREAM, 1, &raw::request()[..3]);
    hold(vec![
        case(
            "5.1",
            "DATA on an idle stream",
            data(1, raw::END_STREAM, b"x"),
            wrong,
        ),
        case("5.1, 6.4", "RST_STREAM on an idle stream", reset(1), wrong),
        case(
            "5.1",
            "WINDOW_UPDATE on an idle stream",
            window_update(1, 100),
            wrong,
        ),
        case(
            "5.1",
            "CONTINUATION on an idle stream",
            continuation.clone(),
            wrong,
        ),
        case(
            "5.1, 6.1",
            "DATA after the end of a request",
            all(&[request(1), data(1, raw::END_STREAM, b"x")]),
            closed,
        )
        .instead(wrong),
        case(
            "5.1",
            "HEADERS after the end of a request",
            all(&[request(1), request(1)]),
            closed,
        )
        .instead(wrong),
        case(
            "6.10",
            "CONTINUATION after the end of a request's head",
            all(&[request(1), continuation.clone()]),
            wrong,
        ),
        case(
            "5.1",
            "DATA after RST_STREAM",
            all(&[open(1), reset(1), data(1, raw::END_STREAM, b"x")]),
            closed,
        ),
        case(
            "5.1",
            "HEADERS after RST_STREAM",
            all(&[open(1), reset(1), request(1)]),
            closed,
        )
        .instead(wrong),
        case(
            "6.10",
            "CONTINUATION after RST_STREAM",
            all(&[open(1), reset(1), continuation.clone()]),
            wrong,
        ),
        case("5.1", "DATA on a closed stream", request(1), closed).then(data(
            1,
            raw::END_STREAM,
            b"x",
        )),
        case(
            "5.1",
            "HEADERS on a closed stream",
            request(1),
            Connection(STREAM_CLOSED),
        )
        .then(request(1))
        .instead(wrong),
        case("6.10", "CONTINUATION on a closed stream", request(1), wrong)
            .then(continuation.clone()),
        case("5.1.1", "a stream of even number", request(2), wrong),
        case(
            "5.1.1",
            "a stream below one that was opened before",
            all(&[request(5), request(3)]),
            wrong,
        ),
        case(
            "5.4.1",
            "a PING on a stream",
            raw::frame(raw::PING, 0, 1, &[0; 8]),
            wrong,
        ),
        case(
            "6.1",
            "DATA without a stream",
            data(0, raw::END_STREAM, b"x"),
            wrong,
        ),
        case(
            "6.2",
            "HEADERS without a stream",
            raw::frame(
                raw::HEADERS,
                raw::END_STREAM | raw::END_HEADERS,
                0,
                &raw::request(),
            ),
            wrong,
        ),
        case("6.3", "PRIORITY without a stream", priority(0, 3), wrong),
        case("6.4", "RST_STREAM without a stream", reset(0), wrong),
        case(
            "6.5",
            "SETTINGS on a stream",
            raw::frame(raw::SETTINGS, 0, 1, &[0, 3, 0, 0, 0, 100]),
            wrong,
        ),
        case(
            "6.8",
            "GOAWAY on a stream",
            raw::frame(raw::GOAWAY, 0, 1, &[0; 8]),
            wrong,
        ),
        case(
            "6.10",
            "CONTINUATION without a stream",
            all(&[
                cut,
                raw::frame(raw::CONTINUATION, raw::END_HEADERS, 0, &raw::request()[3..]),
            ]),
            wrong,
        ),
        case(
            "6.10",
            "CONTINUATION behind DATA",
            all(&[open(1), data(1, 0, b"x"), continuation]),
            wrong,
        ),
        case(
            "8.4",
            "PUSH_PROMISE of a client",
            all(&[
                open(1),
                raw::frame(
                    raw::PUSH_PROMISE,
                    raw::END_HEADERS,
                    1,
                    &[&[0, 0, 0, 2], &raw::request()[..]].concat(),
                ),
            ]),
            wrong,
        ),
    ])
    .await;
}

#[tokio::test]
async fn a_block_of_headers_that_is_interrupted_ends_the_connection() {
    let wrong = Connection(PROTOCOL_ERROR);
    let begun = |rest: Vec<u8>| {
        let head = raw::frame(raw::HEADERS, raw::END_STREAM, 1, &raw::request()[..3]);
        all(&[head, rest])
    };
    let more = raw::frame(raw::CONTINUATION, 0, 1, &raw::request()[3..4]);
    hold(vec![
        case("4.3, 6.2", "by PRIORITY", begun(priority(1, 3)), wrong),
        case(
            "4.3, 6.2",
            "by HEADERS of another stream",
            begun(request(3)),
            wrong,
        ),
        case(
            "6.10",
            "by DATA",
            begun(data(1, raw::END_STREAM, b"x")),
            wrong,
        ),
        case(
            "6.10",
            "after a CONTINUATION",
            begun(all(&[more, data(1, 0, b"x")])),
            wrong,
        ),
        case(
            "6.10",
            "by PING",
            begun(raw::frame(raw::PING, 0, 0, &[0; 8])),
            wrong,
        ),
        case(
            "6.10",
            "by CONTINUATION of another stream",
            begun(raw::frame(
                raw::CONTINUATION,
                raw::END_HEADERS,
                3,
                &raw::request()[3..],
            )),
            wrong,
        ),
        case(
            "5.5",
            "by a frame of unknown type",
            begun(raw::frame(0x16, 0, 1, b"x")),
            wrong,
        ),
    ])
    .await;
}

#[tokio::test]
async fn padding_longer_than_its_frame_ends_the_connection() {
    let wrong = Connection(PROTOCOL_ERROR);
    let headers = raw::END_STREAM | raw::END_HEADERS | raw::PADDED;
    let block = [&[200], &raw::request()[..]].concat();
    hold(vec![
        case(
            "6.1",
            "of DATA",
            all(&[open(1), data(1, raw::END_STREAM | raw::PADDED, b"\x05data")]),
            wrong,
        ),
        case(
            "6.2",
            "of HEADERS",
            raw::frame(raw::HEADERS, headers, 1, &block),
            wrong,
        ),
    ])
    .await;
}

#[tokio::test]
async fn a_stream_that_depends_on_itself_is_reset() {
    let wrong = Stream(PROTOCOL_ERROR);
    let flags = raw::END_STREAM | raw::END_HEADERS | raw::PRIORITIZED;
    let block = [&[0, 0, 0, 1, 16], &raw::request()[..]].concat();
    hold(vec![
        case(
            "RFC 7540 5.3.1",
            "by HEADERS",
            raw::frame(raw::HEADERS, flags, 1, &block),
            wrong,
        ),
        case(
            "RFC 7540 5.3.1",
            "by PRIORITY",
            all(&[open(1), priority(1, 1)]),
            wrong,
        ),
    ])
    .await;
}

#[tokio::test]
async fn settings_beyond_their_bounds_end_the_connection() {
    let wrong = Connection(PROTOCOL_ERROR);
    hold(vec![
        case(
            "6.5.2",
            "ENABLE_PUSH that is neither 0 nor 1",
            settings(&[(2, 2)]),
            wrong,
        ),
        unreadable(case(
            "6.5.2",
            "INITIAL_WINDOW_SIZE above 2^31-1",
            settings(&[(4, 1 << 31)]),
            Connection(FLOW_CONTROL_ERROR),
        )),
        case(
            "6.5.2",
            "MAX_FRAME_SIZE below 2^14",
            settings(&[(5, (1 << 14) - 1)]),
            wrong,
        ),
        case(
            "6.5.2",
            "MAX_FRAME_SIZE above 2^24-1",
            settings(&[(5, 1 << 24)]),
            wrong,
        ),
    ])
    .await;
}

#[tokio::test]
async fn a_preface_that_is_none_ends_the_connection() {
    let upstream = answering(b"ok").await;
    let mut proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let mut stream = proxy.connect().await;
    stream
        .write_all(b"INVALID CONNECTION PREFACE\r\n\r\n")
        .await
        .unwrap();
    let mut said = Vec::new();
    let _ = timeout(FAR, stream.read_to_end(&mut said)).await.unwrap();
    assert_eq!(proxy.ended().await.end, ServedEnd::Downstream);
    assert_eq!(upstream.connections(), 0);
}

#[tokio::test]
async fn a_ping_comes_back_with_its_payload_and_its_ack_does_not() {
    let upstream = answering(b"ok").await;
    let proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let mut peer = Peer::connect(&proxy).await;
    peer.send(&raw::frame(raw::PING, raw::ACK, 0, b"answered"))
        .await;
    peer.send(&raw::frame(raw::PING, 0, 0, b"question")).await;
    let (_, flags, id, payload) = loop {
        let frame = raw::read_flags(&mut peer.stream).await.unwrap();
        if frame.0 == raw::PING {
            break frame;
        }
    };
    assert_eq!((flags, id, &payload[..]), (raw::ACK, 0, &b"question"[..]));
}

#[tokio::test]
async fn settings_are_acknowledged() {
    let upstream = answering(b"ok").await;
    let proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let mut peer = Peer::connect(&proxy).await;
    peer.send(&settings(&[(3, 100)])).await;
    // The first is for the SETTINGS of the preface.
    for _ in 0..2 {
        loop {
            let (kind, flags, ..) = raw::read_flags(&mut peer.stream).await.unwrap();
            if kind == raw::SETTINGS && flags == raw::ACK {
                break;
            }
        }
    }
}

#[tokio::test]
async fn a_goaway_of_the_client_lets_what_is_under_way_end() {
    for code in [0, 0xff] {
        let upstream = answering(b"ok").await;
        let mut proxy = Proxy::to(upstream.address, Wire::Http2).await;
        let mut peer = Peer::connect(&proxy).await;
        let goaway = [0_u32.to_be_bytes(), u32::to_be_bytes(code)].concat();
        peer.send(&all(&[open(1), raw::frame(raw::GOAWAY, 0, 0, &goaway)]))
            .await;
        peer.send(&data(1, raw::END_STREAM, b"x")).await;
        let (_, id, block) = peer.next(&[raw::HEADERS, raw::RST_STREAM]).await.unwrap();
        assert_eq!((id, raw::status(&block)), (1, 200), "code {code}");
        while raw::read(&mut peer.stream).await.is_some() {}
        drop(peer);
        // A client that names an error has broken its connection.
        let end = match code {
            0 => ServedEnd::InOrder,
            _ => ServedEnd::Downstream,
        };
        assert_eq!(proxy.ended().await.end, end, "code {code}");
    }
}
