use serde_json::{Value, json};

use super::*;

fn tls(spec: Value) -> Result<RouteFacts, Fault> {
    let manifest = json!({"metadata": {"name": "db", "namespace": "shop"}, "spec": spec});
    RouteFacts::of_tls(&serde_json::from_value(manifest).unwrap())
}

fn tcp(spec: Value) -> Result<RouteFacts, Fault> {
    let manifest = json!({"metadata": {"name": "db", "namespace": "shop"}, "spec": spec});
    RouteFacts::of_tcp(&serde_json::from_value(manifest).unwrap())
}

fn rules(facts: RouteFacts) -> Vec<StreamRuleFacts> {
    match facts.rules {
        RouteRules::Streams(rules) => rules,
        RouteRules::Requests(_) => panic!("has rules for streams"),
    }
}

#[test]
fn a_tls_route_has_host_names_and_a_tcp_route_has_none() {
    let spec = json!({"hostnames": ["db.example.com", "*.example.org"],
        "rules": [{"backendRefs": [{"name": "v1", "port": 80, "weight": 3}]}]});
    let of_tls = rules(tls(spec.clone()).unwrap());
    let hostnames: Vec<&str> = of_tls[0].hostnames.iter().map(|name| &**name).collect();
    assert_eq!(hostnames, ["db.example.com", "*.example.org"]);
    assert_eq!(of_tls[0].backends[0].weight, 3);
    assert_eq!(&*of_tls[0].name, "TLSRoute/shop/db/0");
    let of_tcp = rules(tcp(spec).unwrap());
    assert!(of_tcp[0].hostnames.is_empty());
    assert_eq!(&*of_tcp[0].name, "TCPRoute/shop/db/0");
}

#[test]
fn a_wrong_host_name_is_refused() {
    for name in [
        "",
        "*",
        "a.*.com",
        "*.*.com",
        "10.0.0.1",
        "Db.example.com",
        "a b",
    ] {
        let fault = tls(json!({"hostnames": [name], "rules": []})).unwrap_err();
        let reason = format!("{name:?} is not a host name");
        assert_eq!(fault, Fault::new("spec.hostnames[0]", reason));
    }
}

#[test]
fn rules_that_nothing_reaches_are_noted() {
    let backends = json!([{"name": "v1", "port": 80, "weight": 0}]);
    let facts = tcp(json!({"rules": [{"backendRefs": backends}, {"backendRefs": backends}]}));
    let notes: Vec<_> = facts.unwrap().notes;
    let notes: Vec<&str> = notes.iter().map(|note| &**note).collect();
    assert_eq!(
        notes,
        [
            "spec.rules[0].backendRefs: every weight is 0: connections are refused",
            "spec.rules[1].backendRefs: every weight is 0: connections are refused",
            "spec.rules: only the first is ever chosen"
        ]
    );
}
