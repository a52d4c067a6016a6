//! What a connection speaks, from hints and from its first bytes.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use crate::tunnel::TunnelIo;

/// The most of a connection that is looked at, in bytes: a ClientHello with everything that clients
/// put before its server name fits.
pub const SNIFF_BYTES: usize = 4096;

/// The longest method that is taken for one: `UPDATEREDIRECTREF` of RFC 4437 has 17 letters.
const METHOD_BYTES: usize = 20;

const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What a connection speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.0 or 1.1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// TLS, and the name that the client asks for.
    Tls {
        /// `server_name` (RFC 6066 §3), in lower case; only a name that is one.
        sni: Option<Box<str>>,
    },
    /// Anything else.
    Opaque,
}

/// What the first bytes say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sniff {
    /// This.
    Decided(Protocol),
    /// Not enough yet.
    More,
}

/// What configuration says about a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Hint {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// gRPC: HTTP/2.
    Grpc,
    /// HTTP/1.1 or HTTP/2: the first bytes tell.
    Http,
    /// TLS: the first bytes name the server.
    Tls,
    /// Never looked at, and never waited for: a server may speak first.
    Opaque,
    /// Nothing: the first bytes tell, if they come within a bound.
    #[default]
    None,
}

/// What a port says of itself: `opaque` (annotation `undermesh.io/opaque-ports`) wins over
/// `appProtocol` (KEP-3726, Istio's names), and that over the port's name, whose part before the
/// first `-` counts as in Istio.
#[must_use]
pub fn hint(app_protocol: Option<&str>, port_name: &str, opaque: bool) -> Hint {
    if opaque {
        return Hint::Opaque;
    }
    if let Some(protocol) = app_protocol {
        let protocol = protocol.strip_prefix("kubernetes.io/").unwrap_or(protocol);
        let hint = named(protocol);
        // A protocol that nobody here knows is none that HTTP rules apply to, but it may be
        // anything: the first bytes tell.
        if hint != Hint::None {
            return hint;
        }
    }
    named(port_name.split('-').next().unwrap_or_default())
}

fn named(protocol: &str) -> Hint {
    let is = |names: &[&str]| names.iter().any(|name| protocol.eq_ignore_ascii_case(name));
    if is(&["http", "http1", "ws"]) {
        // A server of HTTP/1.1 may take HTTP/2 as well: its clients decide.
        Hint::Http
    } else if is(&["http2", "h2c"]) {
        Hint::Http2
    } else if is(&["grpc"]) {
        Hint::Grpc
    } else if is(&["https", "tls", "wss"]) {
        Hint::Tls
    } else if is(&[
        "tcp",
        "mysql",
        "redis",
        "mongo",
        "postgres",
        "postgresql",
        "smtp",
        "amqp",
    ]) {
        Hint::Opaque
    } else {
        Hint::None
    }
}

impl Hint {
    /// The answer, where no byte has to be seen for it. A hint of HTTP is checked against the first
    /// bytes all the same: what is no HTTP must not be answered by a HTTP server.
    fn decided(self) -> Option<Protocol> {
        (self == Self::Opaque).then_some(Protocol::Opaque)
    }

    /// Whether a silent client is waited for, as long as it likes: in these protocols the client
    /// speaks first.
    fn waits(self) -> bool {
        !matches!(self, Self::None | Self::Opaque)
    }
}

/// Looks at the first bytes of a socket, and consumes none (MSG_PEEK).
///
/// Without a hint the client has `limit` to say something that can be told apart; then it is
/// [`Protocol::Opaque`]. So a protocol in which the server speaks first is delayed by `limit` at
/// most, and by nothing with a hint.
pub async fn detect(stream: &TcpStream, hint: Hint, limit: Duration) -> io::Result<Protocol> {
    if let Some(protocol) = hint.decided() {
        return Ok(protocol);
    }
    let looking = peek(stream);
    bounded(looking, hint, limit).await
}

/// [`detect`], for a stream of a tunnel.
pub async fn detect_tunnel(
    stream: &mut TunnelIo,
    hint: Hint,
    limit: Duration,
) -> io::Result<Protocol> {
    if let Some(protocol) = hint.decided() {
        return Ok(protocol);
    }
    let looking = async {
        let mut seen = stream.peek().await?;
        loop {
            if let Sniff::Decided(protocol) = sniff(seen) {
                return Ok(protocol);
            }
            if !stream.peek_more().await? {
                return Ok(Protocol::Opaque);
            }
            seen = stream.peek().await?;
        }
    };
    bounded(looking, hint, limit).await
}

async fn bounded(
    looking: impl Future<Output = io::Result<Protocol>>,
    hint: Hint,
    limit: Duration,
) -> io::Result<Protocol> {
    if hint.waits() {
        return looking.await;
    }
    match timeout_at(Instant::now() + limit, looking).await {
        Ok(found) => found,
        Err(_) => Ok(Protocol::Opaque),
    }
}

async fn peek(stream: &TcpStream) -> io::Result<Protocol> {
    let mut seen = 0;
    loop {
        let ready = stream.ready(Interest::READABLE).await?;
        let look = || look(stream, seen, ready.is_read_closed());
        match stream.try_io(Interest::READABLE, look) {
            Ok((_, Sniff::Decided(protocol))) => return Ok(protocol),
            // The client has ended its side.
            Ok((length, Sniff::More)) if length == seen || length == 0 => {
                return Ok(Protocol::Opaque);
            }
            Ok((length, Sniff::More)) => seen = length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// How much lies there, and what it says. What was seen before still lies there: only more of it, or
/// its end, is news.
fn look(stream: &TcpStream, seen: usize, closed: bool) -> io::Result<(usize, Sniff)> {
    let mut buffer = [0_u8; SNIFF_BYTES];
    let length = recv(stream.as_raw_fd(), &mut buffer, MsgFlags::MSG_PEEK)?;
    if length > seen || length == 0 || closed {
        Ok((length, sniff(&buffer[..length])))
    } else {
        Err(io::ErrorKind::WouldBlock.into())
    }
}

/// Tells by the first bytes of a connection. Pure; decides after [`SNIFF_BYTES`] at the latest.
#[must_use]
pub fn sniff(bytes: &[u8]) -> Sniff {
    let opaque = Sniff::Decided(Protocol::Opaque);
    match bytes.first() {
        None => Sniff::More,
        Some(0x16) => match client_hello(bytes) {
            Hello::Name(sni) => Sniff::Decided(Protocol::Tls { sni }),
            Hello::More if bytes.len() < SNIFF_BYTES => Sniff::More,
            // TLS for sure, but its name is too far away to be waited for.
            Hello::More => Sniff::Decided(Protocol::Tls { sni: None }),
            Hello::No => opaque,
        },
        Some(_) if bytes.starts_with(H2_PREFACE) => Sniff::Decided(Protocol::Http2),
        Some(_) if H2_PREFACE.starts_with(bytes) => Sniff::More,
        Some(_) => http1(bytes),
    }
}

/// A request line: a method, a target, and a version of HTTP/1. All of it is asked for, so that
/// text protocols that also begin with a word are not taken for HTTP.
fn http1(bytes: &[u8]) -> Sniff {
    let opaque = Sniff::Decided(Protocol::Opaque);
    // Clients may send empty lines before a request (RFC 9112 §2.2).
    let start = bytes
        .iter()
        .position(|byte| !matches!(byte, b'\r' | b'\n'))
        .unwrap_or(bytes.len());
    if start > 4 {
        return opaque;
    }
    let line = &bytes[start..];
    let method = line.iter().position(|byte| *byte == b' ');
    let letters = &line[..method.unwrap_or(line.len())];
    let is_method = letters.len() <= METHOD_BYTES
        && letters
            .iter()
            .all(|byte| byte.is_ascii_uppercase() || matches!(byte, b'-' | b'_'));
    if !is_method || method == Some(0) {
        return opaque;
    }
    let Some(method) = method else {
        return Sniff::More;
    };
    let rest = &line[method + 1..];
    // Origin, absolute, authority (CONNECT) or asterisk form: none begins otherwise.
    match rest.first() {
        None => return Sniff::More,
        Some(b'/' | b'*' | b'[') => {}
        Some(byte) if byte.is_ascii_alphanumeric() => {}
        Some(_) => return opaque,
    }
    let Some(end) = rest.iter().position(|byte| *byte == b'\n') else {
        if bytes.len() < SNIFF_BYTES {
            return Sniff::More;
        }
        // A target that long only HTTP has.
        return Sniff::Decided(Protocol::Http1);
    };
    let version = rest[..end].trim_ascii_end();
    if version.ends_with(b" HTTP/1.1") || version.ends_with(b" HTTP/1.0") {
        Sniff::Decided(Protocol::Http1)
    } else {
        opaque
    }
}

enum Hello {
    Name(Option<Box<str>>),
    More,
    No,
}

/// The server name of a ClientHello (RFC 8446 §4.1.2), also if it comes in several records.
fn client_hello(bytes: &[u8]) -> Hello {
    let mut message = Vec::new();
    let mut rest = bytes;
    let complete = loop {
        // ContentType handshake, a version 3.x, a length of at most 2^14.
        let [0x16, 0x03, _, high, low, records @ ..] = rest else {
            let fits = match rest {
                [] | [0x16] => true,
                [0x16, 0x03, ..] => rest.len() < 5,
                _ => false,
            };
            if !fits {
                return Hello::No;
            }
            break false;
        };
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        if length == 0 || length > 1 << 14 {
            return Hello::No;
        }
        let part = &records[..length.min(records.len())];
        message.extend_from_slice(part);
        rest = &records[part.len()..];
        if message.first().is_some_and(|kind| *kind != 1) {
            return Hello::No;
        }
        if let [_, a, b, c, ..] = message[..] {
            let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
            if message.len() >= length + 4 {
                message.truncate(length + 4);
                break true;
            }
        }
        if part.len() < length {
            break false;
        }
    };
    if !complete {
        return Hello::More;
    }
    match Reader(&message[4..]).server_name() {
        Some(name) => Hello::Name(name),
        None => Hello::No,
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    /// A field that begins with its length in so many bytes.
    fn vector(&mut self, length_bytes: usize) -> Option<&'a [u8]> {
        let length = self.take(length_bytes)?;
        let length = length
            .iter()
            .fold(0_usize, |length, byte| length << 8 | usize::from(*byte));
        self.take(length)
    }

    /// `None` if this is no ClientHello.
    fn server_name(mut self) -> Option<Option<Box<str>>> {
        const VERSION_AND_RANDOM: usize = 2 + 32;
        self.take(VERSION_AND_RANDOM)?;
        self.vector(1)?;
        self.vector(2)?;
        self.vector(1)?;
        if self.0.is_empty() {
            return Some(None);
        }
        let mut extensions = Reader(self.vector(2)?);
        while !extensions.0.is_empty() {
            let kind = extensions.take(2)?;
            let value = extensions.vector(2)?;
            if kind == [0, 0] {
                let mut names = Reader(Reader(value).vector(2)?);
                let kind = names.take(1)?;
                let name = names.vector(2)?;
                return Some((kind == [0]).then(|| host_name(name)).flatten());
            }
        }
        Some(None)
    }
}

/// A name fit to be compared and to be written into a log.
fn host_name(name: &[u8]) -> Option<Box<str>> {
    let fits = (1..=253).contains(&name.len())
        && name
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'));
    let name = std::str::from_utf8(name).ok().filter(|_| fits)?;
    Some(name.to_ascii_lowercase().into())
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;

    fn decided(bytes: &[u8]) -> Option<Protocol> {
        match sniff(bytes) {
            Sniff::Decided(protocol) => Some(protocol),
            Sniff::More => None,
        }
    }

    /// The verdict on the first of these bytes that allow one.
    fn first(bytes: &[u8]) -> Option<Protocol> {
        (0..=bytes.len()).find_map(|length| decided(&bytes[..length]))
    }

    #[test]
    fn http_is_known_by_its_first_line_however_it_is_cut() {
        let lines = [
            "GET / HTTP/1.1\r\n",
            "POST /a?b=c HTTP/1.0\r\n",
            "OPTIONS * HTTP/1.1\n",
            "\r\nGET http://a/ HTTP/1.1\r\n",
            "CONNECT [::1]:80 HTTP/1.1\r\n",
            "VERSION-CONTROL / HTTP/1.1\r\n",
            "PRI / HTTP/1.1\r\n",
        ];
        for line in lines {
            assert_eq!(first(line.as_bytes()), Some(Protocol::Http1), "{line}");
        }
        assert_eq!(first(H2_PREFACE), Some(Protocol::Http2));
        assert_eq!(decided(&H2_PREFACE[..23]), None);
    }

    #[test]
    fn what_only_looks_like_http_is_opaque() {
        let others: &[&[u8]] = &[
            b"*1\r\n$4\r\nPING\r\n",
            b"PING\r\n",
            b"EHLO there\r\n",
            b"SSH-2.0-x\r\n",
            b"\0\0\0\x08",
            b"GET key\r\n",
            b"set a 0 0 1\r\n",
            b"GET / HTTP/2.0\r\n",
            b"GET / HTTP/1.2\r\n",
            b" GET /",
            b"USER x\r\n",
            b"AVERYLONGMETHODTHATISNONE ",
            b"\r\n\r\n\r\n",
        ];
        for other in others {
            assert_eq!(
                first(other),
                Some(Protocol::Opaque),
                "{:?}",
                other.escape_ascii()
            );
        }
    }

    #[test]
    fn a_target_that_is_longer_than_is_looked_at_is_http() {
        let line = format!("GET /{}", "a".repeat(SNIFF_BYTES));
        assert_eq!(
            decided(&line.as_bytes()[..SNIFF_BYTES]),
            Some(Protocol::Http1)
        );
    }

    /// A ClientHello with this extension list.
    fn hello(name: Option<&[u8]>) -> Vec<u8> {
        let mut extensions = vec![0, 43, 0, 3, 2, 3, 4];
        if let Some(name) = name {
            let length = name.len() as u16;
            extensions.extend([0, 0]);
            extensions.extend((length + 5).to_be_bytes());
            extensions.extend((length + 3).to_be_bytes());
            extensions.push(0);
            extensions.extend(length.to_be_bytes());
            extensions.extend(name);
        }
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([0, 0, 2, 0x13, 1, 1, 0]);
        body.extend((extensions.len() as u16).to_be_bytes());
        body.extend(extensions);
        let mut message = vec![1];
        message.extend(&(body.len() as u32).to_be_bytes()[1..]);
        message.extend(body);
        message
    }

    fn record(part: &[u8]) -> Vec<u8> {
        let mut record = vec![0x16, 3, 1];
        record.extend((part.len() as u16).to_be_bytes());
        record.extend(part);
        record
    }

    fn tls(name: &str) -> Option<Protocol> {
        Some(Protocol::Tls {
            sni: Some(name.into()),
        })
    }

    #[test]
    fn the_server_name_is_found_in_one_record_and_in_many() {
        let hello = hello(Some(b"Shop.Example"));
        assert_eq!(first(&record(&hello)), tls("shop.example"));
        let parts: Vec<u8> = hello.chunks(5).flat_map(record).collect();
        assert_eq!(first(&parts), tls("shop.example"));
    }

    #[test]
    fn a_name_that_is_none_is_not_passed_on() {
        for name in [
            None,
            Some(&b"a\nb"[..]),
            Some(b"a b"),
            Some(b""),
            Some(b"\xff"),
        ] {
            let found = first(&record(&hello(name)));
            assert_eq!(found, Some(Protocol::Tls { sni: None }), "{name:?}");
        }
    }

    #[test]
    fn broken_tls_is_opaque_and_an_endless_one_is_not_waited_for() {
        for bytes in [
            &[0x16, 3, 1, 0, 0][..],
            &[0x16, 2, 0, 0, 5],
            &[0x16, 3, 1, 0, 4, 2, 0, 0, 0],
        ] {
            assert_eq!(first(bytes), Some(Protocol::Opaque), "{bytes:?}");
        }
        let mut short = hello(Some(b"shop"));
        short[3] -= 4;
        assert_eq!(first(&record(&short)), Some(Protocol::Opaque));
        let mut endless = vec![1, 0xff, 0xff, 0xff];
        endless.resize(16_000, 0);
        let endless = record(&endless);
        assert_eq!(decided(&endless[..SNIFF_BYTES - 1]), None);
        assert_eq!(
            decided(&endless[..SNIFF_BYTES]),
            Some(Protocol::Tls { sni: None })
        );
    }

    proptest::proptest! {
        #[test]
        fn a_verdict_comes_at_the_bound_at_the_latest(
            start in proptest::sample::select(vec![&b"GET "[..], b"PRI ", &[0x16, 3, 1, 0x40, 0], b""]),
            rest in proptest::collection::vec(proptest::num::u8::ANY, SNIFF_BYTES),
        ) {
            let bytes = [start, &rest[..]].concat();
            proptest::prop_assert!(decided(&bytes[..SNIFF_BYTES]).is_some());
        }
    }

    #[test]
    fn hints_come_from_the_annotation_the_protocol_and_the_name_in_this_order() {
        let cases = [
            (Some("http"), "tcp-db", true, Hint::Opaque),
            (Some("kubernetes.io/h2c"), "", false, Hint::Http2),
            (Some("kubernetes.io/ws"), "", false, Hint::Http),
            (Some("kubernetes.io/wss"), "", false, Hint::Tls),
            (Some("HTTP"), "tcp", false, Hint::Http),
            (Some("grpc"), "http", false, Hint::Grpc),
            (Some("example.com/own"), "grpc-api", false, Hint::Grpc),
            (None, "http-web", false, Hint::Http),
            (None, "http2", false, Hint::Http2),
            (None, "https", false, Hint::Tls),
            (None, "tcp-x", false, Hint::Opaque),
            (None, "mysql", false, Hint::Opaque),
            (None, "httpx", false, Hint::None),
            (None, "", false, Hint::None),
        ];
        for (protocol, name, opaque, expected) in cases {
            assert_eq!(
                hint(protocol, name, opaque),
                expected,
                "{protocol:?} {name}"
            );
        }
    }

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        (client.unwrap(), accepted.unwrap().0)
    }

    const LONG: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn one_byte_at_a_time_is_waited_for_and_nothing_is_consumed() {
        let (mut client, server) = pair().await;
        let line = b"GET / HTTP/1.1\r\n";
        let writing = async {
            for byte in line {
                client.write_all(&[*byte]).await.unwrap();
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        let (found, ()) = tokio::join!(detect(&server, Hint::None, LONG), writing);
        assert_eq!(found.unwrap(), Protocol::Http1);
        let mut seen = [0; 16];
        server.peek(&mut seen).await.unwrap();
        assert_eq!(&seen, line);
    }

    #[tokio::test]
    async fn a_silent_client_is_waited_for_no_longer_than_the_bound_unless_hinted() {
        let (_client, server) = pair().await;
        let limit = Duration::from_millis(30);
        let before = Instant::now();
        let found = detect(&server, Hint::None, limit).await.unwrap();
        assert_eq!(found, Protocol::Opaque);
        assert!(before.elapsed() >= limit);
        let found = detect(&server, Hint::Opaque, LONG).await.unwrap();
        assert_eq!(found, Protocol::Opaque);
        let hinted = detect(&server, Hint::Http, limit);
        let waited = tokio::time::timeout(limit * 4, hinted).await;
        assert!(waited.is_err(), "{waited:?}");
    }

    #[tokio::test]
    async fn a_client_that_ends_before_it_can_be_told_is_opaque() {
        for said in [&b""[..], b"GET"] {
            let (mut client, server) = pair().await;
            client.write_all(said).await.unwrap();
            client.shutdown().await.unwrap();
            let detecting = detect(&server, Hint::Http, LONG);
            let found = tokio::time::timeout(LONG, detecting).await.unwrap();
            assert_eq!(found.unwrap(), Protocol::Opaque, "{said:?}");
        }
    }
}
