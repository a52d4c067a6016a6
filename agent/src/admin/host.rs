//! Which `Host` the admin endpoint answers to.

use std::net::{IpAddr, SocketAddr};

use http::Request;
use http::header::HOST;
use http::uri::Authority;

use super::Exposure;

/// Whether a request was meant for this endpoint. An address cannot be rebound, so addresses are
/// good (only loopback ones where nothing else is bound), and of names only `localhost`.
pub(super) fn is_for_us<B>(request: &Request<B>, exposure: Exposure) -> bool {
    let mut hosts = request.headers().get_all(HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else {
        return false;
    };
    let Some(host) = host.to_str().ok().and_then(|host| host.parse().ok()) else {
        return false;
    };
    let target = request.uri().authority();
    is_good(&host, exposure) && target.is_none_or(|target| is_good(target, exposure))
}

fn is_good(authority: &Authority, exposure: Exposure) -> bool {
    if authority.as_str().contains('@') {
        return false;
    }
    let host = authority.host();
    if host.eq_ignore_ascii_case("localhost") {
        return true;
    }
    match address_of(host) {
        Some(address) => exposure == Exposure::Anywhere || address.is_loopback(),
        None => false,
    }
}

fn address_of(host: &str) -> Option<IpAddr> {
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    bare.unwrap_or(host)
        .parse()
        .ok()
        .map(|address: IpAddr| address.to_canonical())
}

/// Whether the endpoint may be bound there.
pub(super) fn may_bind(address: SocketAddr, exposure: Exposure) -> bool {
    exposure == Exposure::Anywhere || address.ip().to_canonical().is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asks(hosts: &[&str], uri: &str, exposure: Exposure) -> bool {
        let mut request = Request::builder().uri(uri);
        for host in hosts {
            request = request.header(HOST, *host);
        }
        is_for_us(&request.body(()).unwrap(), exposure)
    }

    #[test]
    fn loopback_and_localhost_are_answered() {
        for host in [
            "127.0.0.1:15000",
            "127.1.2.3",
            "[::1]:15000",
            "[::ffff:127.0.0.1]:1",
            "localhost",
            "LOCALHOST:15000",
        ] {
            assert!(asks(&[host], "/pods", Exposure::Loopback), "{host}");
        }
    }

    #[test]
    fn a_name_that_was_rebound_is_not_answered() {
        for host in [
            "evil.example",
            "evil.example:15000",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "localhost@evil.example",
            "evil@localhost",
            "10.0.0.1:15000",
            "",
        ] {
            assert!(!asks(&[host], "/pods", Exposure::Loopback), "{host}");
        }
        assert!(!asks(&[], "/pods", Exposure::Loopback));
        assert!(!asks(
            &["localhost", "evil.example"],
            "/",
            Exposure::Loopback
        ));
        assert!(!asks(
            &["localhost"],
            "http://evil.example/pods",
            Exposure::Loopback
        ));
    }

    #[test]
    fn an_exposed_endpoint_answers_to_addresses_and_to_no_name() {
        assert!(asks(&["10.0.0.1:15000"], "/", Exposure::Anywhere));
        assert!(!asks(&["evil.example"], "/", Exposure::Anywhere));
    }

    #[test]
    fn other_than_loopback_is_bound_only_when_asked_for() {
        let any = "0.0.0.0:15000".parse().unwrap();
        assert!(!may_bind(any, Exposure::Loopback));
        assert!(may_bind(any, Exposure::Anywhere));
        for loopback in ["127.0.0.1:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
            assert!(may_bind(loopback.parse().unwrap(), Exposure::Loopback));
        }
    }
}
