//! Which headers pass a proxy, and which belong to one hop.

use std::fmt::Write as _;
use std::net::IpAddr;

use http::header::{
    CONNECTION, Entry, HeaderName, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING,
    UPGRADE,
};
use http::{HeaderMap, HeaderValue, StatusCode, Version, request, response};
use rand::Rng;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The longest `x-request-id` that is kept, in bytes.
const REQUEST_ID_BYTES: usize = 128;

/// Who asks, as far as headers tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientView {
    /// Address of the client as the agent sees it.
    pub address: IpAddr,
    /// Which of the two agents of a request this is.
    pub side: Side,
}

/// On which side of a request an agent stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The client's: it adds what a proxy adds.
    Source,
    /// The server's: the client's agent, if there is one, has added it.
    Destination,
}

/// Names a request in logs, across all hops.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestId(HeaderValue);

impl RequestId {
    /// The client's own, if it is one: at most 128 visible ASCII characters. Otherwise a random
    /// UUID.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Self {
        let mut given = headers.get_all(X_REQUEST_ID).iter();
        match (given.next(), given.next()) {
            (Some(id), None) if is_request_id(id.as_bytes()) => Self(id.clone()),
            _ => Self::random(),
        }
    }

    fn random() -> Self {
        let mut bytes: [u8; 16] = rand::rng().random();
        // A version 4 UUID (RFC 9562 §5.4), as other proxies make them.
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        let mut text = [0_u8; 36];
        let mut at = 0;
        for (index, byte) in bytes.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                text[at] = b'-';
                at += 1;
            }
            text[at] = HEX[usize::from(byte >> 4)];
            text[at + 1] = HEX[usize::from(byte & 0x0f)];
            at += 2;
        }
        Self(HeaderValue::from_bytes(&text).unwrap_or_else(|_| HeaderValue::from_static("unknown")))
    }

    /// As a header's value.
    #[must_use]
    pub fn value(&self) -> &HeaderValue {
        &self.0
    }

    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }
}

const HEX: &[u8; 16] = b"0123456789abcdef";

fn is_request_id(id: &[u8]) -> bool {
    !id.is_empty() && id.len() <= REQUEST_ID_BYTES && id.iter().all(u8::is_ascii_graphic)
}

/// Makes a request's head fit for the next hop: hop-by-hop fields go (RFC 9110 §7.6.1), except that
/// `TE: trailers` and a HTTP/1.1 upgrade are asked for anew; `x-forwarded-for`,
/// `x-forwarded-proto` and `x-request-id` are set. Host, authority and trace headers (W3C, B3) stay
/// as they are.
pub fn to_upstream(head: &mut request::Parts, client: &ClientView, id: &RequestId) {
    let http1 = head.version != Version::HTTP_2;
    // What HTTP/1.0 asks for of that kind is ignored (RFC 9110 §7.8).
    let upgrade = (head.version == Version::HTTP_11).then(|| upgrade(&head.headers));
    let upgrade = upgrade.flatten();
    let trailers = wants_trailers(&head.headers);
    remove_hop_by_hop(&mut head.headers);
    head.headers.remove(PROXY_AUTHORIZATION);
    if trailers {
        head.headers
            .insert(TE, HeaderValue::from_static("trailers"));
    }
    match (upgrade, trailers && http1) {
        (Some(protocol), te) => {
            head.headers.insert(UPGRADE, protocol);
            let fields = if te { "upgrade, te" } else { "upgrade" };
            let fields = HeaderValue::from_static(fields);
            head.headers.insert(CONNECTION, fields);
        }
        (None, true) => {
            head.headers
                .insert(CONNECTION, HeaderValue::from_static("te"));
        }
        (None, false) => {}
    }
    if client.side == Side::Source {
        append_address(&mut head.headers, client.address);
        if let Entry::Vacant(vacant) = head.headers.entry(X_FORWARDED_PROTO) {
            vacant.insert(HeaderValue::from_static("http"));
        }
    }
    head.headers.insert(X_REQUEST_ID, id.value().clone());
}

/// Makes an answer's head fit for the client: hop-by-hop fields go, except the upgrade of a 101.
pub fn to_downstream(head: &mut response::Parts) {
    let upgrade = (head.status == StatusCode::SWITCHING_PROTOCOLS)
        .then(|| head.headers.remove(UPGRADE))
        .flatten();
    remove_hop_by_hop(&mut head.headers);
    head.headers.remove(PROXY_AUTHENTICATE);
    if let Some(protocol) = upgrade {
        head.headers.insert(UPGRADE, protocol);
        let upgrade = HeaderValue::from_static("upgrade");
        head.headers.insert(CONNECTION, upgrade);
    }
}

/// The protocol that `Connection: upgrade` asks for.
fn upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let asked = tokens(headers, &CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"));
    asked.then(|| headers.get(UPGRADE).cloned()).flatten()
}

fn wants_trailers(headers: &HeaderMap) -> bool {
    tokens(headers, &TE).any(|token| token.eq_ignore_ascii_case("trailers"))
}

fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
}

fn remove_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        let named: Vec<HeaderName> = tokens(headers, &CONNECTION)
            .filter_map(|token| HeaderName::try_from(token).ok())
            .filter(|name| !is_end_to_end(name))
            .collect();
        for name in named {
            headers.remove(name);
        }
        headers.remove(CONNECTION);
    }
    for name in [
        &KEEP_ALIVE,
        &PROXY_CONNECTION,
        &TE,
        &TRANSFER_ENCODING,
        &UPGRADE,
    ] {
        headers.remove(name);
    }
}

/// Fields that `Connection` must not take away (RFC 9110 §7.6.1): a client could otherwise hide
/// from the server what proxies before it have vouched for.
fn is_end_to_end(name: &HeaderName) -> bool {
    use http::header::{AUTHORIZATION, CACHE_CONTROL, CONTENT_LENGTH, COOKIE, HOST};
    [
        HOST,
        CONTENT_LENGTH,
        AUTHORIZATION,
        COOKIE,
        CACHE_CONTROL,
        X_FORWARDED_FOR,
        X_FORWARDED_PROTO,
        X_REQUEST_ID,
    ]
    .contains(name)
        || name.as_str().starts_with("x-undermesh-")
}

/// Appends to the list that other proxies may have begun.
fn append_address(headers: &mut HeaderMap, address: IpAddr) {
    let mut list = String::with_capacity(48);
    for value in headers.get_all(X_FORWARDED_FOR) {
        // What is no text cannot be a list of addresses.
        let Ok(value) = value.to_str() else {
            continue;
        };
        if !value.is_empty() {
            list.push_str(value);
            list.push_str(", ");
        }
    }
    // Writing to a String does not fail.
    let _ = write!(list, "{address}");
    if let Ok(list) = HeaderValue::try_from(list) {
        headers.insert(X_FORWARDED_FOR, list);
    }
}

#[cfg(test)]
mod tests {
    use http::{Request, Response};

    use super::*;

    const CLIENT: ClientView = ClientView {
        address: IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1)),
        side: Side::Source,
    };

    fn upstream(fields: &[(&str, &str)]) -> HeaderMap {
        let mut request = Request::builder();
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        let (mut head, ()) = request.body(()).unwrap().into_parts();
        let id = RequestId::of(&head.headers);
        to_upstream(&mut head, &CLIENT, &id);
        head.headers
    }

    fn names(headers: &HeaderMap) -> Vec<&str> {
        let mut names: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn what_belongs_to_one_hop_does_not_pass() {
        let headers = upstream(&[
            ("host", "shop"),
            ("connection", "close, X-Hop"),
            ("connection", "keep-alive"),
            ("x-hop", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("proxy-authorization", "basic x"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "websocket"),
            ("te", "gzip"),
            ("x-end", "1"),
        ]);
        assert_eq!(
            names(&headers),
            [
                "host",
                "x-end",
                "x-forwarded-for",
                "x-forwarded-proto",
                "x-request-id"
            ]
        );
    }

    #[test]
    fn connection_cannot_take_away_what_others_rely_on() {
        let headers = upstream(&[
            ("host", "shop"),
            ("authorization", "bearer x"),
            ("x-forwarded-for", "1.2.3.4"),
            (
                "connection",
                "host, authorization, x-forwarded-for, x-request-id, content-length",
            ),
            ("content-length", "3"),
        ]);
        for name in ["host", "authorization", "content-length", "x-request-id"] {
            assert!(headers.contains_key(name), "{name}");
        }
        assert_eq!(headers[X_FORWARDED_FOR], "1.2.3.4, 10.0.0.1");
    }

    #[test]
    fn trailers_and_an_upgrade_are_asked_for_anew() {
        let headers = upstream(&[("te", "gzip, trailers"), ("connection", "te")]);
        assert_eq!(headers[TE], "trailers");
        assert_eq!(headers[CONNECTION], "te");
        let headers = upstream(&[
            ("upgrade", "websocket"),
            ("connection", "keep-alive, Upgrade"),
        ]);
        assert_eq!(headers[UPGRADE], "websocket");
        assert_eq!(headers[CONNECTION], "upgrade");
    }

    #[test]
    fn trace_headers_pass_as_they_are() {
        let trace = [
            (
                "traceparent",
                "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            ),
            ("tracestate", "a=b"),
            ("b3", "1-2"),
            ("x-b3-traceid", "1"),
        ];
        let headers = upstream(&trace);
        for (name, value) in trace {
            assert_eq!(headers[name], value);
        }
    }

    #[test]
    fn a_request_id_is_kept_if_it_is_one_and_made_otherwise() {
        assert_eq!(
            upstream(&[("x-request-id", "abc-1")])[X_REQUEST_ID],
            "abc-1"
        );
        let long = "a".repeat(129);
        for bad in [&["a b"][..], &["", "x"], &[&long], &["one", "two"]] {
            let fields: Vec<_> = bad.iter().map(|id| ("x-request-id", *id)).collect();
            let headers = upstream(&fields);
            assert_eq!(headers.get_all(X_REQUEST_ID).iter().count(), 1);
            let id = headers[X_REQUEST_ID].to_str().unwrap();
            assert_eq!(id.len(), 36, "{id}");
            assert_eq!(id.as_bytes()[14], b'4');
        }
        assert_ne!(RequestId::random(), RequestId::random());
    }

    #[test]
    fn the_destinations_agent_adds_no_address_a_second_time() {
        let (mut head, ()) = Request::builder()
            .header("x-forwarded-for", "10.0.0.1")
            .body(())
            .unwrap()
            .into_parts();
        let client = ClientView {
            side: Side::Destination,
            ..CLIENT
        };
        let id = RequestId::of(&head.headers);
        to_upstream(&mut head, &client, &id);
        assert_eq!(head.headers[X_FORWARDED_FOR], "10.0.0.1");
        assert!(!head.headers.contains_key(X_FORWARDED_PROTO));
    }

    #[test]
    fn an_answer_keeps_its_upgrade_only_if_it_switches() {
        let answer = |status| {
            let (mut head, ()) = Response::builder()
                .status(status)
                .header("connection", "upgrade, x-hop")
                .header("upgrade", "websocket")
                .header("x-hop", "1")
                .header("keep-alive", "5")
                .header("x-end", "1")
                .body(())
                .unwrap()
                .into_parts();
            to_downstream(&mut head);
            head.headers
        };
        assert_eq!(names(&answer(101)), ["connection", "upgrade", "x-end"]);
        assert_eq!(answer(101)[CONNECTION], "upgrade");
        assert_eq!(names(&answer(426)), ["x-end"]);
    }
}
