//! The headers of a CONNECT, written and strictly read.
//!
//! What a peer says here is hearsay for logs and traces. Nothing of it decides who the peer is,
//! and what is malformed, repeated or too long counts as not said.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use http::header::FORWARDED;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri};

/// Longest `baggage` taken or sent, in bytes (W3C asks for at least 8,192 to be passed on; we pass
/// nothing on).
pub(super) const MAX_BAGGAGE: usize = 4096;

/// Longest `forwarded` taken: an IPv6 address, a port, a DNS name, and their frame.
const MAX_FORWARDED: usize = 512;

/// Longest DNS name.
const MAX_HOST: usize = 253;

const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// What a client asks a tunnel's server for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectRequest {
    /// The pod's address and the app's port.
    pub authority: SocketAddr,
    /// The client as the source agent saw it, and the service that it meant.
    pub forwarded: Option<(SocketAddr, Option<String>)>,
    /// W3C baggage about the source. Left out if it is too long or not printable ASCII.
    pub baggage: Option<String>,
    /// W3C trace context. Left out if malformed.
    pub traceparent: Option<String>,
    /// How long the answer may take, which includes the peer's dial of its app; never more than
    /// [`Limits::answer`](super::Limits::answer). None: that.
    pub answer_within: Option<Duration>,
}

impl ConnectRequest {
    /// A request with no optional header, and no limit of its own.
    #[must_use]
    pub fn new(authority: SocketAddr) -> Self {
        Self {
            authority,
            forwarded: None,
            baggage: None,
            traceparent: None,
            answer_within: None,
        }
    }

    pub(super) fn to_http(&self) -> Result<Request<()>, http::Error> {
        let authority = Uri::builder()
            .authority(self.authority.to_string())
            .build()?;
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.uri_mut() = authority;
        *request.version_mut() = http::Version::HTTP_2;
        let headers = request.headers_mut();
        if let Some((client, host)) = &self.forwarded {
            let forwarded = Forwarded {
                client: *client,
                host: host.clone(),
            };
            if let Ok(mut value) = HeaderValue::try_from(forwarded.to_text()) {
                // No two are alike: in HPACK's table (RFC 7541 section 6.2.3 keeps it out) it would only
                // drive out what is.
                value.set_sensitive(true);
                headers.insert(FORWARDED, value);
            }
        }
        if let Some(value) = self.baggage.as_deref().and_then(baggage_value) {
            headers.insert(BAGGAGE, value);
        }
        if let Some(text) = self.traceparent.as_deref().filter(|t| is_traceparent(t))
            && let Ok(value) = HeaderValue::from_str(text)
        {
            headers.insert(TRACEPARENT, value);
        }
        Ok(request)
    }
}

/// `forwarded: for="ip:port";host=service` (RFC 7239).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forwarded {
    /// The client's address, as its agent claims it.
    pub client: SocketAddr,
    /// The service that the client connected to.
    pub host: Option<String>,
}

impl Forwarded {
    fn to_text(&self) -> String {
        let client = self.client;
        match self.host.as_deref().filter(|host| is_host(host)) {
            Some(host) => format!("for=\"{client}\";host={host}"),
            None => format!("for=\"{client}\""),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        if text.len() > MAX_FORWARDED {
            return None;
        }
        let mut client = None;
        let mut host = None;
        for pair in text.split(';') {
            let (name, value) = pair.split_once('=')?;
            let value = match value.strip_prefix('"') {
                Some(rest) => rest.strip_suffix('"')?,
                None => value,
            };
            let slot_was_empty = match name.to_ascii_lowercase().as_str() {
                "for" => client.replace(parse_address(value)?).is_none(),
                "host" if is_host(value) => host.replace(value.to_owned()).is_none(),
                _ => false,
            };
            if !slot_was_empty {
                return None;
            }
        }
        Some(Self {
            client: client?,
            host,
        })
    }
}

/// The optional headers that a server found well-formed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Hearsay {
    pub forwarded: Option<Forwarded>,
    pub baggage: Option<String>,
    pub traceparent: Option<String>,
}

impl Hearsay {
    pub(super) fn read(headers: &HeaderMap) -> Self {
        Self {
            forwarded: single(headers, &FORWARDED).and_then(Forwarded::parse),
            baggage: baggage(headers),
            traceparent: single(headers, &TRACEPARENT)
                .filter(|text| is_traceparent(text))
                .map(str::to_owned),
        }
    }
}

/// The `baggage` of a request or of an answer.
pub(super) fn baggage(headers: &HeaderMap) -> Option<String> {
    single(headers, &BAGGAGE)
        .filter(|text| is_baggage(text))
        .map(str::to_owned)
}

/// Sets the `baggage` of an answer, unless it may not be sent.
pub(super) fn set_baggage(headers: &mut HeaderMap, text: Option<&str>) {
    if let Some(value) = text.and_then(baggage_value) {
        headers.insert(BAGGAGE, value);
    }
}

/// Address and port, and nothing else: no name, no user, no zone, no port 0, no IPv4 in IPv6.
pub(super) fn parse_address(text: &str) -> Option<SocketAddr> {
    let address: SocketAddr = text.parse().ok()?;
    let (_, port) = text.rsplit_once(':')?;
    let plain_ip = match address {
        SocketAddr::V4(_) => true,
        SocketAddr::V6(v6) => {
            v6.scope_id() == 0 && !text.contains('%') && v6.ip().to_ipv4_mapped().is_none()
        }
    };
    let canonical_port = port != "0" && address.port().to_string() == port;
    let specified = match address.ip() {
        IpAddr::V4(ip) => !ip.is_unspecified(),
        IpAddr::V6(ip) => !ip.is_unspecified(),
    };
    (plain_ip && canonical_port && specified).then_some(address)
}

fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    let first = values.next()?;
    if values.next().is_some() {
        return None;
    }
    first.to_str().ok()
}

fn baggage_value(text: &str) -> Option<HeaderValue> {
    is_baggage(text)
        .then(|| HeaderValue::from_str(text).ok())
        .flatten()
}

fn is_baggage(text: &str) -> bool {
    let printable = |c: u8| (0x20..0x7f).contains(&c);
    !text.is_empty() && text.len() <= MAX_BAGGAGE && text.bytes().all(printable)
}

fn is_host(text: &str) -> bool {
    let valid = |c: u8| c.is_ascii_alphanumeric() || b"-._".contains(&c);
    !text.is_empty() && text.len() <= MAX_HOST && text.bytes().all(valid)
}

/// Version 00 of W3C trace context, to the letter.
fn is_traceparent(text: &str) -> bool {
    let hex = |part: &str, length: usize| {
        part.len() == length
            && part
                .bytes()
                .all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c))
    };
    let set = |part: &str| part.bytes().any(|c| c != b'0');
    let parts: Vec<&str> = text.splitn(5, '-').collect();
    let ["00", trace, span, flags] = parts[..] else {
        return false;
    };
    hex(trace, 32) && set(trace) && hex(span, 16) && set(span) && hex(flags, 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn what_is_written_is_read_back() {
        for client in ["10.0.0.7:4711", "[2001:db8::7]:4711"] {
            let request = ConnectRequest {
                authority: "10.0.0.1:8080".parse().unwrap(),
                forwarded: Some((client.parse().unwrap(), Some("web.shop.svc".into()))),
                baggage: Some("k8s.namespace.name=shop,service.name=web".into()),
                traceparent: Some(TRACE.into()),
                answer_within: None,
            };
            let http = request.to_http().unwrap();
            assert_eq!(http.uri().to_string(), "10.0.0.1:8080");
            assert!(http.headers()[FORWARDED].is_sensitive(), "never indexed");
            let read = Hearsay::read(http.headers());
            let forwarded = read.forwarded.unwrap();
            assert_eq!(Some((forwarded.client, forwarded.host)), request.forwarded);
            assert_eq!(read.baggage, request.baggage);
            assert_eq!(read.traceparent, request.traceparent);
        }
    }

    #[test]
    fn a_malformed_forwarded_counts_as_not_said() {
        for text in [
            "",
            "for",
            "for=unknown",
            "for=\"10.0.0.1\"",
            "for=\"10.0.0.1:80",
            "for=\"10.0.0.1:80\";for=\"10.0.0.2:80\"",
            "for=\"10.0.0.1:80\",for=\"10.0.0.2:80\"",
            "for=\"10.0.0.1:80\";by=x",
            "for=\"10.0.0.1:80\";host=a b",
            "host=web",
        ] {
            assert_eq!(Forwarded::parse(text), None, "{text}");
        }
    }

    #[test]
    fn repeated_or_oversized_headers_count_as_not_said() {
        let mut headers = HeaderMap::new();
        headers.append(BAGGAGE, HeaderValue::from_static("a=1"));
        assert_eq!(baggage(&headers).as_deref(), Some("a=1"));
        headers.append(BAGGAGE, HeaderValue::from_static("a=2"));
        assert_eq!(baggage(&headers), None);
        headers.insert(
            BAGGAGE,
            HeaderValue::try_from("a".repeat(MAX_BAGGAGE + 1)).unwrap(),
        );
        assert_eq!(baggage(&headers), None);
        headers.insert(BAGGAGE, HeaderValue::from_bytes(b"a=\xff").unwrap());
        assert_eq!(baggage(&headers), None);
    }

    #[test]
    fn an_authority_is_an_address_and_a_port_and_nothing_else() {
        for text in ["10.0.0.1:80", "[2001:db8::1]:65535"] {
            assert_eq!(parse_address(text), text.parse().ok());
        }
        for text in [
            "10.0.0.1",
            "10.0.0.1:0",
            "10.0.0.1:080",
            "10.0.0.1:+80",
            "10.0.0.1:65536",
            "010.0.0.1:80",
            "web.shop:80",
            "user@10.0.0.1:80",
            "[fe80::1%1]:80",
            "[::ffff:10.0.0.1]:80",
            "2001:db8::1:80",
            "0.0.0.0:80",
            "[::]:80",
        ] {
            assert_eq!(parse_address(text), None, "{text}");
        }
    }

    #[test]
    fn a_traceparent_is_taken_only_to_the_letter() {
        assert!(is_traceparent(TRACE));
        for text in [
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
            "",
        ] {
            assert!(!is_traceparent(text), "{text}");
        }
    }
}
