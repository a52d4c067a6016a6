use http::Method;
use http::header::HeaderName;
use proptest::prelude::*;

use super::super::testing::{exact, get, prefix, request, rule, selected, table};
use super::super::{GrpcMatch, HeaderMatch, HeaderMatchKind, Pattern, QueryMatch, ValueMatch};
use super::*;

fn header(name: &str, value: &str) -> HeaderMatch {
    let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
    HeaderMatch::new(name, HeaderMatchKind::Exact, value).unwrap()
}

fn with_headers(of: RequestMatch, headers: &[(&str, &str)]) -> RequestMatch {
    RequestMatch {
        headers: headers
            .iter()
            .map(|(name, value)| header(name, value))
            .collect(),
        ..of
    }
}

fn with_method(of: RequestMatch, method: Method) -> RequestMatch {
    RequestMatch {
        method: Some(method),
        ..of
    }
}

fn with_query(of: RequestMatch, pairs: &[(&str, &str)]) -> RequestMatch {
    let query = pairs.iter().map(|(name, value)| QueryMatch {
        name: (*name).into(),
        value: ValueMatch::Exact((*value).into()),
    });
    RequestMatch {
        query: query.collect(),
        ..of
    }
}

/// Conformance: HTTPRouteMatching.
#[test]
fn paths_and_headers_choose_the_rule() {
    let any = RequestMatch::any();
    let table = table(vec![
        (
            "v1",
            vec![
                any.clone(),
                with_headers(any.clone(), &[("version", "one")]),
            ],
        ),
        (
            "v2",
            vec![prefix("/v2"), with_headers(any, &[("version", "two")])],
        ),
    ]);
    for (target, version, expected) in [
        ("/", None, "v1"),
        ("/example", None, "v1"),
        ("/", Some("one"), "v1"),
        ("/v2", None, "v2"),
        ("/v2/example", None, "v2"),
        ("/", Some("two"), "v2"),
        ("/v2/", None, "v2"),
        ("/v2example", None, "v1"),
        ("/foo/v2/example", None, "v1"),
    ] {
        let headers: Vec<_> = version
            .iter()
            .map(|version| ("Version", *version))
            .collect();
        let head = request("GET", target, &headers);
        assert_eq!(selected(&table, &head), expected, "{target} {version:?}");
    }
}

/// Conformance: HTTPRoutePathMatchOrder.
#[test]
fn exact_paths_come_before_prefixes_and_longer_prefixes_before_shorter_ones() {
    let table = table(vec![
        ("v3", vec![exact("/match/exact/one")]),
        ("v2", vec![exact("/match/exact")]),
        ("v1", vec![exact("/match")]),
        ("v2p", vec![prefix("/match/prefix/one")]),
        ("v1p", vec![prefix("/match/prefix/")]),
        ("v3p", vec![prefix("/match/")]),
    ]);
    for (target, expected) in [
        ("/match/exact/one", "v3"),
        ("/match/exact", "v2"),
        ("/match", "v1"),
        ("/match/", "v3p"),
        ("/match/prefix/one/any", "v2p"),
        ("/match/prefix/any", "v1p"),
        ("/match/any", "v3p"),
        ("/matches", "404"),
        ("/", "404"),
    ] {
        assert_eq!(selected(&table, &get(target)), expected, "{target}");
    }
}

/// Conformance: HTTPRouteExactPathMatching.
#[test]
fn an_exact_path_is_exact() {
    let table = table(vec![
        ("one", vec![exact("/one")]),
        ("two", vec![exact("/two")]),
    ]);
    for (target, expected) in [
        ("/one", "one"),
        ("/two", "two"),
        ("/one?x=/two", "one"),
        ("/", "404"),
        ("/one/example", "404"),
        ("/one/", "404"),
        ("/Two", "404"),
    ] {
        assert_eq!(selected(&table, &get(target)), expected, "{target}");
    }
}

/// Conformance: HTTPRouteMethodMatching.
#[test]
fn a_method_counts_after_the_path_and_before_headers() {
    let table = table(vec![
        ("get", vec![with_method(RequestMatch::any(), Method::GET)]),
        (
            "delete",
            vec![with_method(RequestMatch::any(), Method::DELETE)],
        ),
        ("path", vec![prefix("/path1")]),
        (
            "headers",
            vec![with_headers(RequestMatch::any(), &[("a", "1"), ("b", "2")])],
        ),
        ("post", vec![with_method(prefix("/path1"), Method::POST)]),
    ]);
    let headers = [("a", "1"), ("b", "2")];
    for (method, target, headers, expected) in [
        ("GET", "/", [].as_slice(), "get"),
        ("DELETE", "/", &[], "delete"),
        ("HEAD", "/", &[], "404"),
        ("GET", "/path1", &[], "path"),
        ("POST", "/path1", &[], "post"),
        ("GET", "/", &headers, "get"),
        ("PUT", "/", &headers, "headers"),
        ("get", "/", &[], "404"),
    ] {
        let head = request(method, target, headers);
        assert_eq!(selected(&table, &head), expected, "{method} {target}");
    }
}

/// Conformance: HTTPRouteHeaderMatching.
#[test]
fn more_headers_come_before_fewer_and_all_of_them_must_be_there() {
    let any = RequestMatch::any();
    let table = table(vec![
        ("v1", vec![with_headers(any.clone(), &[("version", "one")])]),
        ("v2", vec![with_headers(any.clone(), &[("version", "two")])]),
        (
            "orange",
            vec![with_headers(
                any.clone(),
                &[("version", "two"), ("color", "orange")],
            )],
        ),
        (
            "blue",
            vec![
                with_headers(any.clone(), &[("color", "blue")]),
                with_headers(any.clone(), &[("color", "green")]),
            ],
        ),
    ]);
    for (headers, expected) in [
        (vec![("Version", "one")], "v1"),
        (vec![("version", "two")], "v2"),
        (vec![("VERSION", "two"), ("Color", "orange")], "orange"),
        (vec![("color", "blue")], "blue"),
        (vec![("color", "green")], "blue"),
        (vec![("color", "orange")], "404"),
        (vec![("version", "One")], "404"),
        (vec![("some-other-header", "one")], "404"),
        (vec![], "404"),
        // A second value makes it another header.
        (vec![("version", "one"), ("version", "two")], "404"),
    ] {
        let head = request("GET", "/", &headers);
        assert_eq!(selected(&table, &head), expected, "{headers:?}");
    }
}

/// Conformance: HTTPRouteQueryParamMatching.
#[test]
fn query_parameters_count_last() {
    let any = RequestMatch::any();
    let table = table(vec![
        (
            "whale",
            vec![with_query(any.clone(), &[("animal", "whale")])],
        ),
        (
            "dolphin",
            vec![with_query(any.clone(), &[("animal", "dolphin")])],
        ),
        (
            "blue",
            vec![with_query(
                any.clone(),
                &[("animal", "dolphin"), ("color", "blue")],
            )],
        ),
        ("header", vec![with_headers(any, &[("h", "1")])]),
    ]);
    for (target, expected) in [
        ("/?animal=whale", "whale"),
        ("/?animal=dolphin", "dolphin"),
        ("/?animal=dolphin&color=blue", "blue"),
        ("/?color=blue&animal=dolphin", "blue"),
        ("/?animal=dolphin&color=yellow", "dolphin"),
        ("/?animal=dog", "404"),
        ("/?animal=whaledolphin", "404"),
        ("/?xanimal=whale", "404"),
        ("/?Animal=whale", "404"),
        ("/", "404"),
        // The first of several counts.
        ("/?animal=whale&animal=dolphin", "whale"),
        // Nothing is decoded.
        ("/?animal=w%68ale", "404"),
    ] {
        assert_eq!(selected(&table, &get(target)), expected, "{target}");
    }
    let head = request("GET", "/?animal=dolphin&color=blue", &[("h", "1")]);
    assert_eq!(
        selected(&table, &head),
        "header",
        "headers come before parameters"
    );
}

#[test]
fn a_regular_expression_of_a_path_stands_between_exact_paths_and_prefixes() {
    let regex = |text: &str| RequestMatch::path(PathMatch::Regex(Pattern::new(text).unwrap()));
    let table = table(vec![
        ("prefix", vec![prefix("/items/42")]),
        ("all", vec![prefix("/")]),
        ("short", vec![regex("/i.*")]),
        ("long", vec![regex("/items/[0-9]+")]),
        ("exact", vec![exact("/items/7")]),
    ]);
    for (target, expected) in [
        ("/items/7", "exact"),
        ("/items/42", "long"),
        ("/items/42/x", "short"),
        ("/other", "all"),
    ] {
        assert_eq!(selected(&table, &get(target)), expected, "{target}");
    }
}

#[test]
fn of_equal_matches_the_first_counts() {
    let two = table(vec![("a", vec![prefix("/x")]), ("b", vec![prefix("/x/")])]);
    assert_eq!(selected(&two, &get("/x/y")), "a");
    let two = table(vec![("b", vec![exact("/x")]), ("a", vec![exact("/x")])]);
    assert_eq!(selected(&two, &get("/x")), "b");
}

/// Field notes of others' bypasses: `?`, `#`, `//`, `%2F`, `%5C`, `..`, and case are not what they
/// seem. The path is what was sent, and what was sent is what the application gets.
#[test]
fn a_path_is_matched_as_it_was_sent() {
    let table = table(vec![
        ("exact", vec![exact("/admin")]),
        ("prefix", vec![prefix("/admin/")]),
        ("all", vec![prefix("/")]),
    ]);
    for (target, expected) in [
        ("/admin", "exact"),
        ("/admin?", "exact"),
        ("/admin?a=/b#c", "exact"),
        ("/admin#f", "exact"),
        ("/admin/", "prefix"),
        ("/admin//x", "prefix"),
        ("/admin/../x", "prefix"),
        ("//admin", "all"),
        ("/admin%2Fx", "all"),
        ("/admin%5Cx", "all"),
        ("/%61dmin", "all"),
        ("/ADMIN", "all"),
        ("/x/../admin", "all"),
        ("/admin;x", "all"),
        ("http://web.shop/admin?x", "exact"),
        ("http://web.shop", "all"),
        ("*", "all"),
    ] {
        assert_eq!(selected(&table, &get(target)), expected, "{target}");
    }
    assert_eq!(
        get("/admin#f").uri,
        "/admin",
        "what is passed on has no fragment either"
    );
}

/// Conformance: GRPCExactMethodMatching, GRPCRouteHeaderMatching.
#[test]
fn a_call_is_matched_by_service_method_and_headers() {
    let call = |service: Option<&str>, method: Option<&str>| {
        let exact = |text: &str| ValueMatch::Exact(text.into());
        RequestMatch::grpc(GrpcMatch {
            service: service.map(exact),
            method: method.map(exact),
        })
    };
    let pattern = RequestMatch::grpc(GrpcMatch {
        service: Some(ValueMatch::Regex(
            Pattern::new("shop\\.v[0-9]+\\.Cart").unwrap(),
        )),
        method: None,
    });
    let rules = [
        (
            "headers",
            with_headers(call(None, None), &[("version", "two")]),
        ),
        ("method", call(None, Some("Ping"))),
        ("pattern", pattern),
        ("service", call(Some("shop.v1.Cart"), None)),
        ("call", call(Some("shop.v1.Cart"), Some("Add"))),
    ];
    let rules = rules.map(|(name, one)| rule(RouteKind::Grpc, name, vec![one]));
    let table = RouteTable::new(RouteKind::Grpc, rules);
    let grpc = ("content-type", "application/grpc+proto");
    for (path, headers, expected) in [
        ("/shop.v1.Cart/Add", vec![grpc], "call"),
        ("/shop.v1.Cart/Remove", vec![grpc], "service"),
        ("/shop.v2.Cart/Add", vec![grpc], "pattern"),
        ("/other.Svc/Ping", vec![grpc], "method"),
        ("/other.Svc/Pong", vec![grpc, ("version", "two")], "headers"),
        ("/other.Svc/Pong", vec![grpc], "404"),
        ("/shopxv1.Cart/Add", vec![grpc], "404"),
        ("/shop.v1.Cart/add", vec![grpc], "service"),
        ("/shop.v1.Cart/Add", vec![], "404"),
        (
            "/shop.v1.Cart/Add",
            vec![("content-type", "text/plain")],
            "404",
        ),
    ] {
        let head = request("POST", path, &headers);
        assert_eq!(selected(&table, &head), expected, "{path} {headers:?}");
    }
    let head = request("GET", "/shop.v1.Cart/Add", &[grpc]);
    assert_eq!(selected(&table, &head), "404", "a call is a POST");
}

#[test]
fn an_empty_table_has_no_rule_for_anything() {
    assert_eq!(selected(&table(Vec::new()), &get("/")), "404");
}

/// The definition that the search must agree with.
fn by_definition<'a>(table: &'a RouteTable, head: &Parts) -> Option<Selected<'a>> {
    table
        .rules()
        .find(|selected| selected.matched.matches(head))
}

fn arbitrary_path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "ab", ""]), 0..5)
        .prop_map(|segments| format!("/{}", segments.join("/")))
}

fn arbitrary_match() -> impl Strategy<Value = RequestMatch> {
    let target = prop_oneof![
        arbitrary_path().prop_map(|path| PathMatch::Exact(path.into())),
        arbitrary_path().prop_map(|path| PathMatch::prefix(&path)),
        prop::sample::select(vec!["/a.*", "/[ab]+", "/b/.*"])
            .prop_map(|text| PathMatch::Regex(Pattern::new(text).unwrap())),
    ];
    (target, any::<bool>(), any::<bool>()).prop_map(|(path, method, is_headed)| RequestMatch {
        method: method.then_some(Method::GET),
        headers: if is_headed {
            vec![header("h", "1")]
        } else {
            Vec::new()
        },
        ..RequestMatch::path(path)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_search_finds_what_asking_every_rule_in_order_finds(
        matches in prop::collection::vec(arbitrary_match(), 0..12),
        path in arbitrary_path(),
        is_get in any::<bool>(),
        is_headed in any::<bool>(),
    ) {
        let names: Vec<String> = (0..matches.len()).map(|index| index.to_string()).collect();
        let rules = names.iter().map(String::as_str).zip(matches.into_iter().map(|one| vec![one]));
        let table = table(rules.collect());
        let headers: &[(&str, &str)] = if is_headed { &[("h", "1")] } else { &[] };
        let head = request(if is_get { "GET" } else { "PUT" }, &path, headers);
        let name = |selected: Option<Selected<'_>>| selected.map(|one| one.rule.name.clone());
        prop_assert_eq!(name(table.select(&head)), name(by_definition(&table, &head)));
    }
}
