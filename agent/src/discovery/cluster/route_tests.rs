use std::net::IpAddr;

use http::Request;
use http::request::Parts;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use serde_json::{Value, json};

use super::super::super::object::Object;
use super::super::{Change, Cluster, Outcome};
use super::*;
use crate::mesh::CaptureTarget;
use crate::mesh::route::Truth;

fn service_in(namespace: &str, name: &str, vip: &str, ports: &[u16]) -> Object {
    let ports: Vec<Value> = ports
        .iter()
        .map(|port| json!({"name": format!("p{port}"), "port": port}))
        .collect();
    let manifest = json!({"metadata": {"name": name, "namespace": namespace},
        "spec": {"clusterIP": vip, "ports": ports}});
    Object::Service(serde_json::from_value(manifest).unwrap())
}

fn service(name: &str, last_of_vip: u8) -> Object {
    service_in("shop", name, &format!("10.96.0.{last_of_vip}"), &[80])
}

fn http_in(namespace: &str, name: &str, spec: Value) -> Object {
    let manifest = json!({"metadata": {"name": name, "namespace": namespace, "generation": 3},
        "spec": spec});
    Object::HttpRoute(serde_json::from_value(manifest).unwrap())
}

fn http(name: &str, spec: Value) -> Object {
    http_in("shop", name, spec)
}

fn grpc(name: &str, spec: Value) -> Object {
    let manifest = json!({"metadata": {"name": name, "namespace": "shop"}, "spec": spec});
    Object::GrpcRoute(serde_json::from_value(manifest).unwrap())
}

fn tcp(name: &str, spec: Value) -> Object {
    let manifest = json!({"metadata": {"name": name, "namespace": "shop"}, "spec": spec});
    Object::TcpRoute(serde_json::from_value(manifest).unwrap())
}

fn grant(namespace: &str, from: &str) -> Object {
    let manifest = json!({"metadata": {"name": "g", "namespace": namespace}, "spec": {
        "from": [{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "namespace": from}],
        "to": [{"group": "", "kind": "Service"}]}});
    Object::ReferenceGrant(serde_json::from_value(manifest).unwrap())
}

fn parent(name: &str) -> Value {
    json!({"group": "", "kind": "Service", "name": name})
}

fn to(name: &str) -> Value {
    json!({"name": name, "port": 80})
}

/// A route of one rule that sends everything for this Service to another.
fn detour(name: &str, parent_name: &str, backend: &str) -> Object {
    http(
        name,
        json!({"parentRefs": [parent(parent_name)], "rules": [{"backendRefs": [to(backend)]}]}),
    )
}

fn put(cluster: &mut Cluster, objects: impl IntoIterator<Item = Object>) -> Outcome {
    cluster.apply(objects.into_iter().map(Change::Put))
}

fn delete(cluster: &mut Cluster, object: &Object) -> Outcome {
    cluster.apply([Change::Delete(object.key())])
}

fn get(path: &str) -> Parts {
    Request::get(path).body(()).unwrap().into_parts().0
}

fn name(text: &str) -> ObjectName {
    let (namespace, name) = text.split_once('/').unwrap();
    ObjectName::new(namespace, name)
}

/// Where a GET of this path goes for a client of this namespace: `-` without a route, `404` without
/// a rule, `500` without a backend.
fn destination(cluster: &Cluster, service: &str, port: u16, client: &str, path: &str) -> String {
    let Some(table) = cluster.snapshot().routes(&name(service), port, client) else {
        return "-".to_owned();
    };
    let Some(selected) = table.select(&get(path)) else {
        return "404".to_owned();
    };
    match selected.rule.choose(None, &mut SmallRng::seed_from_u64(1)) {
        Some(backend) => backend.target.to_string(),
        None => "500".to_owned(),
    }
}

fn web(cluster: &Cluster, path: &str) -> String {
    destination(cluster, "shop/web", 80, "shop", path)
}

/// Conditions of the route's only parent, as `type=status reason: message`.
fn conditions(cluster: &Cluster, kind: RouteKind, route: &str) -> Vec<String> {
    let id = RouteId {
        kind,
        name: name(route),
    };
    let status = cluster.snapshot().route_status(&id).unwrap();
    assert_eq!(status.parents.len(), 1, "{status:?}");
    let conditions = status.parents[0].conditions.iter();
    conditions
        .map(|one| {
            format!(
                "{:?}={:?} {}: {}",
                one.kind, one.status, one.reason, one.message
            )
        })
        .collect()
}

const FINE: [&str; 2] = [
    "Accepted=True Accepted: in force",
    "ResolvedRefs=True ResolvedRefs: all backends are there",
];

#[test]
fn a_route_takes_the_requests_of_its_service_and_gives_them_back() {
    let mut cluster = Cluster::new("node-a");
    put(&mut cluster, [service("web", 1), service("v2", 2)]);
    assert_eq!(web(&cluster, "/"), "-");
    let route = detour("r", "web", "v2");
    put(&mut cluster, [route.clone()]);
    assert_eq!(web(&cluster, "/"), "shop/v2:80");
    assert_eq!(conditions(&cluster, RouteKind::Http, "shop/r"), FINE);
    assert_eq!(put(&mut cluster, [route.clone()]), Outcome::Unchanged);
    delete(&mut cluster, &route);
    assert_eq!(web(&cluster, "/"), "-");
    assert_eq!(cluster.snapshot().route_statuses().count(), 0);
}

#[test]
fn objects_may_come_in_any_order() {
    let objects = [
        service("web", 1),
        service("v2", 2),
        detour("r", "web", "v2"),
    ];
    for order in [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ] {
        let mut cluster = Cluster::new("node-a");
        for index in order {
            put(&mut cluster, [objects[index].clone()]);
        }
        assert_eq!(web(&cluster, "/"), "shop/v2:80", "{order:?}");
        assert_eq!(conditions(&cluster, RouteKind::Http, "shop/r"), FINE);
    }
}

#[test]
fn a_backend_that_is_not_there_is_invalid_until_it_is() {
    let mut cluster = Cluster::new("node-a");
    put(&mut cluster, [service("web", 1), detour("r", "web", "v2")]);
    assert_eq!(web(&cluster, "/"), "invalid: BackendNotFound");
    assert_eq!(
        conditions(&cluster, RouteKind::Http, "shop/r")[1],
        "ResolvedRefs=False BackendNotFound: \
         spec.rules[0].backendRefs[0]: there is no Service shop/v2"
    );
    put(&mut cluster, [service_in("shop", "v2", "10.96.0.2", &[81])]);
    assert_eq!(
        conditions(&cluster, RouteKind::Http, "shop/r")[1],
        "ResolvedRefs=False BackendNotFound: \
         spec.rules[0].backendRefs[0]: Service shop/v2 has no TCP port 80"
    );
    put(&mut cluster, [service("v2", 2)]);
    assert_eq!(web(&cluster, "/"), "shop/v2:80");
    delete(&mut cluster, &service("v2", 2));
    assert_eq!(web(&cluster, "/"), "invalid: BackendNotFound");
}

#[test]
fn a_backend_of_another_kind_is_invalid() {
    let mut cluster = Cluster::new("node-a");
    let backend = json!({"group": "example.com", "kind": "Bucket", "name": "b"});
    let spec = json!({"parentRefs": [parent("web")], "rules": [{"backendRefs": [backend]}]});
    put(&mut cluster, [service("web", 1), http("r", spec)]);
    assert_eq!(web(&cluster, "/"), "invalid: InvalidKind");
    assert_eq!(
        conditions(&cluster, RouteKind::Http, "shop/r")[1],
        "ResolvedRefs=False InvalidKind: spec.rules[0].backendRefs[0]: \
         example.com/Bucket is no backend of a mesh: a Service is"
    );
}

#[test]
fn a_backend_of_another_namespace_needs_a_grant_of_that() {
    let mut cluster = Cluster::new("node-a");
    let backend = json!({"name": "pay", "namespace": "bank", "port": 80});
    let spec = json!({"parentRefs": [parent("web")], "rules": [{"backendRefs": [backend]}]});
    let pay = service_in("bank", "pay", "10.96.1.1", &[80]);
    put(&mut cluster, [service("web", 1), pay, http("r", spec)]);
    assert_eq!(web(&cluster, "/"), "invalid: RefNotPermitted");
    assert_eq!(
        conditions(&cluster, RouteKind::Http, "shop/r")[1],
        "ResolvedRefs=False RefNotPermitted: spec.rules[0].backendRefs[0]: \
         no ReferenceGrant of bank permits Service bank/pay"
    );
    put(&mut cluster, [grant("bank", "other")]);
    assert_eq!(web(&cluster, "/"), "invalid: RefNotPermitted");
    put(&mut cluster, [grant("bank", "shop")]);
    assert_eq!(web(&cluster, "/"), "bank/pay:80");
    assert_eq!(conditions(&cluster, RouteKind::Http, "shop/r"), FINE);
    delete(&mut cluster, &grant("bank", "shop"));
    assert_eq!(web(&cluster, "/"), "invalid: RefNotPermitted");
}

/// Conformance: MeshConsumerRoute.
#[test]
fn a_consumer_route_is_for_clients_of_its_namespace_and_wins_there() {
    let mut cluster = Cluster::new("node-a");
    let parent_of_shop =
        json!({"group": "", "kind": "Service", "name": "web", "namespace": "shop"});
    let consumer = http_in(
        "front",
        "r",
        json!({"parentRefs": [parent_of_shop], "rules": [{
            "matches": [{"path": {"type": "Exact", "value": "/only"}}],
            "backendRefs": [{"name": "web", "namespace": "shop", "port": 80}]}]}),
    );
    put(
        &mut cluster,
        [service("web", 1), service("v2", 2), consumer.clone()],
    );
    let at = |cluster: &Cluster, client: &str, path: &str| {
        destination(cluster, "shop/web", 80, client, path)
    };
    // What its clients asked for anyway needs no grant.
    assert_eq!(at(&cluster, "front", "/only"), "shop/web:80");
    assert_eq!(at(&cluster, "front", "/"), "404");
    assert_eq!(at(&cluster, "shop", "/only"), "-");
    put(&mut cluster, [detour("producer", "web", "v2")]);
    assert_eq!(
        at(&cluster, "front", "/"),
        "404",
        "the producer's rules do not mix in"
    );
    assert_eq!(at(&cluster, "shop", "/only"), "shop/v2:80");
    assert_eq!(at(&cluster, "third", "/only"), "shop/v2:80");
    delete(&mut cluster, &consumer);
    assert_eq!(at(&cluster, "front", "/only"), "shop/v2:80");
}

#[test]
fn a_route_that_is_not_only_its_own_clients_affair_needs_a_grant_for_its_parent_too() {
    let mut cluster = Cluster::new("node-a");
    let spec = json!({
        "parentRefs": [
            {"group": "", "kind": "Service", "name": "web", "namespace": "shop"},
            {"group": "", "kind": "Service", "name": "own"}],
        "rules": [{"backendRefs": [{"name": "web", "namespace": "shop", "port": 80}]}]});
    let own = service_in("front", "own", "10.96.2.1", &[80]);
    put(
        &mut cluster,
        [service("web", 1), own, http_in("front", "r", spec)],
    );
    assert_eq!(
        destination(&cluster, "front/own", 80, "shop", "/"),
        "invalid: RefNotPermitted"
    );
}

/// Conformance: MeshPorts.
#[test]
fn a_route_is_for_the_ports_that_its_parent_reference_names() {
    let mut cluster = Cluster::new("node-a");
    let web = service_in("shop", "web", "10.96.0.1", &[80, 8080]);
    let with = |port: Value| {
        let mut reference = parent("web");
        reference
            .as_object_mut()
            .unwrap()
            .extend(port.as_object().unwrap().clone());
        http(
            "r",
            json!({"parentRefs": [reference], "rules": [{"backendRefs": [to("web")]}]}),
        )
    };
    let taken = |cluster: &Cluster| {
        [80, 8080].map(|port| destination(cluster, "shop/web", port, "shop", "/") != "-")
    };
    put(&mut cluster, [web]);
    for (port, expected) in [
        (json!({}), [true, true]),
        (json!({"port": 80}), [true, false]),
        (json!({"sectionName": "p8080"}), [false, true]),
        (json!({"port": 80, "sectionName": "p80"}), [true, false]),
        (json!({"port": 80, "sectionName": "p8080"}), [false, false]),
        (json!({"port": 81}), [false, false]),
    ] {
        put(&mut cluster, [with(port.clone())]);
        assert_eq!(taken(&cluster), expected, "{port}");
    }
    assert_eq!(
        conditions(&cluster, RouteKind::Http, "shop/r")[0],
        "Accepted=False NoMatchingParent: Service shop/web has no such TCP port"
    );
    put(
        &mut cluster,
        [service_in("shop", "web", "10.96.0.1", &[80, 81])],
    );
    assert_eq!(
        destination(&cluster, "shop/web", 81, "shop", "/"),
        "shop/web:80"
    );
}

#[test]
fn parents_that_are_no_services_are_not_ours() {
    let mut cluster = Cluster::new("node-a");
    let spec = json!({
        "parentRefs": [{"name": "web"}, {"group": "example.com", "kind": "Service", "name": "web"}],
        "rules": [{"backendRefs": [to("web")]}]});
    put(&mut cluster, [service("web", 1), http("r", spec)]);
    assert_eq!(web(&cluster, "/"), "-");
    let statuses: Vec<_> = cluster.snapshot().route_statuses().collect();
    assert_eq!(statuses.len(), 1);
    assert!(statuses[0].parents.is_empty());
}

#[test]
fn a_parent_that_is_not_there_or_has_no_address_is_not_accepted() {
    let mut cluster = Cluster::new("node-a");
    put(&mut cluster, [detour("r", "web", "web")]);
    assert_eq!(
        conditions(&cluster, RouteKind::Http, "shop/r")[0],
        "Accepted=False NoMatchingParent: there is no Service shop/web"
    );
    put(&mut cluster, [service_in("shop", "web", "None", &[80])]);
    assert_eq!(
        conditions(&cluster, RouteKind::Http, "shop/r")[0],
        "Accepted=False UnsupportedValue: \
         Service shop/web has no address of its own that could be matched"
    );
}

/// GEP-1294, "Route types".
#[test]
fn of_several_kinds_on_one_port_one_is_in_force_and_the_others_say_so() {
    let mut cluster = Cluster::new("node-a");
    let web_service = service_in("shop", "web", "10.96.0.1", &[80, 81]);
    let calls = grpc(
        "g",
        json!({"parentRefs": [{"group": "", "kind": "Service", "name": "web", "port": 80}],
            "rules": [{"backendRefs": [to("web")]}]}),
    );
    let streams = tcp(
        "t",
        json!({"parentRefs": [parent("web")], "rules": [{"backendRefs": [to("web")]}]}),
    );
    put(
        &mut cluster,
        [
            web_service,
            calls.clone(),
            detour("h", "web", "web"),
            streams,
        ],
    );
    let kind = |cluster: &Cluster, port| {
        let routes = cluster.snapshot().routes_of(&name("shop/web")).unwrap();
        routes.attached(port, "shop").map(Attached::kind)
    };
    assert_eq!(kind(&cluster, 80), Some(RouteKind::Grpc));
    assert_eq!(kind(&cluster, 81), Some(RouteKind::Http));
    assert_eq!(conditions(&cluster, RouteKind::Grpc, "shop/g"), FINE);
    assert_eq!(
        conditions(&cluster, RouteKind::Http, "shop/h")[0],
        "Accepted=True Accepted: in force, but port 80 has a GRPCRoute"
    );
    assert_eq!(
        conditions(&cluster, RouteKind::Tcp, "shop/t")[0],
        "Accepted=False Conflicted: port 80 has a GRPCRoute, port 81 has a HTTPRoute"
    );
    delete(&mut cluster, &calls);
    assert_eq!(kind(&cluster, 80), Some(RouteKind::Http));
    assert_eq!(conditions(&cluster, RouteKind::Http, "shop/h"), FINE);
}

#[test]
fn of_equal_matches_that_of_the_oldest_route_counts_then_the_first_by_name() {
    let aged = |name: &str, created: Option<&str>, backend: &str| {
        let mut metadata = json!({"name": name, "namespace": "shop"});
        if let Some(created) = created {
            metadata["creationTimestamp"] = created.into();
        }
        let manifest = json!({"metadata": metadata, "spec": {
            "parentRefs": [parent("web")], "rules": [{"backendRefs": [to(backend)]}]}});
        Object::HttpRoute(serde_json::from_value(manifest).unwrap())
    };
    let services = [service("web", 1), service("v1", 2), service("v2", 3)];
    let mut cluster = Cluster::new("node-a");
    put(&mut cluster, services);
    put(&mut cluster, [aged("b", None, "v2"), aged("a", None, "v1")]);
    assert_eq!(web(&cluster, "/"), "shop/v1:80");
    put(
        &mut cluster,
        [aged("b", Some("2026-01-02T00:00:00Z"), "v2")],
    );
    assert_eq!(web(&cluster, "/"), "shop/v2:80");
    put(
        &mut cluster,
        [aged("a", Some("2026-01-01T00:00:00Z"), "v1")],
    );
    assert_eq!(web(&cluster, "/"), "shop/v1:80");
}

#[test]
fn a_refused_version_leaves_the_former_in_force_and_the_condition_says_why() {
    let mut cluster = Cluster::new("node-a");
    put(
        &mut cluster,
        [
            service("web", 1),
            service("v2", 2),
            detour("r", "web", "v2"),
        ],
    );
    let wrong = http(
        "r",
        json!({"parentRefs": [parent("web")], "rules": [{
            "matches": [{"path": {"type": "RegularExpression", "value": "/("}}],
            "backendRefs": [to("web")]}]}),
    );
    put(&mut cluster, [wrong.clone()]);
    assert_eq!(web(&cluster, "/"), "shop/v2:80");
    let reason = "spec.rules[0].matches[0].path.value: \
        \"/(\" is not a regular expression: unclosed group";
    assert_eq!(
        conditions(&cluster, RouteKind::Http, "shop/r"),
        [
            FINE[0].to_owned(),
            FINE[1].to_owned(),
            format!(
                "PartiallyInvalid=True UnsupportedValue: Fall Back to the former version: {reason}"
            )
        ]
    );
    put(&mut cluster, [detour("r", "web", "v2")]);
    assert_eq!(conditions(&cluster, RouteKind::Http, "shop/r"), FINE);
    delete(&mut cluster, &wrong);
    put(&mut cluster, [wrong]);
    assert_eq!(web(&cluster, "/"), "-");
    assert_eq!(
        conditions(&cluster, RouteKind::Http, "shop/r"),
        [format!("Accepted=False UnsupportedValue: {reason}")]
    );
}

#[test]
fn a_port_with_a_route_is_captured_without_a_meshed_endpoint() {
    let mut cluster = Cluster::new("node-a");
    let target = |port| CaptureTarget {
        address: "10.96.0.1".parse::<IpAddr>().unwrap(),
        port: Some(port),
    };
    put(
        &mut cluster,
        [service_in("shop", "web", "10.96.0.1", &[80, 81])],
    );
    let before = cluster.snapshot().clone();
    assert!(!before.captures(&target(80)));
    let route = http(
        "r",
        json!({"parentRefs": [{"group": "", "kind": "Service", "name": "web", "port": 80}],
            "rules": [{"backendRefs": [to("web")]}]}),
    );
    put(&mut cluster, [route.clone()]);
    assert!(cluster.snapshot().captures(&target(80)));
    assert!(!cluster.snapshot().captures(&target(81)));
    // The Service changes while it has the route: nothing is counted twice.
    put(
        &mut cluster,
        [service_in("shop", "web", "10.96.0.1", &[80])],
    );
    delete(&mut cluster, &route);
    assert!(cluster.snapshot().target_changes_since(&before).is_empty());
}

#[test]
fn what_a_change_does_not_concern_stays_the_same_object() {
    let mut cluster = Cluster::new("node-a");
    put(
        &mut cluster,
        [
            service("web", 1),
            service("other", 2),
            service("v2", 3),
            detour("r", "web", "v2"),
            detour("s", "other", "v2"),
        ],
    );
    let table = |cluster: &Cluster, service: &str| {
        cluster
            .snapshot()
            .routes(&name(service), 80, "shop")
            .unwrap()
    };
    let (web, other) = (table(&cluster, "shop/web"), table(&cluster, "shop/other"));
    put(&mut cluster, [detour("r", "web", "other")]);
    assert!(!Arc::ptr_eq(&web, &table(&cluster, "shop/web")));
    assert!(Arc::ptr_eq(&other, &table(&cluster, "shop/other")));
    // Endpoints that come and go are none of a route's business.
    let pod = json!({"metadata": {"name": "p", "namespace": "shop"},
        "spec": {"nodeName": "node-a", "containers": []}, "status": {"podIPs": [{"ip": "10.0.0.1"}]}});
    let slice = json!({"metadata": {"name": "e", "namespace": "shop",
            "labels": {"kubernetes.io/service-name": "v2"}},
        "addressType": "IPv4", "ports": [{"name": "p80", "port": 8080}],
        "endpoints": [{"addresses": ["10.0.0.1"]}]});
    put(
        &mut cluster,
        [
            Object::Pod(serde_json::from_value(pod).unwrap()),
            Object::EndpointSlice(serde_json::from_value(slice).unwrap()),
        ],
    );
    assert!(Arc::ptr_eq(&other, &table(&cluster, "shop/other")));
}

#[test]
fn weights_of_zero_and_host_names_are_noted() {
    let mut cluster = Cluster::new("node-a");
    let spec = json!({"hostnames": ["a.example"], "parentRefs": [parent("web")],
        "rules": [{"backendRefs": [{"name": "web", "port": 80, "weight": 0}]}]});
    put(&mut cluster, [service("web", 1), http("r", spec)]);
    assert_eq!(web(&cluster, "/"), "500");
    let status = cluster.snapshot().route_statuses().next().unwrap();
    let notes: Vec<&str> = status.notes.iter().map(|note| &**note).collect();
    assert_eq!(
        notes,
        [
            "spec.hostnames: mean nothing in a mesh",
            "spec.rules[0].backendRefs: every weight is 0: the answer is 500"
        ]
    );
    assert_eq!(status.observed_generation, Some(3));
    assert_eq!(status.parents[0].conditions[0].status, Truth::True);
}

#[test]
fn streams_go_by_weight_to_what_is_there() {
    let mut cluster = Cluster::new("node-a");
    let spec = json!({"parentRefs": [parent("web")], "rules": [{"backendRefs": [
        {"name": "web", "port": 80, "weight": 3}, {"name": "gone", "port": 80, "weight": 1}]}]});
    put(&mut cluster, [service("web", 1), tcp("t", spec)]);
    assert!(
        cluster
            .snapshot()
            .routes(&name("shop/web"), 80, "shop")
            .is_none()
    );
    let routes = cluster
        .snapshot()
        .stream_routes(&name("shop/web"), 80, "x")
        .unwrap();
    let rule = routes.select(None).unwrap();
    let mut rng = SmallRng::seed_from_u64(7);
    let invalid = (0..4000)
        .filter(|_| {
            let target = &rule.choose(&mut rng).unwrap().target;
            matches!(target, BackendTarget::Invalid { .. })
        })
        .count();
    assert!((900..1100).contains(&invalid), "{invalid}");
}
