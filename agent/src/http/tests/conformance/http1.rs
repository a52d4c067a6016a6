//! Messages of HTTP/1.1: RFC 9112, and what RFC 9110 adds.

use super::*;

/// What becomes of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Got {
    /// The upstream got it with this first line, its client's body and no other; the connection goes on.
    Passed(&'static str, &'static str),
    /// The same, but no further request is taken.
    Last(&'static str, &'static str),
    /// It was answered with this status and reason, and the connection ended in order.
    Refused(u16, &'static str),
}

use Got::{Last, Passed, Refused};

struct Message {
    section: &'static str,
    what: &'static str,
    bytes: Vec<u8>,
    demanded: Got,
    instead: Option<Got>,
}

fn message(
    section: &'static str,
    what: &'static str,
    bytes: impl AsRef<[u8]>,
    demanded: Got,
) -> Message {
    Message {
        section,
        what,
        bytes: bytes.as_ref().to_vec(),
        demanded,
        instead: None,
    }
}

impl Message {
    fn instead(mut self, got: Got) -> Self {
        self.instead = Some(got);
        self
    }
}

/// A GET with one line more in its head.
fn with(section: &'static str, what: &'static str, line: &str, demanded: Got) -> Message {
    let bytes = format!("GET / HTTP/1.1\r\nhost: shop\r\n{line}\r\n\r\n");
    message(section, what, bytes, demanded)
}

/// A POST with these lines, and what comes behind its head.
fn post(
    section: &'static str,
    what: &'static str,
    lines: &str,
    body: &str,
    demanded: Got,
) -> Message {
    let bytes = format!("POST / HTTP/1.1\r\nhost: shop\r\n{lines}\r\n\r\n{body}");
    message(section, what, bytes, demanded)
}

/// A request as an upstream got it.
struct Heard {
    head: String,
    body: String,
}

/// Tells of every request, and answers it.
async fn listener(answer: &'static str) -> (Upstream, mpsc::UnboundedReceiver<Heard>) {
    let (sender, heard) = mpsc::unbounded_channel();
    let upstream = Upstream::new(move |mut stream| {
        let sender = sender.clone();
        async move {
            while let Some(head) = read_head(&mut stream).await {
                let Some(body) = body(&mut stream, &head).await else {
                    return;
                };
                sender.send(Heard { head, body }).unwrap();
                if stream.write_all(answer.as_bytes()).await.is_err() {
                    return;
                }
            }
        }
    })
    .await;
    (upstream, heard)
}

/// The body behind a head, without its framing; none if it breaks off.
async fn body(stream: &mut TcpStream, head: &str) -> Option<String> {
    let field = |name: &str| {
        let line = head.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim().to_owned())
    };
    if let Some(length) = field("content-length:") {
        let mut body = vec![0; length.parse().unwrap()];
        stream.read_exact(&mut body).await.ok()?;
        return Some(String::from_utf8(body).unwrap());
    }
    let mut body = String::new();
    if field("transfer-encoding:").is_none() {
        return Some(body);
    }
    loop {
        let size = read_line(stream).await?;
        let size = usize::from_str_radix(&size, 16).unwrap();
        let mut chunk = vec![0; size];
        stream.read_exact(&mut chunk).await.ok()?;
        body.push_str(std::str::from_utf8(&chunk).unwrap());
        if size > 0 {
            read_line(stream).await?;
            continue;
        }
        while let Some(trailer) = read_line(stream).await.filter(|line| !line.is_empty()) {
            body.push_str(&format!("|{trailer}"));
        }
        return Some(body);
    }
}

async fn read_line(stream: &mut TcpStream) -> Option<String> {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        line.push(stream.read_u8().await.ok()?);
    }
    line.truncate(line.len() - 2);
    Some(String::from_utf8(line).unwrap())
}

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
/// Behind every message: whether it is taken for what it is tells where the message was thought to end.
const PROBE: &[u8] = b"GET /probe HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n\r\n";

async fn hold(messages: Vec<Message>) {
    let mut wrong = Vec::new();
    for message in messages {
        let (upstream, mut heard) = listener(OK).await;
        let proxy = Proxy::to(upstream.address, Wire::Http1).await;
        let mut client = proxy.connect().await;
        client.write_all(&message.bytes).await.unwrap();
        // One that has refused a message may have closed by now.
        let _ = client.write_all(PROBE).await;
        let mut said = Vec::new();
        let ended = timeout(FAR / 2, client.read_to_end(&mut said)).await;
        let said = String::from_utf8(said).unwrap();
        let first = heard.try_recv().ok();
        let line = |heard: &Heard| heard.head.lines().next().unwrap().to_owned();
        let expected = message.instead.as_ref().unwrap_or(&message.demanded);
        let second = heard.try_recv().ok().map(|heard| line(&heard));
        let statuses =
            said.matches("HTTP/1.1 200 OK").count() + said.matches("HTTP/1.0 200 OK").count();
        let right = match (expected, &first) {
            (Passed(first_line, body), Some(first)) => {
                line(first) == *first_line
                    && first.body == *body
                    && second.as_deref() == Some("GET /probe HTTP/1.1")
                    && statuses == 2
            }
            (Last(first_line, body), Some(first)) => {
                line(first) == *first_line
                    && first.body == *body
                    && second.is_none()
                    && statuses == 1
            }
            (Refused(status, reason), None) => {
                said.starts_with(&format!("HTTP/1.1 {status} "))
                    && said.contains(&format!("x-undermesh-reason: {reason}\r\n"))
                    && said.contains("connection: close\r\n")
                    && proxy.bad_requests(reason) == 1
                    && matches!(ended, Ok(Ok(_)))
            }
            _ => false,
        };
        if !right {
            wrong.push(format!(
                "{} {}: {:?} demanded, {expected:?} expected; {:?} upstream, then {second:?}; {said:?} {ended:?}",
                message.section,
                message.what,
                message.demanded,
                first.map(|first| (first.head, first.body)),
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

const GET: Got = Passed("GET / HTTP/1.1", "");

#[tokio::test]
async fn request_lines() {
    let line = |what, line: &str, demanded| {
        let bytes = format!("{line}\r\nhost: shop\r\n\r\n");
        message("3", what, bytes, demanded)
    };
    let unparsable = || Refused(400, "unparsable");
    hold(vec![
        message(
            "2.2",
            "empty lines before it",
            "\r\n\r\nGET / HTTP/1.1\r\nhost: shop\r\n\r\n",
            GET,
        ),
        message(
            "2.2",
            "lines that end with LF alone",
            "GET / HTTP/1.1\nhost: shop\n\n",
            GET,
        ),
        message(
            "2.2",
            "white space before the first field",
            "GET / HTTP/1.1\r\n x: y\r\nhost: shop\r\n\r\n",
            unparsable(),
        ),
        line(
            "a query",
            "GET /a?b=c&d HTTP/1.1",
            Passed("GET /a?b=c&d HTTP/1.1", ""),
        ),
        line(
            "a method of its own",
            "BREW /pot HTTP/1.1",
            Passed("BREW /pot HTTP/1.1", ""),
        ),
        line(
            "in absolute form",
            "GET http://shop/a HTTP/1.1",
            Passed("GET /a HTTP/1.1", ""),
        ),
        line(
            "in absolute form, without a path",
            "GET http://shop HTTP/1.1",
            GET,
        ),
        // hyper does not tell it from one with the path `/`.
        line(
            "OPTIONS in absolute form, without a path",
            "OPTIONS http://shop HTTP/1.1",
            Passed("OPTIONS * HTTP/1.1", ""),
        )
        .instead(Passed("OPTIONS / HTTP/1.1", "")),
        line(
            "in asterisk form",
            "OPTIONS * HTTP/1.1",
            Passed("OPTIONS * HTTP/1.1", ""),
        ),
        line(
            "in asterisk form, but no OPTIONS",
            "GET * HTTP/1.1",
            Refused(400, "target_invalid"),
        ),
        line(
            "in authority form, but no CONNECT",
            "GET shop:80 HTTP/1.1",
            Refused(400, "target_invalid"),
        ),
        line(
            "with a fragment",
            "GET /a#b HTTP/1.1",
            Refused(400, "target_invalid"),
        ),
        line("a method that is no token", "G@T / HTTP/1.1", unparsable()),
        line("no method", " / HTTP/1.1", unparsable()),
        line("no target", "GET HTTP/1.1", unparsable()),
        line("two spaces", "GET  / HTTP/1.1", unparsable()),
        line("a tab for a space", "GET\t/ HTTP/1.1", unparsable()),
        line(
            "white space within the target",
            "GET /a b HTTP/1.1",
            unparsable(),
        ),
        line("no version", "GET /", unparsable()),
        line("a version in lower case", "GET / http/1.1", unparsable()),
        line(
            "white space behind the version",
            "GET / HTTP/1.1 ",
            unparsable(),
        ),
        // RFC 9110 §2.5, §15.6.6: a minor version is taken for the highest known, a major one refused.
        line("HTTP/1.2", "GET / HTTP/1.2", GET).instead(unparsable()),
        line("HTTP/2.0", "GET / HTTP/2.0", Refused(505, "version")).instead(unparsable()),
        line(
            "CONNECT",
            "CONNECT shop:80 HTTP/1.1",
            Refused(405, "connect_refused"),
        ),
    ])
    .await;
}

#[tokio::test]
async fn fields() {
    let unparsable = || Refused(400, "unparsable");
    hold(vec![
        with("5", "without white space", "x:y", GET),
        with("5", "with much white space", "x: \t  y \t ", GET),
        with("5", "without a value", "x:", GET),
        with("5.5", "a byte above 0x7f", "x: \u{f6}", GET),
        with("5", "without a name", ": y", unparsable()),
        with("5", "without a colon", "x", unparsable()),
        with("5.1", "white space before the colon", "x : y", unparsable()),
        with("5.1", "a tab before the colon", "x\t: y", unparsable()),
        with("5.2", "folded", "x: y\r\n z", unparsable()),
        with("5.2", "folded with a tab", "x: y\r\n\tz", unparsable()),
        with("5.5", "CR in a value", "x: y\rz", unparsable()),
        with("5.5", "NUL in a value", "x: y\0z", unparsable()),
        with("5.1", "a separator in a name", "x(y: z", unparsable()),
        message(
            "3.2",
            "no Host",
            "GET / HTTP/1.1\r\n\r\n",
            Refused(400, "host_missing"),
        ),
        with(
            "3.2",
            "two Hosts",
            "host: shop",
            Refused(400, "host_repeated"),
        ),
        message(
            "3.2",
            "a Host that is none",
            "GET / HTTP/1.1\r\nhost: a/b\r\n\r\n",
            Refused(400, "host_invalid"),
        ),
        message(
            "3.2",
            "an empty Host",
            "GET / HTTP/1.1\r\nhost:\r\n\r\n",
            Refused(400, "host_invalid"),
        ),
        message(
            "3.2.2",
            "a Host that differs from the target",
            "GET http://other/ HTTP/1.1\r\nhost: shop\r\n\r\n",
            Refused(400, "host_mismatch"),
        ),
        with(
            "RFC 9110 10.1.1",
            "an unknown expectation",
            "expect: wonders",
            Refused(417, "expectation_unknown"),
        ),
    ])
    .await;
}

#[tokio::test]
async fn lengths() {
    let body = |lines, demanded| post("6.2", "a length", lines, "body", demanded);
    let passed = || Passed("POST / HTTP/1.1", "body");
    let length = || Refused(400, "content_length");
    let coding = || Refused(400, "transfer_encoding");
    hold(vec![
        body("content-length: 4", passed()),
        post(
            "6.3",
            "no length is no body",
            "x: y",
            "",
            Passed("POST / HTTP/1.1", ""),
        ),
        with("6.3", "a GET may have a body", "content-length: 0", GET),
        body("content-length: 04", passed()),
        // The same twice may be taken as one or refused (RFC 9112 §6.3).
        body("content-length: 4\r\ncontent-length: 4", passed()),
        body("content-length: 4, 4", length()),
        body("content-length: 4\r\ncontent-length: 5", length()),
        body("content-length: 4, 5", length()),
        body("content-length: +4", length()),
        body("content-length: -4", length()),
        body("content-length: 0x4", length()),
        body("content-length: 4 4", length()),
        body("content-length:", length()),
        body("content-length: 18446744073709551616", length()),
        body(
            "content-length: 4\r\ntransfer-encoding: chunked",
            Refused(400, "both_lengths"),
        ),
        body(
            "transfer-encoding: chunked\r\ncontent-length: 4",
            Refused(400, "both_lengths"),
        ),
        // RFC 9112 §6.1 would have 501 for a coding that is not understood.
        body(
            "transfer-encoding: gzip, chunked",
            Refused(501, "transfer_encoding"),
        )
        .instead(coding()),
        body("transfer-encoding: chunked, gzip", coding()),
        body(
            "transfer-encoding: chunked\r\ntransfer-encoding: chunked",
            coding(),
        ),
        body("transfer-encoding: chunked, chunked", coding()),
        body("transfer-encoding: xchunked", coding()),
        body("transfer-encoding:", coding()),
        message(
            "6.1",
            "chunks in HTTP/1.0",
            "POST / HTTP/1.0\r\nhost: shop\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            Refused(400, "unparsable"),
        ),
    ])
    .await;
}

#[tokio::test]
async fn chunks() {
    let chunked = |what, body| {
        post(
            "7.1",
            what,
            "transfer-encoding: chunked",
            body,
            Passed("POST / HTTP/1.1", "wiki"),
        )
    };
    hold(vec![
        chunked("one", "4\r\nwiki\r\n0\r\n\r\n"),
        chunked("several", "2\r\nwi\r\n1\r\nk\r\n1\r\ni\r\n0\r\n\r\n"),
        chunked("zeros in front", "0004\r\nwiki\r\n00\r\n\r\n"),
        chunked("an extension", "4;a=b;c=\"d e\"\r\nwiki\r\n0;x\r\n\r\n"),
        post(
            "7.1",
            "capital digits",
            "transfer-encoding: Chunked",
            "A\r\n0123456789\r\n0\r\n\r\n",
            Passed("POST / HTTP/1.1", "0123456789"),
        ),
        post(
            "7.1.2",
            "trailers",
            "transfer-encoding: chunked\r\ntrailer: x-sum\r\nte: trailers\r\nconnection: te",
            "4\r\nwiki\r\n0\r\nx-sum: 4\r\n\r\n",
            Passed("POST / HTTP/1.1", "wiki|x-sum: 4"),
        ),
    ])
    .await;
}

#[tokio::test]
async fn bad_chunks_are_refused_or_reset_and_never_passed_whole() {
    for (what, body) in [
        ("no digits", "\r\nwiki\r\n0\r\n\r\n"),
        ("no hexadecimal", "g\r\nwiki\r\n0\r\n\r\n"),
        ("a sign", "+4\r\nwiki\r\n0\r\n\r\n"),
        ("a prefix", "0x4\r\nwiki\r\n0\r\n\r\n"),
        ("above 2^64", "10000000000000004\r\nwiki\r\n0\r\n\r\n"),
        ("longer than it says", "4\r\nwikipedia\r\n0\r\n\r\n"),
        ("no line end behind it", "4\r\nwiki0\r\n\r\n"),
        ("LF alone behind a size", "4\nwiki\r\n0\r\n\r\n"),
        ("LF alone in an extension", "4;a\nb\r\nwiki\r\n0\r\n\r\n"),
        ("CR alone in an extension", "4;a\rb\r\nwiki\r\n0\r\n\r\n"),
        ("LF alone behind it", "4\r\nwiki\n0\r\n\r\n"),
        ("white space within the size", "4 4\r\nwiki\r\n0\r\n\r\n"),
        ("a trailer that is none", "4\r\nwiki\r\n0\r\nx y: z\r\n\r\n"),
    ] {
        let (upstream, mut heard) = listener(OK).await;
        let proxy = Proxy::to(upstream.address, Wire::Http1).await;
        let mut client = proxy.connect().await;
        let head = "POST / HTTP/1.1\r\nhost: shop\r\ntransfer-encoding: chunked\r\n\r\n";
        client.write_all(head.as_bytes()).await.unwrap();
        let _ = client.write_all(body.as_bytes()).await;
        let _ = client.write_all(PROBE).await;
        let (said, _) = read_all(&mut client).await;
        assert!(!said.contains("HTTP/1.1 200"), "{what}: {said}");
        assert!(
            heard.try_recv().is_err(),
            "{what}: a whole request upstream"
        );
    }
}

#[tokio::test]
async fn connections_go_on_or_end_as_their_messages_say() {
    let older = || Passed("GET / HTTP/1.0", "");
    let old = |lines: &str| format!("GET / HTTP/1.0\r\n{lines}\r\n");
    hold(vec![
        with("9.3", "HTTP/1.1 goes on", "x: y", GET),
        with(
            "9.6",
            "until it is said",
            "connection: close",
            Last("GET / HTTP/1.1", ""),
        ),
        with(
            "9.6",
            "in any case and place",
            "connection: te, CLOSE",
            Last("GET / HTTP/1.1", ""),
        ),
        message(
            "9.3",
            "HTTP/1.0 does not",
            old(""),
            Last("GET / HTTP/1.0", ""),
        ),
        message(
            "9.3",
            "unless it is said",
            old("connection: keep-alive\r\n"),
            older(),
        ),
        // An upgrade that HTTP/1.0 cannot ask for (RFC 9110 §7.8).
        message(
            "RFC 9110 7.8",
            "HTTP/1.0 upgrades nothing",
            old("connection: keep-alive, upgrade\r\nupgrade: websocket\r\n"),
            older(),
        ),
    ])
    .await;
}

#[tokio::test]
async fn fields_of_a_connection_end_with_it() {
    let (upstream, mut heard) = listener(OK).await;
    let proxy = Proxy::to(upstream.address, Wire::Http1).await;
    let mut client = proxy.connect().await;
    let request = "GET / HTTP/1.1\r\nhost: shop\r\nconnection: x-mine, keep-alive\r\nx-mine: 1\r\n\
                   keep-alive: timeout=5\r\nproxy-connection: keep-alive\r\nupgrade: websocket\r\n\
                   te: gzip\r\nx-other: 2\r\n\r\n";
    client.write_all(request.as_bytes()).await.unwrap();
    let heard = timeout(FAR, heard.recv()).await.unwrap().unwrap();
    for gone in ["x-mine", "keep-alive", "proxy-connection", "upgrade", "te:"] {
        assert!(!heard.head.contains(gone), "{gone}: {}", heard.head);
    }
    assert!(heard.head.contains("x-other: 2\r\n"), "{}", heard.head);
}

#[tokio::test]
async fn an_upgrade_is_passed_on_for_http_1_1_alone() {
    for (version, lines, passed) in [
        ("1.1", "connection: upgrade", true),
        ("1.1", "connection: upgrade, te\r\nte: trailers", true),
        ("1.1", "x: y", false),
        ("1.0", "connection: upgrade, keep-alive", false),
    ] {
        let (upstream, mut heard) = listener(OK).await;
        let proxy = Proxy::to(upstream.address, Wire::Http1).await;
        let mut client = proxy.connect().await;
        let request =
            format!("GET / HTTP/{version}\r\nhost: shop\r\nupgrade: websocket\r\n{lines}\r\n\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
        let head = timeout(FAR, heard.recv()).await.unwrap().unwrap().head;
        assert_eq!(head.contains("upgrade: websocket"), passed, "{head}");
        assert_eq!(head.contains("connection: upgrade"), passed, "{head}");
        // RFC 9110 §10.1.4.
        assert_eq!(
            head.contains("te: trailers"),
            head.contains("upgrade, te"),
            "{head}"
        );
    }
}

#[tokio::test]
async fn a_client_of_http_1_0_is_never_told_to_continue() {
    let (upstream, _heard) = listener(OK).await;
    let proxy = Proxy::to(upstream.address, Wire::Http1).await;
    let mut client = proxy.connect().await;
    let request =
        "POST / HTTP/1.0\r\nhost: shop\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\nbody";
    client.write_all(request.as_bytes()).await.unwrap();
    let (said, ended) = read_all(&mut client).await;
    ended.unwrap();
    assert!(said.starts_with("HTTP/1.0 200"), "{said}");
}
