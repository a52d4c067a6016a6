//! Answers of our own.

use tokio::sync::Notify;

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

#[tokio::test]
async fn requests_wait_for_a_connection_in_turn_and_beyond_pending_they_are_shed() {
    let gate = Arc::new(Notify::new());
    let let_go = gate.clone();
    let peer = Peer::http1(move |_, _| held(&let_go, answer(200, "ok"))).await;
    let world = World::new(&[peer.address]);
    let limits = json!({"limits": {"connections": 1, "pending": 2}});
    world.policy("cart", &limits);
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(world.connect("cart", Wire::Http1).await);
    }
    let mut sent = Vec::new();
    for (number, client) in clients.iter_mut().enumerate().take(3) {
        let path = format!("/{number}");
        sent.push(tokio::spawn(client.start(request("GET", &path, &[], ""))));
        until("it is on its way", || match number {
            0 => peer.count() == 1,
            _ => world.places("cart").counts().waiting == number,
        })
        .await;
    }
    let shed = clients[3].get("/3").await;
    let reason = shed.header("x-undermesh-reason");
    assert_eq!((shed.status, reason), (503, "overload"));
    for number in 0..3 {
        until("its turn comes", || peer.count() == number + 1).await;
        gate.notify_one();
        let first = sent.remove(0);
        let answer = tokio::time::timeout(FAR, first).await.unwrap().unwrap();
        let body = answer.unwrap().into_body().collect().await.unwrap();
        assert_eq!(body.to_bytes(), "ok");
    }
    // All over the same connection.
    assert_eq!(world.dialled.load(Ordering::Relaxed), 1);
    let metrics = world.telemetry.scrape().unwrap();
    assert!(metrics.contains("limit=\"pending\""), "{metrics}");
    assert_eq!(world.breaker("cart").failures(), 0);
}

#[tokio::test]
async fn requests_above_what_their_latency_allows_are_shed_and_no_failure() {
    let gate = Arc::new(Notify::new());
    let let_go = gate.clone();
    let peer = Peer::http1(move |_, _| held(&let_go, answer(200, "ok"))).await;
    let world = World::new(&[peer.address]);
    let one = json!({"limits": {"adaptive": {"initial": 1, "least": 1, "most": 1}}});
    world.policy("cart", &one);
    let mut first = world.connect("cart", Wire::Http1).await;
    let mut second = world.connect("cart", Wire::Http1).await;
    let sent = tokio::spawn(first.start(request("GET", "/1", &[], "")));
    until("it is on its way", || peer.count() == 1).await;
    let shed = second.get("/2").await;
    let reason = shed.header("x-undermesh-reason");
    assert_eq!((shed.status, reason), (503, "overload"));
    gate.notify_one();
    let answer = tokio::time::timeout(FAR, sent).await.unwrap().unwrap();
    answer.unwrap().into_body().collect().await.unwrap();
    gate.notify_one();
    assert_eq!(second.get("/3").await.status, 200);
    assert_eq!(peer.count(), 2);
    let metrics = world.telemetry.scrape().unwrap();
    assert!(metrics.contains("limit=\"adaptive\""), "{metrics}");
    assert_eq!(world.breaker("cart").failures(), 0);
}

#[tokio::test]
async fn an_idle_connection_to_another_endpoint_makes_room_for_who_needs_one() {
    let first = Peer::http1(|_, _| answer(200, "")).await;
    let second = Peer::http1(|_, _| answer(200, "")).await;
    let world = World::new(&[first.address, second.address]);
    // An endpoint that is new is passed over now and then.
    let in_turn = json!({
        "limits": {"connections": 1},
        "balancing": {"algorithm": "RoundRobin"},
        "slowStart": {"window": "0s"},
    });
    world.policy("cart", &in_turn);
    let mut client = world.connect("cart", Wire::Http1).await;
    for _ in 0..20 {
        assert_eq!(client.get("/").await.status, 200);
        assert!(world.places("cart").counts().taken <= 1);
    }
    assert_eq!((first.count(), second.count()), (10, 10));
}

#[tokio::test]
async fn who_waits_for_a_connection_in_vain_is_refused_in_time_and_no_endpoint_is_charged() {
    let peer = Peer::http1(|_, _| Act::Hang).await;
    let world = World::new(&[peer.address]);
    world.policy("cart", &json!({"limits": {"connections": 1}}));
    let mut hanging = world.connect("cart", Wire::Http1).await;
    let first = tokio::spawn(hanging.start(request("GET", "/", &[], "")));
    until("it is on its way", || peer.count() == 1).await;
    world.policy(
        "cart",
        &json!({"limits": {"connections": 1}, "timeouts": {"attempt": "50ms"}}),
    );
    let mut client = world.connect("cart", Wire::Http1).await;
    let seen = client.get("/").await;
    let reason = seen.header("x-undermesh-reason");
    assert_eq!((seen.status, reason), (503, "overload"));
    assert_eq!(peer.count(), 1);
    assert_eq!(world.breaker("cart").failures(), 0);
    first.abort();
}

#[tokio::test]
async fn a_request_without_an_answer_lasts_no_longer_than_its_policy_lets_requests_last() {
    let peer = Peer::http1(|_, _| Act::Hang).await;
    let world = World::new(&[peer.address]);
    world.policy("cart", &json!({"timeouts": {"maxDuration": "50ms"}}));
    let mut client = world.connect("cart", Wire::Http1).await;
    let seen = client.get("/").await;
    let reason = seen.header("x-undermesh-reason");
    assert_eq!((seen.status, reason), (504, "request_timeout"));
}
