//! Answers of our own.

use super::*;
use crate::mesh::route::InvalidBackend;

#[tokio::test]
async fn a_request_that_no_rule_is_for_is_not_found_and_one_to_nothing_is_our_error() {
    let peer = Peer::http1(|_, _| answer(200, "")).await;
    let world = World::new(&[peer.address]);
    let mut only = rule(&[("cart", 1)]);
    only.matches = vec![RequestMatch::path(PathMatch::Exact("/only".into()))];
    let mut nothing = rule(&[]);
    nothing.matches = vec![RequestMatch::path(PathMatch::Exact("/nothing".into()))];
    let mut invalid = rule(&[]);
    invalid.matches = vec![RequestMatch::path(PathMatch::Exact("/invalid".into()))];
    let target = BackendTarget::Invalid {
        reason: InvalidBackend::BackendNotFound,
    };
    invalid.backends = vec![Backend::new(target, 1, Filters::default())];
    world.routes(vec![only, nothing, invalid]);
    let mut client = world.connect("cart", Wire::Http1).await;
    for (path, status, reason) in [
        ("/only", 200, ""),
        ("/", 404, "no_route"),
        ("/nothing", 500, "invalid_backend"),
        ("/invalid", 500, "invalid_backend"),
    ] {
        let seen = client.get(path).await;
        assert_eq!(seen.status, status, "{path}");
        assert_eq!(seen.header("x-undermesh-reason"), reason, "{path}");
    }
    assert_eq!(peer.count(), 1);
}

#[tokio::test]
async fn a_service_without_an_endpoint_and_an_endpoint_that_policy_denies_say_so() {
    let peer = Peer::http1(|_, _| answer(200, "")).await;
    let world = World::new(&[]);
    let mut client = world.connect("cart", Wire::Http1).await;
    let seen = client.get("/").await;
    assert_eq!(
        (seen.status, seen.header("x-undermesh-reason")),
        (503, "no_endpoint")
    );
    world.denied.lock().insert(peer.address);
    world.service("cart", &[peer.address]);
    let seen = client.get("/").await;
    assert_eq!(
        (seen.status, seen.header("x-undermesh-reason")),
        (403, "denied")
    );
    assert_eq!(peer.count(), 0);
}

#[tokio::test]
async fn above_a_rate_limit_the_client_is_told_when_to_come_back() {
    let peer = Peer::http1(|_, _| answer(200, "")).await;
    let world = World::new(&[peer.address]);
    let limit = json!({"rateLimit": {"perSource": {"requestsPerSecond": 0.1, "burst": 3}}});
    world.policy("cart", &limit);
    let mut client = world.connect("cart", Wire::Http1).await;
    for _ in 0..3 {
        assert_eq!(client.get("/").await.status, 200);
    }
    let seen = client.get("/").await;
    assert_eq!(
        (seen.status, seen.header("x-undermesh-reason")),
        (429, "rate_limited")
    );
    assert_eq!(seen.header("retry-after"), "10");
    assert_eq!(seen.header("ratelimit-policy"), "\"source\";q=3;w=30");
    assert_eq!(seen.header("ratelimit"), "\"source\";r=0;t=10");
    // Another connection of the pod has the same bucket.
    let mut other = world.connect("cart", Wire::Http2).await;
    let seen = other.call(&[]).await;
    assert_eq!((seen.status, seen.header("grpc-status")), (200, "8"));
    assert_eq!(peer.count(), 3);
}

#[tokio::test]
async fn faults_on_purpose_hit_those_that_they_are_for() {
    let peer = Peer::http1(|_, _| answer(200, "")).await;
    let world = World::new(&[peer.address]);
    let fault = json!({"fault": {
        "delay": {"percentage": 100, "time": "30ms"},
        "abort": {"percentage": 100, "httpStatus": 418},
        "headers": [{"name": "x-chaos", "value": "yes"}],
    }});
    world.policy("cart", &fault);
    let mut client = world.connect("cart", Wire::Http1).await;
    let began = std::time::Instant::now();
    let seen = client
        .send(request("GET", "/", &[("x-chaos", "yes")], ""))
        .await;
    assert!(began.elapsed() >= Duration::from_millis(30));
    assert_eq!(
        (seen.status, seen.header("x-undermesh-reason")),
        (418, "fault_injected")
    );
    assert_eq!(client.get("/").await.status, 200);
    assert_eq!(peer.count(), 1);
    assert_eq!(world.breaker("cart").failures(), 0);
}

#[tokio::test]
async fn a_fallback_answers_when_nothing_else_is_left() {
    let peer = Peer::http1(|_, _| answer(503, "broken")).await;
    let other = Peer::http1(|_, _| answer(200, "other")).await;
    let world = World::new(&[peer.address]);
    world.service("other", &[other.address]);
    let fixed = json!({"retries": {"attempts": 0, "conditions": ["GatewayError"]},
        "fallback": {"response": {"status": 203, "body": "sorry"}}});
    world.policy("cart", &fixed);
    let mut client = world.connect("cart", Wire::Http1).await;
    let seen = client.get("/").await;
    assert_eq!((seen.status, seen.text()), (203, "sorry"));
    assert_eq!(seen.header("x-undermesh-reason"), "fallback");
    let backend = json!({"retries": {"attempts": 0, "conditions": ["GatewayError"]},
        "fallback": {"backend": {"name": "other", "port": 80}}});
    world.policy("cart", &backend);
    let seen = client.get("/").await;
    assert_eq!((seen.status, seen.text()), (200, "other"));
    assert_eq!((peer.count(), other.count()), (2, 1));
}
