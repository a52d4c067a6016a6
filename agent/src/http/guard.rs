//! What a request's head must be before anything decides by it.

use http::header::{CONTENT_LENGTH, EXPECT, HOST, TRANSFER_ENCODING};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, Version, request};

use super::framing::Violation;

/// The longest `Host` or `:authority` that is taken, in bytes: a DNS name and a port. Longer ones
/// have made others take their error path past the policy.
const AUTHORITY_BYTES: usize = 255 + ":65535".len();

/// Why a request was refused before it was looked at any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BadRequest {
    /// No HTTP: a bad line, obs-fold, whitespace before a colon, CR, LF or NUL in a value, …
    Unparsable,
    /// More header bytes or fields than are taken.
    HeadTooLarge,
    /// A target longer than 64 KiB.
    UriTooLong,
    /// A target in a form that is not for its method, or with a fragment.
    TargetInvalid,
    /// A value of HTTP/2 with white space at its beginning or end.
    ValuePadded,
    /// `Transfer-Encoding` and `Content-Length`.
    BothLengths,
    /// A `Content-Length` that is no number, or two that differ.
    ContentLength,
    /// A `Transfer-Encoding` that is not `chunked` alone.
    TransferEncoding,
    /// A chunk whose size is no number, or too long.
    Chunk,
    /// No `Host`, or no `:authority`.
    HostMissing,
    /// More than one `Host`.
    HostRepeated,
    /// A `Host` or `:authority` that is no host.
    HostInvalid,
    /// `Host` and the target's authority differ.
    HostMismatch,
    /// CONNECT: no proxy for others stands here.
    Connect,
    /// An `Expect` other than `100-continue`.
    Expect,
}

impl BadRequest {
    /// All of them, in the order of their declaration.
    pub const ALL: [Self; 15] = [
        Self::Unparsable,
        Self::HeadTooLarge,
        Self::UriTooLong,
        Self::TargetInvalid,
        Self::ValuePadded,
        Self::BothLengths,
        Self::ContentLength,
        Self::TransferEncoding,
        Self::Chunk,
        Self::HostMissing,
        Self::HostRepeated,
        Self::HostInvalid,
        Self::HostMismatch,
        Self::Connect,
        Self::Expect,
    ];

    /// The word for metrics, logs and `x-undermesh-reason`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unparsable => "unparsable",
            Self::HeadTooLarge => "head_too_large",
            Self::UriTooLong => "uri_too_long",
            Self::TargetInvalid => "target_invalid",
            Self::ValuePadded => "value_padded",
            Self::BothLengths => "both_lengths",
            Self::ContentLength => "content_length",
            Self::TransferEncoding => "transfer_encoding",
            Self::Chunk => "bad_chunk",
            Self::HostMissing => "host_missing",
            Self::HostRepeated => "host_repeated",
            Self::HostInvalid => "host_invalid",
            Self::HostMismatch => "host_mismatch",
            Self::Connect => "connect_refused",
            Self::Expect => "expectation_unknown",
        }
    }

    /// The answer.
    #[must_use]
    pub fn status(self) -> StatusCode {
        match self {
            Self::HeadTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::UriTooLong => StatusCode::URI_TOO_LONG,
            Self::Connect => StatusCode::METHOD_NOT_ALLOWED,
            Self::Expect => StatusCode::EXPECTATION_FAILED,
            _ => StatusCode::BAD_REQUEST,
        }
    }
}

impl BadRequest {
    /// What hyper found, which answers with this status.
    pub(super) fn of_status(status: StatusCode) -> Self {
        match status {
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => Self::HeadTooLarge,
            StatusCode::URI_TOO_LONG => Self::UriTooLong,
            _ => Self::Unparsable,
        }
    }
}

impl From<Violation> for BadRequest {
    fn from(violation: Violation) -> Self {
        match violation {
            Violation::Target => Self::TargetInvalid,
            Violation::BothLengths => Self::BothLengths,
            Violation::ContentLength => Self::ContentLength,
            Violation::TransferEncoding => Self::TransferEncoding,
            Violation::Chunk => Self::Chunk,
        }
    }
}

/// Checks a head that was parsed, and brings it into one form: HTTP/1 has an origin-form target and
/// its authority in `Host`, HTTP/2 has scheme and authority in its URI and no `Host`.
pub(super) fn check(head: &mut request::Parts) -> Result<(), BadRequest> {
    if head.method == Method::CONNECT {
        return Err(BadRequest::Connect);
    }
    check_expect(&head.headers)?;
    if head.uri.path() == "*" && head.method != Method::OPTIONS {
        return Err(BadRequest::TargetInvalid);
    }
    match head.version {
        Version::HTTP_2 => check_h2(head),
        _ => check_h1(head),
    }
}

fn check_expect(headers: &HeaderMap) -> Result<(), BadRequest> {
    match headers.get(EXPECT) {
        Some(value) if !value.as_bytes().eq_ignore_ascii_case(b"100-continue") => {
            Err(BadRequest::Expect)
        }
        _ => Ok(()),
    }
}

fn check_h1(head: &mut request::Parts) -> Result<(), BadRequest> {
    // The raw bytes were looked at for the same; here for what hyper made of them.
    if head.headers.contains_key(TRANSFER_ENCODING) && head.headers.contains_key(CONTENT_LENGTH) {
        return Err(BadRequest::BothLengths);
    }
    let host = host(&head.headers)?;
    if host.is_none() && head.version != Version::HTTP_10 {
        return Err(BadRequest::HostMissing);
    }
    let Some(authority) = head.uri.authority() else {
        return Ok(());
    };
    // RFC 9112 §3.2.3: an authority alone is for CONNECT.
    if head.uri.scheme().is_none() {
        return Err(BadRequest::TargetInvalid);
    }
    match host {
        Some(host) if !same_host(host.as_bytes(), authority.as_str().as_bytes()) => {
            return Err(BadRequest::HostMismatch);
        }
        Some(_) => {}
        None => return Err(BadRequest::HostMissing),
    }
    let target = head.uri.path_and_query().cloned();
    head.uri = Uri::from(target.unwrap_or_else(|| PathAndQuery::from_static("/")));
    Ok(())
}

fn check_h2(head: &mut request::Parts) -> Result<(), BadRequest> {
    if head.headers.values().any(is_padded) {
        return Err(BadRequest::ValuePadded);
    }
    let host = host(&head.headers)?;
    match (head.uri.authority(), host) {
        (None, None) => return Err(BadRequest::HostMissing),
        (Some(authority), host) => {
            if !check_authority(authority.as_str().as_bytes()) {
                return Err(BadRequest::HostInvalid);
            }
            if host.is_some_and(|host| !same_host(host.as_bytes(), authority.as_str().as_bytes())) {
                return Err(BadRequest::HostMismatch);
            }
        }
        (None, Some(host)) => {
            let authority =
                Authority::try_from(host.as_bytes()).map_err(|_| BadRequest::HostInvalid)?;
            let mut parts = std::mem::take(&mut head.uri).into_parts();
            parts.authority = Some(authority);
            parts.scheme = Some(parts.scheme.unwrap_or(Scheme::HTTP));
            parts
                .path_and_query
                .get_or_insert_with(|| PathAndQuery::from_static("/"));
            head.uri = Uri::from_parts(parts).map_err(|_| BadRequest::HostInvalid)?;
        }
    }
    head.headers.remove(HOST);
    Ok(())
}

/// RFC 9113 §8.2.1 forbids what HTTP/1 strips (RFC 9112 §5.1), so that others may strip it or not.
fn is_padded(value: &HeaderValue) -> bool {
    let is_space = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    is_space(value.as_bytes().first()) || is_space(value.as_bytes().last())
}

fn host(headers: &HeaderMap) -> Result<Option<&HeaderValue>, BadRequest> {
    let mut hosts = headers.get_all(HOST).iter();
    let Some(host) = hosts.next() else {
        return Ok(None);
    };
    if hosts.next().is_some() {
        return Err(BadRequest::HostRepeated);
    }
    if !check_authority(host.as_bytes()) {
        return Err(BadRequest::HostInvalid);
    }
    Ok(Some(host))
}

/// Host names are the same in any case (RFC 9110 §4.2.3).
fn same_host(one: &[u8], other: &[u8]) -> bool {
    one.eq_ignore_ascii_case(other)
}

/// Whether this is a host with an optional port, and nothing else (RFC 3986 §3.2): no user, no path,
/// no whitespace, at most 261 bytes.
#[must_use]
pub fn check_authority(text: &[u8]) -> bool {
    if text.is_empty() || text.len() > AUTHORITY_BYTES {
        return false;
    }
    let (host_is_good, port) = if let Some(rest) = text.strip_prefix(b"[") {
        let Some(end) = rest.iter().position(|byte| *byte == b']') else {
            return false;
        };
        let address = std::str::from_utf8(&rest[..end])
            .ok()
            .and_then(|text| text.parse::<std::net::Ipv6Addr>().ok());
        (address.is_some(), &rest[end + 1..])
    } else {
        let end = text
            .iter()
            .position(|byte| *byte == b':')
            .unwrap_or(text.len());
        (end > 0 && is_name(&text[..end]), &text[end..])
    };
    host_is_good && (port.is_empty() || is_port(port))
}

/// `reg-name` of RFC 3986, which an IPv4 address is too, less what no host name has: an encoded byte
/// or a delimiter would be read differently by others.
fn is_name(name: &[u8]) -> bool {
    name.iter()
        .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~'))
}

fn is_port(port: &[u8]) -> bool {
    let Some(digits) = port.strip_prefix(b":") else {
        return false;
    };
    digits.len() <= 5
        && digits.iter().all(u8::is_ascii_digit)
        && (digits.is_empty()
            || std::str::from_utf8(digits)
                .ok()
                .is_some_and(|digits| digits.parse::<u16>().is_ok()))
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    #[test]
    fn a_host_is_a_name_or_an_address_with_an_optional_port() {
        let good = [
            "shop",
            "shop.default.svc.cluster.local",
            "shop:80",
            "10.0.0.1:8080",
            "[::1]",
            "[fd00::1]:443",
            "under_score",
            "shop.",
            "shop:",
            "a:65535",
        ];
        for host in good {
            assert!(check_authority(host.as_bytes()), "{host}");
        }
        let long = "a".repeat(262);
        let bad = [
            "",
            ":80",
            "shop:http",
            "shop:65536",
            "shop:080000",
            "user@shop",
            "shop/",
            "shop?x",
            "shop#x",
            "a b",
            "shop\\",
            "a,b",
            "[::1",
            "[::1]x",
            "[shop]",
            "::1",
            "shop:80:80",
            "%73hop",
            "sh\u{f6}p",
            "shop\t",
            &long,
        ];
        for host in bad {
            assert!(!check_authority(host.as_bytes()), "{host:?}");
        }
    }

    fn checked(request: http::request::Builder) -> Result<request::Parts, BadRequest> {
        let (mut head, ()) = request.body(()).unwrap().into_parts();
        check(&mut head).map(|()| head)
    }

    #[test]
    fn http_2_gets_its_authority_into_the_target_and_no_host() {
        let request = |uri: &str| Request::builder().version(Version::HTTP_2).uri(uri);
        let head = checked(request("/a?b").header("host", "shop:80")).unwrap();
        assert_eq!(head.uri, "http://shop:80/a?b");
        assert!(!head.headers.contains_key(HOST));
        let head = checked(request("http://Shop/a").header("host", "shop")).unwrap();
        assert_eq!(head.uri.authority().unwrap(), "Shop");
        assert_eq!(checked(request("/a")).unwrap_err(), BadRequest::HostMissing);
        let differs = request("http://shop/a").header("host", "other");
        assert_eq!(checked(differs).unwrap_err(), BadRequest::HostMismatch);
        let user = request("http://user@shop/a");
        assert_eq!(checked(user).unwrap_err(), BadRequest::HostInvalid);
    }

    #[test]
    fn http_1_0_needs_no_host_and_1_1_does() {
        let request = |version| Request::builder().version(version).uri("/");
        assert!(checked(request(Version::HTTP_10)).is_ok());
        let missing = checked(request(Version::HTTP_11)).unwrap_err();
        assert_eq!(missing, BadRequest::HostMissing);
    }

    #[test]
    fn every_reason_has_a_word_of_its_own() {
        let mut words: Vec<_> = BadRequest::ALL.iter().map(|bad| bad.as_str()).collect();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), BadRequest::ALL.len());
        for (index, bad) in BadRequest::ALL.iter().enumerate() {
            assert_eq!(*bad as usize, index);
        }
    }
}
