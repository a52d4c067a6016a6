use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, HOST,
    LOCATION, VARY,
};
use http::uri::Authority;
use http::{HeaderName, StatusCode};
use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::super::testing::{exact, get, prefix, request, target};
use super::super::{BackendTarget, InvalidBackend};
use super::*;

const FRONTEND: Frontend = Frontend {
    scheme: Scheme::Http,
    port: 80,
};

fn filters(steps: Vec<Filter>) -> Filters {
    Filters::new(steps, Vec::new())
}

fn rewrite(path: PathModifier) -> Filters {
    filters(vec![Filter::Rewrite(Rewrite {
        hostname: None,
        path: Some(path),
    })])
}

fn modifier(set: &[(&str, &str)], add: &[(&str, &str)], remove: &[&str]) -> HeaderModifier {
    let name = |name: &str| HeaderName::from_bytes(name.as_bytes()).unwrap();
    let pairs = |pairs: &[(&str, &str)]| {
        pairs
            .iter()
            .map(|(key, value)| (name(key), HeaderValue::from_str(value).unwrap()))
            .collect()
    };
    HeaderModifier {
        set: pairs(set),
        add: pairs(add),
        remove: remove.iter().map(|key| name(key)).collect(),
    }
}

fn continues(filters: &Filters, head: &mut request::Parts, matched: &RequestMatch) {
    let verdict = filters.on_request(head, matched, FRONTEND);
    assert!(matches!(verdict, FilterVerdict::Continue), "{verdict:?}");
}

fn answer(filters: &Filters, head: &mut request::Parts, matched: &RequestMatch) -> Response<()> {
    match filters.on_request(head, matched, FRONTEND) {
        FilterVerdict::Respond(response) => *response,
        FilterVerdict::Continue => panic!("went on"),
    }
}

/// The table of `HTTPPathModifier.replacePrefixMatch`.
#[test]
fn a_prefix_is_replaced_with_exactly_the_slashes_of_the_apis_table() {
    for (path, matched, replacement, expected) in [
        ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
        ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
        ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
        ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
        ("/foo", "/foo", "/xyz", "/xyz"),
        ("/foo/", "/foo", "/xyz", "/xyz/"),
        ("/foo/bar", "/foo", "", "/bar"),
        ("/foo/", "/foo", "", "/"),
        ("/foo", "/foo", "", "/"),
        ("/foo/", "/foo", "/", "/"),
        ("/foo", "/foo", "/", "/"),
        ("/bar", "/", "/xyz", "/xyz/bar"),
        ("/", "/", "/xyz", "/xyz/"),
        ("/foo/bar?x=/foo", "/foo", "/xyz", "/xyz/bar?x=/foo"),
    ] {
        let mut head = get(path);
        let matched_prefix = prefix(matched);
        continues(
            &rewrite(PathModifier::prefix(replacement)),
            &mut head,
            &matched_prefix,
        );
        assert_eq!(head.uri, expected, "{path} {matched} {replacement}");
    }
}

/// Conformance: HTTPRouteRewritePath.
#[test]
fn a_full_path_is_replaced_and_the_query_stays() {
    let mut head = get("http://web.shop/full/one/two?a=b");
    let full = rewrite(PathModifier::Full("/one".into()));
    continues(&full, &mut head, &prefix("/full/one"));
    assert_eq!(head.uri, "http://web.shop/one?a=b");
    let mut head = get("/strip-prefix/three");
    let strip = rewrite(PathModifier::prefix("/"));
    continues(&strip, &mut head, &prefix("/strip-prefix"));
    assert_eq!(head.uri, "/three");
}

#[test]
fn a_prefix_that_is_not_there_any_more_is_left_alone() {
    for target in ["/foobar", "/other", "*"] {
        let mut head = get(target);
        continues(
            &rewrite(PathModifier::prefix("/xyz")),
            &mut head,
            &prefix("/foo"),
        );
        assert_eq!(head.uri, target);
    }
    let mut head = get("/foo");
    continues(
        &rewrite(PathModifier::prefix("/xyz")),
        &mut head,
        &exact("/foo"),
    );
    assert_eq!(head.uri, "/foo");
}

/// Conformance: HTTPRouteRewriteHost.
#[test]
fn a_host_is_rewritten_where_the_protocol_has_it() {
    let host = filters(vec![Filter::Rewrite(Rewrite {
        hostname: Some(Authority::from_static("one.example.org")),
        path: None,
    })]);
    let mut one = request("GET", "/one", &[("host", "rewrite.example:8080")]);
    continues(&host, &mut one, &prefix("/"));
    assert_eq!(one.uri, "/one");
    assert_eq!(one.headers[HOST], "one.example.org");
    let mut two = request("GET", "http://rewrite.example/one", &[]);
    continues(&host, &mut two, &prefix("/"));
    assert_eq!(two.uri, "http://one.example.org/one");
    assert!(!two.headers.contains_key(HOST));
    let mut both = request(
        "GET",
        "http://rewrite.example/",
        &[("host", "rewrite.example")],
    );
    continues(&host, &mut both, &prefix("/"));
    assert_eq!(both.uri, "http://one.example.org/");
    assert_eq!(both.headers[HOST], "one.example.org");
}

/// Conformance: HTTPRouteRequestHeaderModifier, HTTPRouteResponseHeaderModifier.
#[test]
fn headers_are_set_added_and_removed() {
    let modifier = modifier(
        &[("X-Header-Set", "set-overwrites-values")],
        &[
            ("X-Header-Add", "add"),
            ("X-Header-Add-Append", "header-val-2"),
        ],
        &["X-Header-Remove"],
    );
    let both = filters(vec![
        Filter::RequestHeaders(modifier.clone()),
        Filter::ResponseHeaders(modifier),
    ]);
    let given = [
        ("x-header-set", "one"),
        ("x-header-set", "two"),
        ("x-header-add-append", "append-val-1"),
        ("x-header-remove", "one"),
        ("x-header-remove", "two"),
        ("x-other", "stays"),
    ];
    let mut head = request("GET", "/", &given);
    continues(&both, &mut head, &prefix("/"));
    let mut response = Response::new(()).into_parts().0;
    response.headers = request("GET", "/", &given).headers;
    both.on_response(None, &mut response);
    for headers in [&head.headers, &response.headers] {
        let all = |name: &str| -> Vec<&str> {
            let values = headers.get_all(name).iter();
            values.map(|value| value.to_str().unwrap()).collect()
        };
        assert_eq!(all("x-header-set"), ["set-overwrites-values"]);
        assert_eq!(all("x-header-add"), ["add"]);
        assert_eq!(all("x-header-add-append"), ["append-val-1", "header-val-2"]);
        assert!(all("x-header-remove").is_empty());
        assert_eq!(all("x-other"), ["stays"]);
    }
}

fn redirect() -> Redirect {
    Redirect {
        scheme: None,
        hostname: None,
        port: None,
        path: None,
        status: StatusCode::FOUND,
    }
}

fn location(redirect: Redirect, head: &mut request::Parts, port: u16) -> String {
    let frontend = Frontend { port, ..FRONTEND };
    let filters = filters(vec![Filter::Redirect(redirect)]);
    match filters.on_request(head, &prefix("/original-prefix"), frontend) {
        FilterVerdict::Respond(response) => {
            response.headers()[LOCATION].to_str().unwrap().to_owned()
        }
        FilterVerdict::Continue => panic!("went on"),
    }
}

/// Conformance: HTTPRouteRedirectHostAndStatus, -Scheme, -Port, -PortAndScheme, -Path.
#[test]
fn a_redirect_changes_what_it_names_and_the_port_goes_without_saying_where_it_may() {
    let org = Some(Authority::from_static("example.org"));
    let https = Some(Scheme::Https);
    let full = Some(PathModifier::Full("/full".into()));
    let replaced = Some(PathModifier::prefix("/replacement-prefix"));
    for (given, frontend_port, expected) in [
        (redirect(), 80, "http://web.shop/original-prefix/x?q=1"),
        (
            redirect(),
            8080,
            "http://web.shop:8080/original-prefix/x?q=1",
        ),
        (
            Redirect {
                hostname: org.clone(),
                ..redirect()
            },
            80,
            "http://example.org/original-prefix/x?q=1",
        ),
        (
            Redirect {
                hostname: org,
                ..redirect()
            },
            8080,
            "http://example.org:8080/original-prefix/x?q=1",
        ),
        (
            Redirect {
                scheme: https,
                ..redirect()
            },
            8080,
            "https://web.shop/original-prefix/x?q=1",
        ),
        (
            Redirect {
                scheme: https,
                port: Some(8443),
                ..redirect()
            },
            80,
            "https://web.shop:8443/original-prefix/x?q=1",
        ),
        (
            Redirect {
                scheme: https,
                port: Some(443),
                ..redirect()
            },
            80,
            "https://web.shop/original-prefix/x?q=1",
        ),
        (
            Redirect {
                scheme: Some(Scheme::Http),
                ..redirect()
            },
            8080,
            "http://web.shop/original-prefix/x?q=1",
        ),
        (
            Redirect {
                port: Some(8083),
                ..redirect()
            },
            80,
            "http://web.shop:8083/original-prefix/x?q=1",
        ),
        (
            Redirect {
                port: Some(80),
                ..redirect()
            },
            8080,
            "http://web.shop/original-prefix/x?q=1",
        ),
        (
            Redirect {
                path: full,
                ..redirect()
            },
            80,
            "http://web.shop/full?q=1",
        ),
        (
            Redirect {
                path: replaced,
                ..redirect()
            },
            80,
            "http://web.shop/replacement-prefix/x?q=1",
        ),
    ] {
        let target = "/original-prefix/x?q=1";
        let mut one = request("GET", target, &[("host", "web.shop:1234")]);
        let mut two = request("GET", &format!("http://web.shop{target}"), &[]);
        assert_eq!(location(given.clone(), &mut one, frontend_port), expected);
        assert_eq!(location(given, &mut two, frontend_port), expected);
    }
}

#[test]
fn a_request_without_a_host_is_redirected_to_where_it_is() {
    let mut head = get("/original-prefix/x");
    let path = Some(PathModifier::Full("/y".into()));
    assert_eq!(
        location(Redirect { path, ..redirect() }, &mut head, 80),
        "/y"
    );
}

#[test]
fn a_redirect_has_its_status_and_the_rules_response_headers() {
    for status in [301, 302, 303, 307, 308] {
        let status = StatusCode::from_u16(status).unwrap();
        let filters = filters(vec![
            Filter::Redirect(Redirect {
                status,
                ..redirect()
            }),
            Filter::ResponseHeaders(modifier(&[("x-set", "1")], &[], &[])),
        ]);
        assert!(filters.answers());
        let answer = answer(&filters, &mut get("/"), &prefix("/"));
        assert_eq!(answer.status(), status);
        assert_eq!(answer.headers()["x-set"], "1");
    }
}

#[test]
fn filters_are_applied_in_their_order() {
    let twice = filters(vec![
        Filter::Rewrite(Rewrite {
            hostname: None,
            path: Some(PathModifier::prefix("/b")),
        }),
        Filter::Redirect(redirect()),
    ]);
    let mut head = request("GET", "/a/x", &[("host", "web")]);
    let answer = answer(&twice, &mut head, &prefix("/a"));
    assert_eq!(answer.headers()[LOCATION], "http://web/b/x");
}

fn cors(origins: &[&str], credentials: Credentials) -> Cors {
    Cors {
        origins: origins
            .iter()
            .map(|origin| origin.parse().unwrap())
            .collect(),
        credentials,
        methods: Some(HeaderValue::from_static("GET, PUT")),
        headers: Some(HeaderValue::from_static("x-one, x-two")),
        expose: Some(HeaderValue::from_static("x-out")),
        max_age: std::time::Duration::from_secs(3600),
    }
}

fn preflight(cors: Cors, origin: &str) -> Response<()> {
    let headers = [
        ("origin", origin),
        ("access-control-request-method", "PUT"),
        ("access-control-request-headers", "x-one, x-three"),
    ];
    let mut head = request("OPTIONS", "/", &headers);
    answer(&filters(vec![Filter::Cors(cors)]), &mut head, &prefix("/"))
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name).map(|value| value.to_str().unwrap())
}

/// Conformance: HTTPRouteCORS.
#[test]
fn a_preflight_of_an_allowed_origin_is_told_what_is_allowed() {
    let cors = cors(
        &["https://www.foo.com", "https://*.bar.com"],
        Credentials::Allowed,
    );
    for origin in ["https://www.foo.com", "https://a.b.bar.com"] {
        let answer = preflight(cors.clone(), origin);
        assert_eq!(answer.status(), StatusCode::NO_CONTENT);
        let headers = answer.headers();
        assert_eq!(text(headers, &ACCESS_CONTROL_ALLOW_ORIGIN), Some(origin));
        assert_eq!(text(headers, &VARY), Some("origin"));
        assert_eq!(
            text(headers, &ACCESS_CONTROL_ALLOW_METHODS),
            Some("GET, PUT")
        );
        assert_eq!(
            text(headers, &ACCESS_CONTROL_ALLOW_HEADERS),
            Some("x-one, x-two")
        );
        assert_eq!(
            text(headers, &ACCESS_CONTROL_ALLOW_CREDENTIALS),
            Some("true")
        );
        assert_eq!(text(headers, &ACCESS_CONTROL_MAX_AGE), Some("3600"));
    }
}

#[test]
fn a_preflight_of_another_origin_is_told_nothing() {
    let cors = cors(
        &["https://www.foo.com", "https://*.bar.com"],
        Credentials::Unsaid,
    );
    for origin in [
        "http://www.foo.com",
        "https://www.foo.com:8443",
        "https://bar.com",
        "https://evilbar.com",
        "https://a.bar.com.evil",
        "null",
        "",
    ] {
        let answer = preflight(cors.clone(), origin);
        assert_eq!(answer.status(), StatusCode::NO_CONTENT, "{origin}");
        assert!(
            answer.headers().is_empty(),
            "{origin} {:?}",
            answer.headers()
        );
    }
}

#[test]
fn origins_are_alike_in_any_case_and_with_the_port_that_goes_without_saying() {
    let pattern = |text: &str| text.parse::<OriginPattern>().unwrap();
    for (allowed, origin, expected) in [
        ("https://foo.com", "https://FOO.com", true),
        ("https://foo.com:443", "https://foo.com", true),
        ("http://foo.com", "http://foo.com:80", true),
        ("http://foo.com", "http://foo.com:8080", false),
        ("http://*:8080", "http://anything:8080", true),
        ("http://*:8080", "http://anything", false),
        ("https://*", "https://x.y", true),
        ("https://*", "http://x.y", false),
        ("*", "null", true),
        ("http://[fd00::1]:81", "http://[fd00::1]:81", true),
    ] {
        let cors = Cors {
            origins: vec![pattern(allowed)],
            ..cors(&[], Credentials::Unsaid)
        };
        let mut headers = HeaderMap::new();
        cors.allow(&HeaderValue::from_str(origin).unwrap(), &mut headers);
        assert_eq!(!headers.is_empty(), expected, "{allowed} {origin}");
    }
    for wrong in [
        "",
        "foo.com",
        "ftp://foo.com",
        "https://",
        "https://foo.com/x",
        "https://a*b.com",
        "https://foo.com:0",
        "https://foo.com:x",
        "https://f oo.com",
    ] {
        assert!(wrong.parse::<OriginPattern>().is_err(), "{wrong:?} passed");
    }
}

#[test]
fn a_wildcard_is_one_only_without_credentials() {
    let wild = |credentials| Cors {
        methods: Some(HeaderValue::from_static("*")),
        headers: Some(HeaderValue::from_static("*")),
        expose: Some(HeaderValue::from_static("*")),
        ..cors(&["*"], credentials)
    };
    let open = preflight(wild(Credentials::Unsaid), "https://x.com");
    let open = open.headers();
    assert_eq!(text(open, &ACCESS_CONTROL_ALLOW_ORIGIN), Some("*"));
    assert_eq!(text(open, &ACCESS_CONTROL_ALLOW_METHODS), Some("*"));
    assert_eq!(text(open, &ACCESS_CONTROL_ALLOW_HEADERS), Some("*"));
    assert_eq!(text(open, &ACCESS_CONTROL_EXPOSE_HEADERS), Some("*"));
    assert_eq!(text(open, &ACCESS_CONTROL_ALLOW_CREDENTIALS), None);
    let closed = preflight(wild(Credentials::Allowed), "https://x.com");
    let closed = closed.headers();
    assert_eq!(
        text(closed, &ACCESS_CONTROL_ALLOW_ORIGIN),
        Some("https://x.com")
    );
    assert_eq!(text(closed, &ACCESS_CONTROL_ALLOW_METHODS), Some("PUT"));
    assert_eq!(
        text(closed, &ACCESS_CONTROL_ALLOW_HEADERS),
        Some("x-one, x-three")
    );
    assert_eq!(text(closed, &ACCESS_CONTROL_EXPOSE_HEADERS), None);
}

#[test]
fn a_request_of_an_allowed_origin_goes_on_and_its_response_may_be_read() {
    let filters = filters(vec![Filter::Cors(cors(
        &["https://foo.com"],
        Credentials::Unsaid,
    ))]);
    for (method, headers) in [
        ("GET", vec![("origin", "https://foo.com")]),
        // Without a method that is asked for it is no preflight.
        ("OPTIONS", vec![("origin", "https://foo.com")]),
        ("OPTIONS", vec![("access-control-request-method", "GET")]),
    ] {
        let mut head = request(method, "/", &headers);
        let origin = filters.origin(&head.headers);
        continues(&filters, &mut head, &prefix("/"));
        let mut response = Response::new(()).into_parts().0;
        // What the application says of another origin must not stay beside ours.
        let app = HeaderValue::from_static("https://other.com");
        response.headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, app);
        filters.on_response(origin.as_ref(), &mut response);
        let allowed = text(&response.headers, &ACCESS_CONTROL_ALLOW_ORIGIN);
        let is_ours = headers[0].0 == "origin";
        let expected = if is_ours {
            "https://foo.com"
        } else {
            "https://other.com"
        };
        assert_eq!(allowed, Some(expected));
        let exposed = text(&response.headers, &ACCESS_CONTROL_EXPOSE_HEADERS);
        assert_eq!(exposed, is_ours.then_some("x-out"));
    }
}

#[test]
fn who_has_no_cors_asks_for_no_origin() {
    let head = request("GET", "/", &[("origin", "https://foo.com")]);
    assert_eq!(Filters::default().origin(&head.headers), None);
}

/// Conformance: HTTPRouteRequestPercentageMirror.
#[test]
fn a_mirror_gets_its_share_and_an_invalid_one_nothing() {
    let mut rng = SmallRng::seed_from_u64(5);
    let mut share = |target: BackendTarget, share: Fraction| {
        let mirror = Mirror { target, share };
        (0..20_000).filter(|_| mirror.is_due(&mut rng)).count()
    };
    let half = Fraction::new(1, 2).unwrap();
    assert_eq!(share(target("v1"), Fraction::ALL), 20_000);
    assert_eq!(share(target("v1"), Fraction::new(0, 100).unwrap()), 0);
    let count = share(target("v1"), half);
    assert!((9_700..10_300).contains(&count), "{count}");
    let reason = InvalidBackend::BackendNotFound;
    assert_eq!(share(BackendTarget::Invalid { reason }, Fraction::ALL), 0);
    assert_eq!(Fraction::new(3, 2), None);
    assert_eq!(Fraction::new(0, 0), None);
}
