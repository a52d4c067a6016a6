//! Requests that are malformed: RFC 9113 section 8.

use super::*;

/// The blocks of `:method: GET`, `:scheme: http`, `:path: /` and `:authority: shop`.
const METHOD: &[u8] = &[0x82];
const SCHEME: &[u8] = &[0x86];
const PATH: &[u8] = &[0x84];
const AUTHORITY: &[u8] = b"\x01\x04shop";

fn malformed(section: &'static str, what: &'static str, block: &[&[u8]]) -> Case {
    case(
        section,
        what,
        of_block(&block.concat()),
        Stream(PROTOCOL_ERROR),
    )
}

/// A request with one field more.
fn field(section: &'static str, what: &'static str, name: &[u8], value: &[u8]) -> Case {
    malformed(section, what, &[&raw::request(), &raw::field(name, value)])
}

/// A name or value that the crate h2 cannot keep is an error of its block to it, not of one field.
fn unreadable(case: Case) -> Case {
    case.instead(Connection(PROTOCOL_ERROR))
}

/// One that is refused with an answer, as RFC 9113 §8.1.1 allows.
fn refused(mut case: Case, status: u16) -> Case {
    case.demanded = Answered(status);
    case
}

#[tokio::test]
async fn pseudo_headers_are_there_once_in_front_and_known() {
    hold(vec![
        unreadable(malformed(
            "8.3",
            "unknown",
            &[&raw::field(b":test", b"ok"), &raw::request()],
        )),
        malformed(
            "8.3",
            "of an answer",
            &[&raw::request(), &raw::field(b":status", b"200")],
        ),
        malformed(
            "8.3",
            "behind a field",
            &[METHOD, SCHEME, &raw::field(b"x", b"y"), PATH, AUTHORITY],
        ),
        malformed("8.3.1", "no :method", &[SCHEME, PATH, AUTHORITY]),
        malformed("8.3.1", "no :scheme", &[METHOD, PATH, AUTHORITY]),
        malformed("8.3.1", "no :path", &[METHOD, SCHEME, AUTHORITY]),
        malformed(
            "8.3.1",
            "an empty :path",
            &[METHOD, SCHEME, &[0x04, 0], AUTHORITY],
        ),
        malformed(
            "8.3.1",
            "a :path without a slash",
            &[METHOD, SCHEME, b"\x04\x01a", AUTHORITY],
        ),
        malformed(
            "8.3.1",
            "two :method",
            &[METHOD, METHOD, SCHEME, PATH, AUTHORITY],
        ),
        malformed(
            "8.3.1",
            "two :scheme",
            &[METHOD, SCHEME, SCHEME, PATH, AUTHORITY],
        ),
        malformed(
            "8.3.1",
            "two :path",
            &[METHOD, SCHEME, PATH, PATH, AUTHORITY],
        ),
        malformed(
            "8.3.1",
            "two :authority",
            &[METHOD, SCHEME, PATH, AUTHORITY, AUTHORITY],
        ),
        malformed(
            "8.3.1",
            "a :scheme that is none",
            &[METHOD, b"\x06\x02h ", PATH, AUTHORITY],
        ),
        malformed(
            "RFC 8441 4",
            ":protocol that was not offered",
            &[
                METHOD,
                SCHEME,
                PATH,
                AUTHORITY,
                &raw::field(b":protocol", b"websocket"),
            ],
        ),
        refused(
            malformed(
                "8.3.1",
                "no :authority and no Host",
                &[METHOD, SCHEME, PATH],
            ),
            400,
        ),
        refused(
            malformed(
                "8.3.1",
                "a user in :authority",
                &[METHOD, SCHEME, PATH, b"\x01\x06u@shop"],
            ),
            400,
        ),
        refused(
            field(
                "8.3.1",
                "a Host that differs from :authority",
                b"host",
                b"other",
            ),
            400,
        ),
        refused(
            malformed(
                "8.3.1",
                "Host without :authority",
                &[METHOD, SCHEME, PATH, &raw::field(b"host", b"shop")],
            ),
            200,
        ),
        refused(
            malformed(
                "8.3.1",
                "OPTIONS *",
                &[b"\x02\x07OPTIONS", SCHEME, b"\x04\x01*", AUTHORITY],
            ),
            200,
        ),
        // No proxy for others stands here.
        refused(
            malformed("8.5", "CONNECT", &[b"\x02\x07CONNECT", AUTHORITY]),
            405,
        ),
        malformed(
            "8.5",
            "CONNECT with a :path",
            &[b"\x02\x07CONNECT", SCHEME, PATH, AUTHORITY],
        ),
    ])
    .await;
}

#[tokio::test]
async fn fields_of_a_connection_or_of_no_form_reset_the_stream() {
    hold(vec![
        unreadable(field("8.2.1", "upper case in a name", b"X-Test", b"ok")),
        unreadable(field("8.2.1", "a space in a name", b"x y", b"ok")),
        unreadable(field("8.2.1", "a colon in a name", b"x:y", b"ok")),
        unreadable(field("8.2.1", "an empty name", b"", b"ok")),
        unreadable(field(
            "8.2.1",
            "a byte above 0x7f in a name",
            b"x\xff",
            b"ok",
        )),
        unreadable(field("8.2.1", "NUL in a value", b"x", b"a\0b")),
        unreadable(field("8.2.1", "CR in a value", b"x", b"a\rb")),
        unreadable(field("8.2.1", "LF in a value", b"x", b"a\nb")),
        field("8.2.2", "connection", b"connection", b"keep-alive"),
        field("8.2.2", "keep-alive", b"keep-alive", b"timeout=5"),
        field(
            "8.2.2",
            "proxy-connection",
            b"proxy-connection",
            b"keep-alive",
        ),
        field(
            "8.2.2",
            "transfer-encoding",
            b"transfer-encoding",
            b"chunked",
        ),
        field("8.2.2", "upgrade", b"upgrade", b"websocket"),
        field("8.2.2", "te: gzip", b"te", b"gzip"),
        field(
            "8.2.2",
            "te: trailers and more",
            b"te",
            b"trailers, deflate;q=0.5",
        ),
        refused(field("8.2.1", "a space before a value", b"x", b" ok"), 400),
        refused(field("8.2.1", "a tab behind a value", b"x", b"ok\t"), 400),
        refused(field("8.2.2", "te: trailers", b"te", b"trailers"), 200),
        refused(field("8.2.1", "an empty value", b"x", b""), 200),
        refused(field("8.2.1", "a tab in a value", b"x", b"a\tb"), 200),
        refused(
            field("8.2.1", "a byte above 0x7f in a value", b"x", b"\xff"),
            200,
        ),
    ])
    .await;
}

#[tokio::test]
async fn a_length_that_is_not_the_bodys_resets_the_stream() {
    let of_length = |length: &[u8], flags: u8| {
        let block = [&raw::request()[..], &raw::field(b"content-length", length)].concat();
        raw::frame(raw::HEADERS, raw::END_HEADERS | flags, 1, &block)
    };
    let two = {
        let block = [
            &raw::request()[..],
            &raw::field(b"content-length", b"4"),
            &raw::field(b"content-length", b"5"),
        ]
        .concat();
        raw::frame(raw::HEADERS, raw::END_HEADERS, 1, &block)
    };
    let wrong = Stream(PROTOCOL_ERROR);
    let last = |payload| data(1, raw::END_STREAM, payload);
    hold(vec![
        case(
            "8.1.1",
            "too long",
            all(&[of_length(b"1", 0), last(b"test")]),
            wrong,
        ),
        case(
            "8.1.1",
            "too short",
            all(&[of_length(b"8", 0), last(b"test")]),
            wrong,
        ),
        case(
            "8.1.1",
            "too long in two frames",
            all(&[of_length(b"4", 0), data(1, 0, b"test"), last(b"test")]),
            wrong,
        ),
        case(
            "8.1.1",
            "none at all",
            of_length(b"4", raw::END_STREAM),
            wrong,
        ),
        case(
            "8.1.1",
            "no number",
            all(&[of_length(b"4x", 0), last(b"test")]),
            wrong,
        ),
        case(
            "8.1.1",
            "negative",
            all(&[of_length(b"-4", 0), last(b"test")]),
            wrong,
        ),
        case(
            "8.1.1",
            "two that differ",
            all(&[two, last(b"test")]),
            wrong,
        ),
        case(
            "8.1.1",
            "right",
            all(&[of_length(b"4", 0), last(b"test")]),
            Answered(200),
        ),
        case(
            "8.1.1",
            "right in two frames",
            all(&[of_length(b"4", 0), data(1, 0, b"te"), last(b"st")]),
            Answered(200),
        ),
        case(
            "8.1.1",
            "0 and no body",
            of_length(b"0", raw::END_STREAM),
            Answered(200),
        ),
    ])
    .await;
}

#[tokio::test]
async fn trailers_that_are_none_reset_the_stream() {
    let trailers = |flags: u8, block: &[u8]| {
        let frame = raw::frame(raw::HEADERS, raw::END_HEADERS | flags, 1, block);
        all(&[open(1), data(1, 0, b"x"), frame])
    };
    let wrong = Stream(PROTOCOL_ERROR);
    hold(vec![
        case(
            "8.1",
            "that do not end the stream",
            trailers(0, &raw::field(b"x", b"y")),
            wrong,
        ),
        // It is dropped, and the rest passed on.
        case(
            "8.1",
            "with a pseudo-header",
            trailers(raw::END_STREAM, METHOD),
            wrong,
        )
        .instead(Answered(200)),
        case(
            "8.2.1",
            "with upper case in a name",
            trailers(raw::END_STREAM, &raw::field(b"X", b"y")),
            wrong,
        )
        .instead(Connection(PROTOCOL_ERROR)),
        case(
            "8.2.2",
            "with a field of the connection",
            trailers(raw::END_STREAM, &raw::field(b"connection", b"close")),
            wrong,
        ),
    ])
    .await;
}

#[tokio::test]
async fn what_is_malformed_never_reaches_an_upstream() {
    let upstream = answering(b"ok").await;
    let proxy = Proxy::to(upstream.address, Wire::Http2).await;
    for extra in [
        raw::field(b"X-Upper", b"y"),
        raw::field(b"connection", b"close"),
        raw::field(b"x", b" padded"),
        raw::field(b"host", b"other"),
    ] {
        let mut peer = Peer::connect(&proxy).await;
        peer.send(&of_block(&[&raw::request()[..], &extra].concat()))
            .await;
        peer.next(&[raw::HEADERS, raw::RST_STREAM]).await;
    }
    assert_eq!(upstream.connections(), 0);
}
