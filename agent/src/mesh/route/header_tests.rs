use super::super::testing::request;
use super::*;

fn exact(name: &str, value: &str) -> HeaderMatch {
    let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
    HeaderMatch::new(name, HeaderMatchKind::Exact, value).unwrap()
}

fn regex(name: &str, value: &str) -> HeaderMatch {
    let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
    HeaderMatch::new(name, HeaderMatchKind::Regex, value).unwrap()
}

fn matches(header: &HeaderMatch, headers: &[(&str, &str)]) -> bool {
    header.matches(&request("GET", "/", headers))
}

#[test]
fn names_are_alike_in_any_case_and_values_are_not() {
    assert!(matches(&exact("X-Version", "one"), &[("x-vErsion", "one")]));
    assert!(!matches(
        &exact("x-version", "one"),
        &[("x-version", "One")]
    ));
    assert!(!matches(&exact("x-version", "one"), &[]));
}

/// Neither the first nor the last of several values passes for all.
#[test]
fn a_header_that_is_there_twice_is_one_with_both_values() {
    let twice = [("x-user", "guest"), ("x-user", "root")];
    assert!(!matches(&exact("x-user", "guest"), &twice));
    assert!(!matches(&exact("x-user", "root"), &twice));
    assert!(matches(&exact("x-user", "guest,root"), &twice));
    assert!(!matches(&exact("x-user", "guest,roo"), &twice));
    assert!(!matches(&exact("x-user", "guest,root,"), &twice));
    assert!(!matches(&regex("x-user", "guest|root"), &twice));
    assert!(matches(&regex("x-user", "guest,.*"), &twice));
    assert!(matches(&regex("x-user", "guest|root"), &twice[..1]));
}

/// HTTP/2 may send each cookie in a header of its own.
#[test]
fn cookies_are_joined_as_cookies() {
    let canary = regex("cookie", "(.*; )?canary=yes(;.*)?");
    assert!(matches(&canary, &[("cookie", "a=b; canary=yes; c=d")]));
    assert!(matches(
        &canary,
        &[("cookie", "a=b"), ("cookie", "canary=yes")]
    ));
    assert!(!matches(&canary, &[("cookie", "a=b; xcanary=yes")]));
    assert!(matches(
        &exact("cookie", "a=b; c=d"),
        &[("cookie", "a=b"), ("cookie", "c=d")]
    ));
}

#[test]
fn a_host_is_alike_in_any_case_and_with_any_port_unless_one_is_meant() {
    let host = exact("Host", "web.shop");
    for given in ["web.shop", "WEB.shop", "web.shop:80", "Web.Shop:8080"] {
        assert!(matches(&host, &[("host", given)]), "{given}");
    }
    for given in [
        "web.shop.evil",
        "evilweb.shop",
        "web",
        "web.shop:80:80x",
        "",
    ] {
        assert!(!matches(&host, &[("host", given)]), "{given}");
    }
    let with_port = exact("host", "web.shop:8080");
    assert!(matches(&with_port, &[("host", "web.SHOP:8080")]));
    assert!(!matches(&with_port, &[("host", "web.shop")]));
    assert!(!matches(&with_port, &[("host", "web.shop:80")]));
    let pattern = regex("host", r"[a-z]+\.shop");
    assert!(matches(&pattern, &[("host", "WEB.shop:80")]));
    assert!(!matches(&pattern, &[("host", "webxshop")]));
    let six = exact("host", "[fd00::1]");
    assert!(matches(&six, &[("host", "[fd00::1]:80")]));
    assert!(matches(&six, &[("host", "[fd00::1]")]));
}

/// Of the two the target is what counts (RFC 9112 §3.2.2, RFC 9113 §8.3.1).
#[test]
fn the_authority_of_the_target_is_the_host() {
    let host = exact("host", "web.shop");
    let head = request("GET", "http://web.shop:80/x", &[("host", "other")]);
    assert!(host.matches(&head));
    let head = request("GET", "http://other/x", &[("host", "web.shop")]);
    assert!(!host.matches(&head));
}

#[test]
fn a_value_need_not_be_text() {
    let mut head = request("GET", "/", &[]);
    let value = http::HeaderValue::from_bytes(b"caf\xe9").unwrap();
    head.headers.insert("x-place", value);
    assert!(regex("x-place", "caf.").matches(&head));
    assert!(!exact("x-place", "café").matches(&head));
}
