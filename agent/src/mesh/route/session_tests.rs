use super::super::testing::backend;
use super::*;

const RULE: &str = "HTTPRoute/shop/web/0";

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

fn endpoint() -> SocketAddr {
    "10.0.0.7:8080".parse().unwrap()
}

fn cookie(lifetime: CookieLifetime) -> SessionPersistence {
    let name = "s".into();
    SessionPersistence::new(RULE, SessionCarrier::Cookie { name, lifetime })
}

/// What a browser sends back.
fn sent_back(cookie: &HeaderValue) -> HeaderMap {
    let pair = cookie.to_str().unwrap().split(';').next().unwrap();
    let value = format!("other=1; {pair}; last=2");
    HeaderMap::from_iter([(COOKIE, HeaderValue::from_str(&value).unwrap())])
}

#[test]
fn a_cookie_brings_a_session_back_to_its_backend_and_endpoint() {
    let persistence = cookie(CookieLifetime::Session);
    for endpoint in ["10.0.0.7:8080", "[fd00::7]:8080"] {
        let endpoint = endpoint.parse().unwrap();
        let (name, value) = persistence
            .answer(None, &backend("v1", 1), endpoint, at(100))
            .unwrap();
        assert_eq!(name, SET_COOKIE);
        let session = persistence.read(&sent_back(&value), at(200)).unwrap();
        assert_eq!(session.endpoint(), endpoint);
        assert_eq!(session.backend, backend("v1", 9).fingerprint());
        assert_ne!(session.backend, backend("v2", 1).fingerprint());
    }
}

#[test]
fn a_client_that_has_its_session_is_not_told_again() {
    let persistence = cookie(CookieLifetime::Session);
    let (_, value) = persistence
        .answer(None, &backend("v1", 1), endpoint(), at(100))
        .unwrap();
    let session = persistence.read(&sent_back(&value), at(200));
    let same = persistence.answer(session.as_ref(), &backend("v1", 1), endpoint(), at(200));
    assert_eq!(same, None);
    let elsewhere = "10.0.0.8:8080".parse().unwrap();
    let moved = persistence.answer(session.as_ref(), &backend("v1", 1), elsewhere, at(200));
    assert!(moved.is_some());
}

#[test]
fn a_session_cookie_has_no_end_and_a_permanent_one_ends_with_the_session() {
    let (_, value) = cookie(CookieLifetime::Session)
        .answer(None, &backend("v1", 1), endpoint(), at(100))
        .unwrap();
    let text = value.to_str().unwrap();
    assert!(text.contains("; Path=/; HttpOnly; SameSite=Lax"), "{text}");
    assert!(
        !text.contains("Max-Age") && !text.contains("Expires"),
        "{text}"
    );
    let mut permanent = cookie(CookieLifetime::Permanent);
    permanent.absolute_timeout = Some(Duration::from_secs(300));
    let (_, value) = permanent
        .answer(None, &backend("v1", 1), endpoint(), at(100))
        .unwrap();
    assert!(
        value.to_str().unwrap().ends_with("; Max-Age=300"),
        "{value:?}"
    );
    assert!(permanent.read(&sent_back(&value), at(399)).is_some());
    assert!(permanent.read(&sent_back(&value), at(400)).is_none());
}

#[test]
fn an_idle_session_ends_and_a_used_one_does_not_but_for_its_absolute_timeout() {
    let mut persistence = cookie(CookieLifetime::Session);
    persistence.idle_timeout = Some(Duration::from_secs(60));
    persistence.absolute_timeout = Some(Duration::from_secs(150));
    let mut headers = HeaderMap::new();
    let mut former = None;
    for seconds in [100, 150, 200, 249] {
        former = persistence.read(&headers, at(seconds));
        assert_eq!(former.is_some(), seconds != 100, "{seconds}");
        let answer =
            persistence.answer(former.as_ref(), &backend("v1", 1), endpoint(), at(seconds));
        headers = sent_back(&answer.unwrap().1);
    }
    assert_eq!(former.unwrap().began, 100, "use does not make it younger");
    assert!(persistence.read(&headers, at(250)).is_none(), "absolute");
    persistence.absolute_timeout = None;
    assert!(persistence.read(&headers, at(308)).is_some());
    assert!(persistence.read(&headers, at(309)).is_none(), "idle");
}

#[test]
fn a_header_carries_a_session_as_well() {
    let name = HeaderName::from_static("x-session");
    let persistence = SessionPersistence::new(RULE, SessionCarrier::Header(name.clone()));
    let (told, token) = persistence
        .answer(None, &backend("v1", 1), endpoint(), at(100))
        .unwrap();
    assert_eq!(told, name);
    let headers = HeaderMap::from_iter([(name, token)]);
    let session = persistence.read(&headers, at(100)).unwrap();
    assert_eq!(session.endpoint(), endpoint());
}

#[test]
fn a_session_of_another_rule_is_none() {
    let persistence = cookie(CookieLifetime::Session);
    let (_, value) = persistence
        .answer(None, &backend("v1", 1), endpoint(), at(100))
        .unwrap();
    let carrier = persistence.carrier.clone();
    let other = SessionPersistence::new("HTTPRoute/shop/web/1", carrier);
    assert_eq!(other.read(&sent_back(&value), at(100)), None);
}

#[test]
fn what_is_no_token_is_no_session() {
    let persistence = cookie(CookieLifetime::Session);
    let (_, value) = persistence
        .answer(None, &backend("v1", 1), endpoint(), at(100))
        .unwrap();
    let cookies = sent_back(&value);
    let good = cookies[COOKIE].to_str().unwrap();
    let token = &good["other=1; s=".len()..good.len() - "; last=2".len()];
    for text in [
        String::new(),
        "1".to_owned(),
        token[..token.len() - 1].to_owned(),
        format!("{token}0"),
        token.replace('1', "+"),
        "é".repeat(token.len() / 2),
        format!("2{}", &token[1..]),
    ] {
        let value = HeaderValue::from_bytes(format!("s={text}").as_bytes()).unwrap();
        let headers = HeaderMap::from_iter([(COOKIE, value)]);
        assert_eq!(persistence.read(&headers, at(100)), None, "{text}");
    }
    assert!(persistence.read(&cookies, at(100)).is_some());
}

#[test]
fn the_fingerprint_of_a_name_never_changes() {
    assert_eq!(fingerprint("shop/web:80"), 0x6fa1_33c4_4fed_c68b);
}
