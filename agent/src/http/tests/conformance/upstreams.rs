//! Answers of upstreams that are not what they should be.

use super::*;

/// What a client gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gets {
    /// A whole answer with this status and body.
    Whole(u16, &'static str),
    /// An answer of ours: 502 and this reason.
    Reason(&'static str),
    /// An answer that begins and is reset.
    Cut,
}

use Gets::{Cut, Reason, Whole};

/// One answer, written at once; and then the end of the connection.
async fn got(answer: &'static [u8]) -> (Gets, String) {
    let upstream = Upstream::new(move |mut stream| async move {
        read_head(&mut stream).await;
        let _ = stream.write_all(answer).await;
        let _ = stream.shutdown().await;
        let _ = stream.read_to_end(&mut Vec::new()).await;
    })
    .await;
    let proxy = Proxy::to(upstream.address, Wire::Http1).await;
    let mut client = proxy.connect().await;
    client
        .write_all(b"GET / HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let (said, ended) = read_all(&mut client).await;
    let (head, body) = said.split_once("\r\n\r\n").unwrap_or((&said, ""));
    let gets = match ended {
        Err(_) => Cut,
        Ok(()) if head.starts_with("HTTP/1.1 502") => {
            let reason = ["malformed", "upstream_reset", "never_sent"];
            Reason(reason.into_iter().find(|word| body.contains(word)).unwrap())
        }
        Ok(()) => {
            let status = head.split(' ').nth(1).unwrap().parse().unwrap();
            Whole(status, if body == "ok" { "ok" } else { "" })
        }
    };
    (gets, said)
}

#[tokio::test]
async fn answers_of_http1_are_passed_whole_or_told_for_what_they_are() {
    let mut wrong = Vec::new();
    #[rustfmt::skip]
    let cases: &[(&str, &str, &'static [u8], Gets)] = &[
        ("6.3", "a length", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", Whole(200, "ok")),
        ("6.3", "chunks", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n2\r\nok\r\n0\r\n\r\n", Whole(200, "")),
        ("6.3", "until the end", b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nok", Whole(200, "")),
        ("4", "no reason phrase", b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\nok", Whole(200, "ok")),
        ("4", "a status of its own", b"HTTP/1.1 299 Odd\r\ncontent-length: 2\r\n\r\nok", Whole(299, "ok")),
        ("6.3", "no body behind 204", b"HTTP/1.1 204 No Content\r\n\r\n", Whole(204, "")),
        ("6.3", "no body behind 304", b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n", Whole(304, "")),
        ("8", "shorter than it says", b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\nok", Cut),
        ("8", "chunks that break off", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n", Cut),
        ("7.1", "a chunk that is none", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nok\r\n", Cut),
        ("6.3", "two lengths", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok", Reason("malformed")),
        ("6.3", "a length and chunks", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", Reason("malformed")),
        ("6.3", "a length that is none", b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\nok", Reason("malformed")),
        ("4", "no status line", b"hello\r\n\r\n", Reason("malformed")),
        ("4", "a status that is none", b"HTTP/1.1 20 OK\r\n\r\n", Reason("malformed")),
        ("4", "another version", b"HTTP/3.1 200 OK\r\n\r\n", Reason("malformed")),
        ("5.1", "white space before a colon", b"HTTP/1.1 200 OK\r\nx : y\r\ncontent-length: 2\r\n\r\nok", Reason("malformed")),
        ("5.2", "a folded field", b"HTTP/1.1 200 OK\r\nx: y\r\n z\r\ncontent-length: 2\r\n\r\nok", Reason("malformed")),
        ("5.5", "NUL in a value", b"HTTP/1.1 200 OK\r\nx: \0\r\ncontent-length: 2\r\n\r\nok", Reason("malformed")),
        ("8", "nothing", b"", Reason("upstream_reset")),
        ("8", "half a head", b"HTTP/1.1 200 OK\r\ncontent-le", Reason("upstream_reset")),
    ];
    for (section, what, answer, expected) in cases {
        let (gets, said) = got(answer).await;
        if gets != *expected {
            wrong.push(format!(
                "{section} {what}: {expected:?} expected, {gets:?} seen: {said:?}"
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn what_an_upstream_says_unasked_answers_no_later_request() {
    let upstream = Upstream::new(|mut stream| async move {
        read_head(&mut stream).await;
        let one = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
        let forged = "HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged";
        let _ = stream.write_all(format!("{one}{forged}").as_bytes()).await;
        while read_head(&mut stream).await.is_some() {
            let _ = stream.write_all(one.as_bytes()).await;
        }
    })
    .await;
    let proxy = Proxy::to(upstream.address, Wire::Http1).await;
    let mut client = proxy.connect().await;
    for _ in 0..3 {
        client
            .write_all(b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n")
            .await
            .unwrap();
        let head = read_head(&mut client).await.unwrap();
        let length = match head.contains("content-length: 2") {
            true => 2,
            false => panic!("{head}"),
        };
        assert_eq!(read_text(&mut client, length).await, "ok");
    }
    assert_eq!(upstream.connections(), 3);
}

/// What a client sees of a stream whose upstream answers it with these frames.
async fn seen_of(frames: Vec<u8>) -> Seen {
    let upstream = Upstream::new(move |mut stream| {
        let frames = frames.clone();
        async move {
            stream.write_all(&raw::PREFACE[24..]).await.unwrap();
            raw::read_until_headers(&mut stream).await;
            let _ = stream.write_all(&frames).await;
            let _ = stream.read_to_end(&mut Vec::new()).await;
        }
    })
    .await;
    let proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let mut peer = Peer::connect(&proxy).await;
    peer.send(&request(1)).await;
    let mut status = None;
    loop {
        let (kind, flags, id, payload) = raw::read_flags(&mut peer.stream).await.unwrap();
        match kind {
            raw::RST_STREAM if id == 1 => {
                return Stream(u32::from_be_bytes(payload.try_into().unwrap()));
            }
            raw::GOAWAY => panic!("the client's connection ended"),
            raw::HEADERS if status.is_none() => status = Some(raw::status(&payload)),
            _ => {}
        }
        let ends = matches!(kind, raw::DATA | raw::HEADERS) && flags & raw::END_STREAM != 0;
        if let (true, Some(status)) = (ends, status) {
            return Answered(status);
        }
    }
}

#[tokio::test]
async fn answers_of_http2_are_passed_whole_or_told_for_what_they_are() {
    const STATUS: &[u8] = &[0x88];
    let head =
        |flags: u8, block: &[u8]| raw::frame(raw::HEADERS, raw::END_HEADERS | flags, 1, block);
    let with = |name: &[u8], value: &[u8]| head(0, &[STATUS, &raw::field(name, value)].concat());
    let last = |payload| data(1, raw::END_STREAM, payload);
    let mut wrong = Vec::new();
    #[rustfmt::skip]
    let cases: Vec<(&str, &str, Vec<u8>, Seen)> = vec![
        ("8.1", "a head and a body", all(&[head(0, STATUS), last(b"ok")]), Answered(200)),
        ("8.1", "a head alone", head(raw::END_STREAM, STATUS), Answered(200)),
        ("8.1", "trailers", all(&[head(0, STATUS), data(1, 0, b"ok"), head(raw::END_STREAM, &raw::field(b"x", b"y"))]), Answered(200)),
        ("8.1", "an interim answer first", all(&[head(0, b"\x48\x03103"), head(0, STATUS), last(b"ok")]), Answered(200)),
        ("8.3.2", "no :status", all(&[head(0, &raw::field(b"x", b"y")), last(b"ok")]), Answered(502)),
        // The crate h2 drops it.
        ("8.3", "a request's pseudo-header", all(&[head(0, &[STATUS, &[0x84]].concat()), last(b"ok")]), Answered(200)),
        ("8.2.1", "upper case in a name", all(&[with(b"X", b"y"), last(b"ok")]), Answered(502)),
        ("8.2.2", "connection", all(&[with(b"connection", b"close"), last(b"ok")]), Answered(502)),
        ("8.1", "DATA before HEADERS", last(b"ok"), Answered(502)),
        ("8.4", "a push", raw::frame(raw::PUSH_PROMISE, raw::END_HEADERS, 1, &[&[0, 0, 0, 2], STATUS].concat()), Answered(502)),
        ("4.2", "a frame that is too large", data(1, 0, &[0; (1 << 14) + 1]), Answered(502)),
        ("4.3", "a block that cannot be decoded", head(0, &[0x80]), Answered(502)),
        ("5.1", "a frame on an idle stream", data(7, 0, b"x"), Answered(502)),
        ("6.5.2", "bad settings", settings(&[(5, 1)]), Answered(502)),
        ("8.1.1", "longer than its length", all(&[with(b"content-length", b"1"), last(b"ok")]), Stream(PROTOCOL_ERROR)),
        ("8.1.1", "shorter than its length", all(&[with(b"content-length", b"9"), last(b"ok")]), Stream(PROTOCOL_ERROR)),
        ("8.1", "HEADERS twice", all(&[head(0, STATUS), head(0, STATUS), last(b"ok")]), Stream(PROTOCOL_ERROR)),
    ];
    for (section, what, frames, expected) in cases {
        let seen = timeout(FAR / 4, seen_of(frames)).await;
        if seen != Ok(expected) {
            wrong.push(format!(
                "{section} {what}: {expected:?} expected, {seen:?} seen"
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
