//! What is sent again, and what never is.

use std::time::Instant;

use http_body_util::StreamBody;
use hyper::body::Frame;
use tokio::sync::Notify;

use super::*;

fn usual() -> Value {
    json!({"retries": {"attempts": 2, "backoff": {"base": "1ms", "cap": "2ms"}}})
}

#[tokio::test]
async fn a_failed_attempt_is_made_again_and_both_bear_their_number() {
    let peer = Peer::http1(|n, _| answer(if n == 0 { 503 } else { 200 }, "done")).await;
    let world = World::new(&[peer.address]);
    world.policy("cart", &usual());
    let mut client = world.connect("cart", Wire::Http1).await;
    let forged = request("GET", "/", &[("x-undermesh-attempt", "9")], "");
    let seen = client.send(forged).await;
    assert_eq!((seen.status, seen.text()), (200, "done"));
    let numbers: Vec<String> = peer
        .heard()
        .iter()
        .map(|heard| heard.header("x-undermesh-attempt").to_owned())
        .collect();
    assert_eq!(numbers, ["1", "2"]);
}

#[tokio::test]
async fn no_retry_follows_once_the_head_of_an_answer_went_out() {
    let gate = Arc::new(Notify::new());
    let go = gate.clone();
    let peer = Peer::http1(move |_, _| {
        let go = go.clone();
        let part = Frame::data(Bytes::from_static(b"half"));
        let part = futures_util::stream::iter([Ok(part)]);
        let broken = futures_util::stream::once(async move {
            go.notified().await;
            Err(std::io::Error::other("broken"))
        });
        let body = StreamBody::new(futures_util::StreamExt::chain(part, Box::pin(broken)));
        Act::Answer(Response::new(BodyExt::boxed(body)))
    })
    .await;
    let world = World::new(&[peer.address]);
    world.policy("cart", &usual());
    let mut client = world.connect("cart", Wire::Http1).await;
    let response = client.start(request("GET", "/", &[], "")).await.unwrap();
    assert_eq!(response.status(), 200);
    gate.notify_one();
    assert!(response.into_body().collect().await.is_err());
    assert_eq!(peer.count(), 1);
    // It was a failure all the same.
    let breaker = world.breaker("cart");
    until("the verdict", || breaker.failures() == 1).await;
}

#[tokio::test]
async fn a_retried_body_is_sent_byte_for_byte() {
    for wire in [Wire::Http1, Wire::Http2] {
        let peer = Peer::new(wire, |n, _| match n {
            0 => Act::Reset,
            _ => answer(200, "done"),
        })
        .await;
        let world = World::new(&[peer.address]);
        world.policy("cart", &usual());
        let mut client = world.connect("cart", wire).await;
        let body: String = (0..9000).map(|n| format!("{n:06} ")).collect();
        let seen = client.send(request("PUT", "/", &[], &body)).await;
        assert_eq!(seen.status, 200, "{seen:?}");
        let heard = peer.heard();
        assert_eq!(heard.len(), 2);
        assert!(heard.iter().all(|one| one.body == body), "{wire:?}");
    }
}

#[tokio::test]
async fn a_body_that_outgrew_what_is_kept_is_not_sent_again() {
    let peer = Peer::http1(|_, _| answer(503, "")).await;
    let world = World::new(&[peer.address]);
    let mut policy = usual();
    policy["retries"]["replayBytes"] = 10.into();
    world.policy("cart", &policy);
    let mut client = world.connect("cart", Wire::Http1).await;
    let seen = client
        .send(request("PUT", "/", &[], "more than ten bytes"))
        .await;
    assert_eq!((seen.status, peer.count()), (503, 1));
    let seen = client.send(request("PUT", "/", &[], "ten bytes.")).await;
    assert_eq!((seen.status, peer.count()), (503, 4));
}

#[tokio::test]
async fn a_post_is_not_sent_again_once_it_was_sent_unless_the_route_vouches_for_it() {
    let peer = Peer::http1(|_, _| answer(503, "")).await;
    let world = World::new(&[peer.address]);
    world.policy("cart", &usual());
    let mut client = world.connect("cart", Wire::Http1).await;
    let seen = client.send(request("POST", "/", &[], "once")).await;
    assert_eq!((seen.status, peer.count()), (503, 1));
    let mut policy = usual();
    policy["retries"]["methods"] = "Any".into();
    world.policy("cart", &policy);
    let seen = client.send(request("POST", "/", &[], "thrice")).await;
    assert_eq!((seen.status, peer.count()), (503, 4));
}

#[tokio::test]
async fn what_never_reached_an_application_is_sent_elsewhere_whatever_it_is() {
    let peer = Peer::http1(|_, _| answer(200, "done")).await;
    let gone = Peer::http1(|_, _| answer(200, "wrong")).await;
    let refusing = gone.address;
    drop(gone);
    until("the port to be closed", || {
        std::net::TcpStream::connect(refusing).is_err()
    })
    .await;
    let world = World::new(&[refusing, peer.address]);
    let mut client = world.connect("cart", Wire::Http1).await;
    for n in 1..=20 {
        let seen = client.send(request("POST", "/", &[], "once")).await;
        assert_eq!((seen.status, seen.text()), (200, "done"));
        assert_eq!(peer.count(), n);
    }
}

#[tokio::test]
async fn the_budget_holds_while_every_attempt_fails() {
    let peer = Peer::http1(|_, _| answer(503, "")).await;
    let world = World::new(&[peer.address]);
    let mut policy = usual();
    policy["retryBudget"] = json!({"ratio": 0.2, "minimumRate": 1.0});
    policy["breaker"] = json!({"mode": "Disabled"});
    world.policy("cart", &policy);
    let mut client = world.connect("cart", Wire::Http1).await;
    for _ in 0..300 {
        assert_eq!(client.get("/").await.status, 503);
    }
    // One a second over ten seconds, or a fifth, whichever is more.
    let sent = peer.count();
    assert!(
        (350..=360).contains(&sent),
        "{sent} attempts of 300 requests"
    );
}

#[tokio::test]
async fn a_deadline_shrinks_over_attempts() {
    let peer = Peer::new(Wire::Http2, |n, _| grpc_head(if n == 0 { 14 } else { 0 })).await;
    let world = World::new(&[peer.address]);
    let mut policy = usual();
    policy["retries"]["methods"] = "Any".into();
    world.policy("cart", &policy);
    let mut client = world.connect("cart", Wire::Http2).await;
    let seen = client.call(&[("grpc-timeout", "10S")]).await;
    assert_eq!(seen.header("grpc-status"), "0");
    let left: Vec<Duration> = peer
        .heard()
        .iter()
        .map(|heard| {
            let micros = heard.header("grpc-timeout").strip_suffix('u');
            Duration::from_micros(micros.unwrap().parse().unwrap())
        })
        .collect();
    assert_eq!(left.len(), 2);
    assert!(
        left[1] < left[0] && left[0] < Duration::from_secs(10),
        "{left:?}"
    );
}

#[tokio::test]
async fn a_request_ends_with_its_deadline_however_many_attempts_are_left() {
    let peer = Peer::http1(|_, _| Act::Hang).await;
    let world = World::new(&[peer.address]);
    let mut policy = usual();
    policy["timeouts"] = json!({"request": "300ms", "attempt": "120ms"});
    world.policy("cart", &policy);
    let mut client = world.connect("cart", Wire::Http1).await;
    let began = Instant::now();
    let seen = client.get("/").await;
    let took = began.elapsed();
    assert_eq!(seen.status, 504, "{seen:?}");
    let reason = seen.header("x-undermesh-reason");
    assert!(
        ["request_timeout", "upstream_timeout"].contains(&reason),
        "{reason}"
    );
    assert!(took >= Duration::from_millis(230), "{took:?}");
    assert!((2..=3).contains(&peer.count()), "{}", peer.count());
}

#[tokio::test]
async fn a_client_that_goes_away_stops_its_retries_and_is_no_verdict() {
    for wire in [Wire::Http1, Wire::Http2] {
        let peer = Peer::new(wire, |n, _| match n {
            0 => answer(200, ""),
            _ => Act::Hang,
        })
        .await;
        let world = World::new(&[peer.address]);
        let mut policy = usual();
        policy["timeouts"] = json!({"attempt": "10s"});
        world.policy("cart", &policy);
        let mut client = world.connect("cart", wire).await;
        assert_eq!(client.get("/").await.status, 200);
        let hanging = client.start(request("GET", "/", &[], ""));
        let hanging = tokio::spawn(hanging);
        until("the request to arrive", || peer.count() == 2).await;
        hanging.abort();
        client.go_away().await;
        let endpoint = &world.destinations.all()[0].balanced()[0].endpoints()[0];
        until("the attempt to be given up", || endpoint.in_flight() == 0).await;
        assert_eq!(peer.count(), 2);
        assert_eq!(world.breaker("cart").failures(), 0);
    }
}

#[tokio::test]
async fn an_idle_connection_that_the_server_closed_fails_no_request() {
    let peer = Peer::http1(|_, _| {
        let Act::Answer(mut response) = answer(200, "done") else {
            unreachable!()
        };
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert("connection", close);
        Act::Answer(response)
    })
    .await;
    let world = World::new(&[peer.address]);
    let mut client = world.connect("cart", Wire::Http1).await;
    for _ in 0..50 {
        let seen = client.send(request("POST", "/", &[], "once")).await;
        assert_eq!((seen.status, seen.text()), (200, "done"));
    }
    assert_eq!(peer.count(), 50);
}
