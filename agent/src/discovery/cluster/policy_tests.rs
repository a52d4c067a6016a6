use std::time::Duration;

use serde_json::{Value, json};

use super::super::super::object::Object;
use super::super::{Change, Cluster, Outcome};
use super::*;
use crate::mesh::CaptureTarget;
use crate::mesh::route::RouteKind;
use crate::resilience::Fallback;

fn service(name: &str, last_of_vip: u8) -> Object {
    let manifest = json!({ "metadata": { "name": name, "namespace": "shop" },
        "spec": { "clusterIP": format!("10.96.0.{last_of_vip}"),
                  "ports": [{ "name": "http", "port": 80 }, { "name": "admin", "port": 81 }] } });
    Object::Service(serde_json::from_value(manifest).unwrap())
}

fn route(name: &str) -> Object {
    let manifest = json!({ "metadata": { "name": name, "namespace": "shop" }, "spec": {
        "parentRefs": [{ "group": "", "kind": "Service", "name": "cart" }],
        "rules": [{ "backendRefs": [{ "name": "cart", "port": 80 }] }] } });
    Object::HttpRoute(serde_json::from_value(manifest).unwrap())
}

fn on_service(name: &str) -> Value {
    json!({ "kind": "Service", "name": name })
}

fn on_port(name: &str, port: &str) -> Value {
    json!({ "kind": "Service", "name": name, "sectionName": port })
}

fn on_route(name: &str) -> Value {
    json!({ "group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "name": name })
}

fn policy_of_age(name: &str, created: Option<&str>, targets: &[Value], fields: Value) -> Object {
    let mut spec = fields;
    spec["targetRefs"] = json!(targets);
    let manifest = json!({
        "apiVersion": "undermesh.io/v1alpha1", "kind": "TrafficPolicy",
        "metadata": { "name": name, "namespace": "shop", "generation": 4,
                      "creationTimestamp": created },
        "spec": spec });
    Object::TrafficPolicy(serde_json::from_value(manifest).unwrap())
}

fn policy(name: &str, targets: &[Value], fields: Value) -> Object {
    policy_of_age(name, None, targets, fields)
}

fn backend_policy(name: &str, service: &str, percent: u32) -> Object {
    let manifest = json!({
        "apiVersion": "gateway.networking.x-k8s.io/v1alpha1", "kind": "XBackendTrafficPolicy",
        "metadata": { "name": name, "namespace": "shop" },
        "spec": { "targetRefs": [{ "group": "", "kind": "Service", "name": service }],
                  "retryConstraint": { "budget": { "percent": percent } } } });
    Object::XBackendTrafficPolicy(serde_json::from_value(manifest).unwrap())
}

fn fall_back_to(service: &str) -> Value {
    json!({ "fallback": { "backend": { "name": service, "port": 80 } } })
}

fn put(cluster: &mut Cluster, objects: impl IntoIterator<Item = Object>) -> Outcome {
    cluster.apply(objects.into_iter().map(Change::Put))
}

fn delete(cluster: &mut Cluster, object: &Object) -> Outcome {
    cluster.apply([Change::Delete(object.key())])
}

fn cluster(objects: impl IntoIterator<Item = Object>) -> Cluster {
    let mut cluster = Cluster::new("node-a");
    put(&mut cluster, objects);
    cluster
}

fn name(name: &str) -> ObjectName {
    ObjectName::new("shop", name)
}

fn http_route(route: &str) -> RouteId {
    RouteId {
        kind: RouteKind::Http,
        name: name(route),
    }
}

/// The probes of the breaker: a number to tell policies apart by.
fn probes(cluster: &Cluster, service: &str, port: u16, route: Option<&str>) -> u32 {
    let route = route.map(http_route);
    let snapshot = cluster.snapshot();
    let policy = snapshot.policy_of(&name(service), port, route.as_ref());
    policy.settings.breaker.probes
}

fn probe(count: u32) -> Value {
    json!({ "breaker": { "probes": count } })
}

/// `type=status reason: message` of the conditions for a target.
fn conditions(cluster: &Cluster, policy: &str, target: usize) -> Vec<String> {
    let id = PolicyId {
        kind: PolicyKind::TrafficPolicy,
        name: name(policy),
    };
    let status = cluster.snapshot().policy_status(&id).unwrap();
    status.ancestors[target]
        .conditions
        .iter()
        .map(|one| {
            let (kind, status) = (one.kind, one.status);
            format!("{kind:?}={status:?} {}: {}", one.reason, one.message)
        })
        .collect()
}

const DEFAULT: u32 = 3;
const IN_FORCE: &str = "Accepted=True Accepted: is in force";

#[test]
fn the_policy_of_a_route_comes_before_that_of_the_port_and_that_before_the_services() {
    let mut cluster = cluster([service("cart", 1), route("main")]);
    assert_eq!(probes(&cluster, "cart", 80, Some("main")), DEFAULT);
    let steps = [
        (policy("whole", &[on_service("cart")], probe(5)), 5, 5, 5),
        (
            policy("port", &[on_port("cart", "http")], probe(6)),
            6,
            6,
            5,
        ),
        (policy("route", &[on_route("main")], probe(7)), 7, 6, 5),
    ];
    for (object, on_route, on_port, elsewhere) in steps {
        assert_eq!(put(&mut cluster, [object]), Outcome::Changed);
        assert_eq!(probes(&cluster, "cart", 80, Some("main")), on_route);
        assert_eq!(probes(&cluster, "cart", 80, None), on_port);
        assert_eq!(probes(&cluster, "cart", 81, None), elsewhere);
    }
    for policy in ["whole", "port", "route"] {
        assert_eq!(conditions(&cluster, policy, 0), [IN_FORCE]);
    }
    let route = policy("route", &[on_route("main")], json!({}));
    delete(&mut cluster, &route);
    assert_eq!(probes(&cluster, "cart", 80, Some("main")), 6);
}

#[test]
fn a_policy_keeps_its_address_as_long_as_nothing_about_it_changes() {
    let mut cluster = cluster([
        service("cart", 1),
        route("main"),
        policy("whole", &[on_service("cart")], probe(5)),
        policy("route", &[on_route("main")], probe(7)),
    ]);
    let of = |cluster: &Cluster, route: Option<&RouteId>| {
        cluster.snapshot().policy_of(&name("cart"), 80, route)
    };
    let route_id = http_route("main");
    let (before, before_on_route) = (of(&cluster, None), of(&cluster, Some(&route_id)));
    put(&mut cluster, [service("other", 2)]);
    assert!(Arc::ptr_eq(&before, &of(&cluster, None)));
    assert!(Arc::ptr_eq(
        &before_on_route,
        &of(&cluster, Some(&route_id))
    ));
    put(
        &mut cluster,
        [policy("whole", &[on_service("cart")], probe(6))],
    );
    assert!(!Arc::ptr_eq(&before, &of(&cluster, None)));
    assert_eq!(before_on_route.settings.breaker.probes, 7);
}

#[test]
fn of_two_policies_with_one_target_the_older_is_in_force_and_the_other_says_why_not() {
    let older = Some("2026-01-01T00:00:00Z");
    let newer = Some("2026-02-01T00:00:00Z");
    let target = [on_service("cart")];
    let a = policy_of_age("a", newer, &target, probe(5));
    let b = policy_of_age("b", older, &target, probe(6));
    for order in [[a.clone(), b.clone()], [b.clone(), a.clone()]] {
        let mut cluster = cluster([service("cart", 1)]);
        for object in order {
            put(&mut cluster, [object]);
        }
        assert_eq!(probes(&cluster, "cart", 80, None), 6);
        let refused = "Accepted=False Conflicted: spec.targetRefs[0]: TrafficPolicy/shop/b has \
                       this target, and comes first";
        assert_eq!(conditions(&cluster, "a", 0), [refused]);
        assert_eq!(conditions(&cluster, "b", 0), [IN_FORCE]);
        delete(&mut cluster, &b);
        assert_eq!(probes(&cluster, "cart", 80, None), 5);
        assert_eq!(conditions(&cluster, "a", 0), [IN_FORCE]);
    }
}

#[test]
fn a_policy_waits_for_its_target() {
    let targets = [
        on_service("cart"),
        on_port("cart", "grpc"),
        on_route("main"),
    ];
    let mut cluster = cluster([policy("early", &targets, probe(5))]);
    let waits = |cluster: &Cluster| -> Vec<String> {
        let each = (0..3).map(|target| conditions(cluster, "early", target).remove(0));
        each.collect()
    };
    assert_eq!(
        waits(&cluster),
        [
            "Accepted=False TargetNotFound: spec.targetRefs[0]: there is no Service shop/cart",
            "Accepted=False TargetNotFound: spec.targetRefs[1]: there is no Service shop/cart",
            "Accepted=False TargetNotFound: spec.targetRefs[2]: there is no HTTPRoute shop/main",
        ]
    );
    put(&mut cluster, [service("cart", 1), route("main")]);
    assert_eq!(
        waits(&cluster),
        [
            IN_FORCE,
            "Accepted=False TargetNotFound: spec.targetRefs[1]: Service shop/cart has no TCP port \
             \"grpc\"",
            IN_FORCE,
        ]
    );
    assert_eq!(probes(&cluster, "cart", 80, None), 5);
    delete(&mut cluster, &service("cart", 1));
    delete(&mut cluster, &route("main"));
    assert!(
        waits(&cluster)
            .iter()
            .all(|one| one.contains("TargetNotFound"))
    );
    assert_eq!(probes(&cluster, "cart", 80, Some("main")), DEFAULT);
}

#[test]
fn a_version_that_is_refused_leaves_the_one_before_in_force() {
    let target = [on_service("cart")];
    let mut cluster = cluster([service("cart", 1), policy("one", &target, probe(5))]);
    put(&mut cluster, [policy("one", &target, probe(0))]);
    assert_eq!(probes(&cluster, "cart", 80, None), 5);
    let id = PolicyId {
        kind: PolicyKind::TrafficPolicy,
        name: name("one"),
    };
    let refused = cluster.rejection(&ObjectKey::from(&id)).unwrap();
    assert_eq!(
        refused.to_string(),
        "TrafficPolicy shop/one: spec.breaker.probes: must be from 1 to 1000, is 0"
    );
    let status = cluster.snapshot().policy_status(&id).unwrap();
    let rejection = status.rejection.as_deref();
    let reason = "spec.breaker.probes: must be from 1 to 1000, is 0";
    assert_eq!(rejection, Some(reason));
    assert_eq!(status.spec["breaker"]["probes"], 5);
    put(&mut cluster, [policy("one", &target, probe(6))]);
    let status = cluster.snapshot().policy_status(&id).unwrap();
    assert_eq!(status.rejection, None);
    assert_eq!(probes(&cluster, "cart", 80, None), 6);
}

#[test]
fn a_policy_that_was_never_in_force_has_a_status_that_says_why() {
    let mut cluster = cluster([service("cart", 1)]);
    let bad = policy("one", &[on_service("cart")], probe(0));
    put(&mut cluster, [bad.clone()]);
    let shown = |cluster: &Cluster| -> Vec<Value> {
        let statuses = cluster.snapshot().policy_statuses();
        statuses
            .map(|one| serde_json::to_value(&**one).unwrap())
            .collect()
    };
    let reason = "spec.breaker.probes: must be from 1 to 1000, is 0";
    assert_eq!(shown(&cluster)[0]["rejection"], reason);
    assert_eq!(shown(&cluster)[0]["policy"], "TrafficPolicy/shop/one");
    delete(&mut cluster, &bad);
    assert!(shown(&cluster).is_empty());
}

#[test]
fn fallbacks_never_make_a_ring() {
    let falls = |from: &str, to: &str| policy(from, &[on_service(from)], fall_back_to(to));
    let services = ["a", "b", "c"]
        .into_iter()
        .zip(1..)
        .map(|(one, ip)| service(one, ip));
    let mut cluster = cluster(services);
    put(
        &mut cluster,
        [falls("a", "b"), falls("b", "c"), falls("c", "a")],
    );
    let in_force = |cluster: &Cluster, service: &str| {
        let policy = cluster.snapshot().policy_of_service(&name(service), 80);
        matches!(policy.settings.fallback, Fallback::Backend(_))
    };
    assert!(in_force(&cluster, "a") && in_force(&cluster, "b"));
    assert!(!in_force(&cluster, "c"));
    let ring = "Accepted=False Invalid: spec.fallback.backend: would lead back to Service shop/c, \
                in a ring";
    assert_eq!(conditions(&cluster, "c", 0)[0], ring);
    // Without the step from b to c there is none.
    delete(&mut cluster, &falls("b", "c"));
    assert!(in_force(&cluster, "c"));
    put(
        &mut cluster,
        [policy("b", &[on_service("b")], fall_back_to("b"))],
    );
    assert!(!in_force(&cluster, "b"));
}

#[test]
fn a_fallback_that_is_not_there_shows_in_the_conditions() {
    let one = policy("one", &[on_service("cart")], fall_back_to("spare"));
    let mut cluster = cluster([service("cart", 1), one]);
    let missing = "ResolvedRefs=False BackendNotFound: spec.fallback.backend: there is no Service \
                   shop/spare with a TCP port 80";
    assert_eq!(conditions(&cluster, "one", 0), [IN_FORCE, missing]);
    put(&mut cluster, [service("spare", 2)]);
    let found = "ResolvedRefs=True ResolvedRefs: all is there";
    assert_eq!(conditions(&cluster, "one", 0), [IN_FORCE, found]);
}

#[test]
fn a_retry_constraint_gives_way_to_a_traffic_policy_field_by_field() {
    let mut cluster = cluster([service("cart", 1), backend_policy("budget", "cart", 50)]);
    let budget = |cluster: &Cluster| {
        let policy = cluster.snapshot().policy_of_service(&name("cart"), 80);
        (policy.settings.budget.ratio, policy.settings.budget.window)
    };
    assert_eq!(budget(&cluster), (0.5, Duration::from_secs(10)));
    let stronger = json!({ "retryBudget": { "window": "30s" } });
    put(
        &mut cluster,
        [policy("one", &[on_service("cart")], stronger)],
    );
    assert_eq!(budget(&cluster), (0.5, Duration::from_secs(30)));
    let ratio = json!({ "retryBudget": { "ratio": 0.1 } });
    put(&mut cluster, [policy("one", &[on_service("cart")], ratio)]);
    assert_eq!(budget(&cluster), (0.1, Duration::from_secs(10)));
}

#[test]
fn a_service_with_a_policy_is_captured_without_a_meshed_endpoint() {
    let mut cluster = cluster([service("cart", 1)]);
    let ports = |cluster: &Cluster| -> Vec<Option<u16>> {
        let targets: BTreeSet<CaptureTarget> = cluster.snapshot().capture_targets();
        targets.into_iter().map(|target| target.port).collect()
    };
    assert_eq!(ports(&cluster), []);
    let one = policy("one", &[on_port("cart", "admin")], json!({}));
    put(&mut cluster, [one.clone()]);
    assert_eq!(ports(&cluster), [Some(81)]);
    put(
        &mut cluster,
        [policy("one", &[on_service("cart")], json!({}))],
    );
    assert_eq!(ports(&cluster), [Some(80), Some(81)]);
    delete(&mut cluster, &one);
    assert_eq!(ports(&cluster), []);
}
