use serde_json::{Value, json};

use super::super::route::RouteRules;
use super::*;

fn facts(spec: Value) -> Result<RouteFacts, Fault> {
    let manifest = json!({"metadata": {"name": "cart", "namespace": "shop"}, "spec": spec});
    RouteFacts::of_grpc(&serde_json::from_value(manifest).unwrap())
}

fn matches(given: Value) -> Vec<String> {
    let facts = facts(json!({"rules": [{"matches": given}]})).unwrap();
    let RouteRules::Requests(rules) = facts.rules else {
        panic!("a GRPCRoute has rules for requests");
    };
    rules[0].matches.iter().map(ToString::to_string).collect()
}

#[test]
fn services_and_methods_are_taken_exactly_or_as_expressions() {
    assert_eq!(matches(json!([])), ["/*/*"]);
    assert_eq!(
        matches(json!([
            {"method": {"service": "shop.v1.Cart", "method": "Add"}},
            {"method": {"service": "shop.v1.Cart"}},
            {"method": {"service": "", "method": "Add"}},
            {"method": {"type": "RegularExpression", "service": "shop\\..*"}},
            {"headers": [{"name": "version", "value": "two"}]}])),
        [
            "/shop.v1.Cart/Add",
            "/shop.v1.Cart/*",
            "/*/Add",
            "/~\"shop\\\\..*\"/*",
            "/*/* version=two"
        ]
    );
}

#[test]
fn each_wrong_match_is_refused_with_its_field_and_reason() {
    for (method, expected) in [
        (json!({}), ": has neither service nor method"),
        (
            json!({"service": "", "method": ""}),
            ": has neither service nor method",
        ),
        (
            json!({"service": "a/b"}),
            ".service: \"a/b\" is not the name of a gRPC service",
        ),
        (
            json!({"service": "a..b"}),
            ".service: \"a..b\" is not the name of a gRPC service",
        ),
        (
            json!({"method": "Add/x"}),
            ".method: \"Add/x\" is not the name of a gRPC method",
        ),
        (
            json!({"type": "RegularExpression", "method": "("}),
            ".method: \"(\" is not a regular expression: unclosed group",
        ),
    ] {
        let fault = facts(json!({"rules": [{"matches": [{"method": method}]}]})).unwrap_err();
        let refused = format!("{}: {}", fault.field, fault.reason);
        let at = "spec.rules[0].matches[0].method";
        assert_eq!(refused, format!("{at}{expected}"));
    }
}

#[test]
fn backends_filters_and_sessions_are_those_of_http() {
    let facts = facts(json!({"rules": [{"name": "r",
        "filters": [{"type": "RequestMirror",
            "requestMirror": {"backendRef": {"name": "copy", "port": 80}}}],
        "sessionPersistence": {},
        "backendRefs": [{"name": "v1", "port": 80, "weight": 0}]}]}))
    .unwrap();
    let fields: Vec<&str> = facts.references().map(|one| one.field.as_str()).collect();
    assert_eq!(
        fields,
        [
            "spec.rules[0].filters[0].requestMirror.backendRef",
            "spec.rules[0].backendRefs[0]"
        ]
    );
    assert_eq!(
        &*facts.notes[0],
        "spec.rules[0].backendRefs: every weight is 0: the answer is UNAVAILABLE"
    );
    let RouteRules::Requests(rules) = &facts.rules else {
        panic!("a GRPCRoute has rules for requests");
    };
    assert!(rules[0].session.is_some());
}
