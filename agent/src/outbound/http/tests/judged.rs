//! Who is told of an outcome, and who is not.

use super::*;
use crate::resilience::BreakerState;
use crate::resilience::breaker::Forced;
use crate::telemetry::testing::total;

#[tokio::test]
async fn a_grpc_outcome_is_read_from_the_head_and_from_trailers() {
    type Answering = fn(u8) -> Act;
    let ways: [Answering; 2] = [grpc_head, grpc_trailers];
    for way in ways {
        let peer = Peer::new(Wire::Http2, move |n, _| way([0, 14, 5][n])).await;
        let world = World::new(&[peer.address]);
        let mut client = world.connect("cart", Wire::Http2).await;
        let mut statuses = Vec::new();
        for _ in 0..3 {
            let seen = client.call(&[]).await;
            let trailers = seen.trailers.as_ref();
            let status = trailers.and_then(|all| all.get("grpc-status"));
            let status = status.or(seen.headers.get("grpc-status")).unwrap();
            statuses.push(status.to_str().unwrap().to_owned());
        }
        assert_eq!(statuses, ["0", "14", "5"]);
        let breaker = world.breaker("cart");
        until("the verdict", || breaker.failures() == 1).await;
        assert_eq!(peer.count(), 3);
    }
}

#[tokio::test]
async fn a_grpc_error_in_trailers_right_behind_the_head_is_tried_again() {
    let peer = Peer::new(Wire::Http2, |n, _| grpc_head(if n == 0 { 14 } else { 0 })).await;
    let world = World::new(&[peer.address]);
    let retries = json!({"retries": {"attempts": 2, "methods": "Any", "backoff": {"base": "1ms"}}});
    world.policy("cart", &retries);
    let mut client = world.connect("cart", Wire::Http2).await;
    assert_eq!(client.call(&[]).await.header("grpc-status"), "0");
    assert_eq!(peer.count(), 2);
}

#[tokio::test]
async fn a_cancelled_probe_does_not_wedge_the_breaker() {
    let peer = Peer::http1(|n, _| match n {
        0 => answer(500, ""),
        1 => Act::Hang,
        _ => answer(200, ""),
    })
    .await;
    let world = World::new(&[peer.address]);
    let breaker = json!({"breaker": {"consecutiveFailures": 1, "probes": 1,
        "openTime": {"base": "1ms", "cap": "1ms"}}});
    world.policy("cart", &breaker);
    let mut client = world.connect("cart", Wire::Http1).await;
    assert_eq!(client.get("/").await.status, 500);
    let breaker = world.breaker("cart");
    assert_eq!(breaker.state(), BreakerState::Open);
    tokio::time::sleep(Duration::from_millis(5)).await;
    let probe = tokio::spawn(client.start(request("GET", "/", &[], "")));
    until("the probe to arrive", || peer.count() == 2).await;
    assert_eq!(
        (breaker.state(), breaker.probes()),
        (BreakerState::HalfOpen, 1)
    );
    let mut other = world.connect("cart", Wire::Http1).await;
    let seen = other.get("/").await;
    assert_eq!(seen.header("x-undermesh-reason"), "circuit_open");
    probe.abort();
    client.go_away().await;
    until("the place of the probe to be free", || {
        breaker.probes() == 0
    })
    .await;
    assert_eq!(other.get("/").await.status, 200);
    assert_eq!(breaker.state(), BreakerState::Closed);
}

#[tokio::test]
async fn what_is_shed_here_is_charged_to_nobody() {
    let peer = Peer::http1(|n, _| match n {
        0 => Act::Hang,
        _ => answer(200, ""),
    })
    .await;
    let world = World::new(&[peer.address]);
    world.policy("cart", &json!({"limits": {"inFlight": 1}}));
    let mut first = world.connect("cart", Wire::Http1).await;
    let held = tokio::spawn(first.start(request("GET", "/", &[], "")));
    until("the request to arrive", || peer.count() == 1).await;
    let mut second = world.connect("cart", Wire::Http1).await;
    for _ in 0..50 {
        let seen = second.get("/").await;
        assert_eq!(seen.status, 503);
        assert_eq!(seen.header("x-undermesh-reason"), "overload");
    }
    let destination = &world.destinations.all()[0];
    assert_eq!(destination.balanced()[0].ejector().ejected(), 0);
    let breaker = world.breaker("cart");
    assert_eq!(
        (breaker.failures(), breaker.state()),
        (0, BreakerState::Closed)
    );
    held.abort();
    first.go_away().await;
    until("the place to be free", || {
        destination.routes()[0].places.as_ref().unwrap().taken() == 0
    })
    .await;
    assert_eq!(second.get("/").await.status, 200);
}

#[tokio::test]
async fn a_request_that_cannot_be_repeated_does_not_probe_an_ejected_endpoint() {
    let bad = Peer::http1(|_, _| answer(500, "")).await;
    let good = Peer::http1(|_, _| answer(200, "")).await;
    let world = World::new(&[bad.address, good.address]);
    let ejection = json!({"outlierEjection": {"consecutiveFailures": 1,
        "ejectionTime": {"base": "1ms", "cap": "1ms", "jitter": 0.0}}});
    world.policy("cart", &ejection);
    let mut client = world.connect("cart", Wire::Http1).await;
    while bad.count() == 0 {
        client.get("/").await;
    }
    tokio::time::sleep(Duration::from_millis(5)).await;
    for _ in 0..50 {
        assert_eq!(
            client.send(request("POST", "/", &[], "x")).await.status,
            200
        );
    }
    assert_eq!(bad.count(), 1);
    // One that can be repeated does.
    while bad.count() == 1 {
        client.get("/").await;
    }
}

#[tokio::test]
async fn an_open_breaker_answers_at_once_in_the_clients_protocol() {
    let peer = Peer::new(Wire::Http2, |_, _| grpc_head(0)).await;
    let world = World::new(&[peer.address]);
    let mut client = world.connect("cart", Wire::Http2).await;
    assert_eq!(client.call(&[]).await.header("grpc-status"), "0");
    let breaker = world.breaker("cart");
    breaker.force(Some(Forced::Open), world.destinations.clock().now());
    let seen = client.call(&[]).await;
    assert_eq!((seen.status, seen.header("grpc-status")), (200, "14"));
    assert_eq!(seen.header("x-undermesh-reason"), "circuit_open");
    let seen = client.get("/").await;
    assert_eq!(
        (seen.status, seen.header("x-undermesh-reason")),
        (503, "circuit_open")
    );
    assert_eq!(peer.count(), 1);
    breaker.force(None, world.destinations.clock().now());
    assert_eq!(client.call(&[]).await.header("grpc-status"), "0");
}

#[tokio::test]
async fn a_breaker_opens_says_when_to_come_back_and_closes() {
    let failing = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let script = failing.clone();
    let peer = Peer::http1(move |_, _| match script.load(Ordering::Relaxed) {
        true => answer(503, ""),
        false => answer(200, ""),
    })
    .await;
    let world = World::new(&[peer.address]);
    let mut client = world.connect("cart", Wire::Http1).await;
    let open = loop {
        let seen = client.get("/").await;
        assert_eq!(seen.status, 503);
        if seen.header("x-undermesh-reason") == "circuit_open" {
            break seen;
        }
    };
    // Twenty are the least that are judged.
    assert_eq!(peer.count(), 20);
    assert_eq!(open.header("retry-after"), "1");
    failing.store(false, Ordering::Relaxed);
    let began = tokio::time::Instant::now();
    while client.get("/").await.status != 200 {
        assert!(began.elapsed() < FAR);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(world.breaker("cart").state(), BreakerState::Closed);
}

/// An answer that begins, and never ends.
fn endless() -> Act {
    let first = Ok(hyper::body::Frame::data(Bytes::from_static(b"event")));
    let stream = futures_util::stream::iter([first]);
    let endless = futures_util::StreamExt::chain(stream, futures_util::stream::pending());
    Act::Answer(Response::new(BodyExt::boxed(
        http_body_util::StreamBody::new(endless),
    )))
}

#[tokio::test]
async fn a_stream_that_falls_silent_or_lasts_for_too_long_is_cut_and_told_of() {
    for (timeouts, flag) in [
        (json!({"streamIdle": "50ms"}), "stream_timeout"),
        (json!({"maxDuration": "1s"}), "request_timeout"),
    ] {
        let peer = Peer::http1(|_, _| endless()).await;
        let world = World::new(&[peer.address]);
        world.policy("cart", &json!({"timeouts": timeouts}));
        let mut client = world.connect("cart", Wire::Http1).await;
        let response = client.start(request("GET", "/", &[], "")).await.unwrap();
        assert_eq!(response.status(), 200, "{flag}");
        let whole = tokio::time::timeout(FAR, response.into_body().collect()).await;
        assert!(whole.unwrap().is_err(), "{flag}: it must not look whole");
        until("it is counted", || {
            let metrics = world.telemetry.scrape().unwrap();
            let flag = format!("flag=\"{flag}\"");
            total(&metrics, "undermesh_http_requests_total", &[&*flag]) == 1
        })
        .await;
    }
}

#[tokio::test]
async fn a_stream_that_answers_well_for_a_while_closes_the_breaker_without_its_end() {
    let peer = Peer::http1(|n, _| match n {
        0 => answer(500, ""),
        _ => endless(),
    })
    .await;
    let world = World::new(&[peer.address]);
    let breaker = json!({"breaker": {"consecutiveFailures": 1,
        "openTime": {"base": "1ms", "cap": "1ms"}}});
    world.policy("cart", &breaker);
    let mut client = world.connect("cart", Wire::Http1).await;
    assert_eq!(client.get("/").await.status, 500);
    tokio::time::sleep(Duration::from_millis(5)).await;
    let response = client.start(request("GET", "/", &[], "")).await.unwrap();
    assert_eq!(response.status(), 200);
    let breaker = world.breaker("cart");
    until("the breaker to close", || {
        breaker.state() == BreakerState::Closed
    })
    .await;
    drop(response);
}
