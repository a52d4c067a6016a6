//! Where requests go.

use std::collections::BTreeMap;

use tokio::sync::Notify;

use super::*;
use crate::mesh::route::{Filter, Fraction, Mirror, Redirect, SessionCarrier, SessionPersistence};
use crate::telemetry::testing::total;

#[tokio::test]
async fn requests_of_one_connection_are_balanced_one_by_one_over_kept_connections() {
    let mut peers = Vec::new();
    for _ in 0..4 {
        peers.push(Peer::http1(|_, _| answer(200, "")).await);
    }
    let addresses: Vec<SocketAddr> = peers.iter().map(|peer| peer.address).collect();
    let world = World::new(&addresses);
    world.policy("cart", &json!({"balancing": {"algorithm": "RoundRobin"}}));
    let mut client = world.connect("cart", Wire::Http1).await;
    for _ in 0..200 {
        assert_eq!(client.get("/").await.status, 200);
    }
    let counts: Vec<usize> = peers.iter().map(Peer::count).collect();
    assert!(counts.iter().all(|count| *count >= 25), "{counts:?}");
    assert_eq!(world.dialled.load(Ordering::Relaxed), 4);
}

#[tokio::test]
async fn backends_get_their_share() {
    let stable = Peer::http1(|_, _| answer(200, "stable")).await;
    let canary = Peer::http1(|_, _| answer(200, "canary")).await;
    let world = World::new(&[]);
    world.service("stable", &[stable.address]);
    world.service("canary", &[canary.address]);
    world.routes(vec![rule(&[("stable", 90), ("canary", 10)])]);
    let mut client = world.connect("cart", Wire::Http1).await;
    for _ in 0..500 {
        assert_eq!(client.get("/").await.status, 200);
    }
    // Five standard deviations around 50.
    assert!((17..=83).contains(&canary.count()), "{}", canary.count());
    assert_eq!(stable.count() + canary.count(), 500);
}

#[tokio::test]
async fn a_change_is_in_force_for_the_next_request_and_cuts_none_in_flight() {
    let gate = Arc::new(Notify::new());
    let go = gate.clone();
    let slow = Peer::new(Wire::Http2, move |_, _| held(&go, answer(200, "old"))).await;
    let new = Peer::new(Wire::Http2, |_, _| answer(200, "new")).await;
    let world = World::new(&[]);
    world.service("old", &[slow.address]);
    world.service("new", &[new.address]);
    world.routes(vec![rule(&[("old", 1)])]);
    let mut client = world.connect("cart", Wire::Http2).await;
    let in_flight = tokio::spawn(client.start(request("GET", "/slow", &[], "")));
    until("the request to arrive", || slow.count() == 1).await;
    world.routes(vec![rule(&[("new", 1)])]);
    world.service("old", &[]);
    world.destinations.maintain();
    assert_eq!(client.get("/").await.text(), "new");
    gate.notify_one();
    let old = in_flight.await.unwrap().unwrap();
    let body = old.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, "old");
}

#[tokio::test]
async fn a_session_stays_with_its_endpoint() {
    let mut peers = Vec::new();
    for n in 0..4 {
        peers.push(Peer::http1(move |_, _| answer(200, &n.to_string())).await);
    }
    let addresses: Vec<SocketAddr> = peers.iter().map(|peer| peer.address).collect();
    let world = World::new(&addresses);
    let mut sticky = rule(&[("cart", 1)]);
    let carrier = SessionCarrier::Header("x-session".parse().unwrap());
    sticky.session = Some(SessionPersistence::new(&sticky.name, carrier));
    world.routes(vec![sticky]);
    world.policy("cart", &json!({"balancing": {"algorithm": "RoundRobin"}}));
    let mut client = world.connect("cart", Wire::Http1).await;
    let first = client.get("/").await;
    let session = first.header("x-session").to_owned();
    assert!(!session.is_empty());
    for _ in 0..30 {
        let headers = [("x-session", &*session)];
        let seen = client.send(request("GET", "/", &headers, "")).await;
        assert_eq!(seen.text(), first.text());
    }
    let mut others = BTreeMap::new();
    for _ in 0..60 {
        *others
            .entry(client.get("/").await.text().to_owned())
            .or_insert(0) += 1;
    }
    assert_eq!(others.len(), 4, "{others:?}");
}

#[tokio::test]
async fn an_answer_of_a_filter_says_so() {
    let peer = Peer::http1(|_, _| answer(200, "")).await;
    let world = World::new(&[peer.address]);
    let mut moved = rule(&[("cart", 1)]);
    let redirect = Filter::Redirect(Redirect {
        scheme: None,
        hostname: Some("elsewhere".parse().unwrap()),
        port: None,
        path: None,
        status: ::http::StatusCode::FOUND,
    });
    moved.filters = Filters::new(vec![redirect], Vec::new());
    world.routes(vec![moved]);
    let mut client = world.connect("cart", Wire::Http1).await;
    let seen = client.get("/").await;
    assert_eq!(seen.status, 302);
    assert_eq!(seen.header("x-undermesh-reason"), "direct_response");
    assert_eq!(peer.count(), 0);
}

#[tokio::test]
async fn a_mirror_gets_a_copy_and_its_answer_is_nobodys() {
    let peer = Peer::http1(|_, _| answer(200, "real")).await;
    let mirror = Peer::http1(|_, _| answer(500, "mirror")).await;
    let world = World::new(&[peer.address]);
    world.service("mirror", &[mirror.address]);
    let mut mirrored = rule(&[("cart", 1)]);
    let target = BackendTarget::Service {
        name: name("mirror"),
        port: 80,
    };
    let copy = Mirror {
        target,
        share: Fraction::ALL,
    };
    mirrored.filters = Filters::new(Vec::new(), vec![copy]);
    world.routes(vec![mirrored]);
    let mut client = world.connect("cart", Wire::Http1).await;
    let seen = client.send(request("POST", "/", &[], "both")).await;
    assert_eq!(seen.text(), "real");
    until("the copy to arrive", || mirror.count() == 1).await;
    let (real, copy) = (&peer.heard()[0], &mirror.heard()[0]);
    assert_eq!((&real.body, &real.method), (&copy.body, &copy.method));
    assert_eq!(world.breaker("cart").failures(), 0);
    until("both to be counted", || {
        let metrics = world.telemetry.scrape().unwrap();
        let counted = |outcome: &str| {
            let outcome = format!("outcome=\"{outcome}\"");
            total(&metrics, "undermesh_http_mirrored_total", &[&*outcome])
        };
        (counted("sent"), counted("failed")) == (1, 1)
    })
    .await;
}

#[tokio::test]
async fn a_drain_answers_what_is_in_flight_and_takes_no_more() {
    let gate = Arc::new(Notify::new());
    let go = gate.clone();
    let peer = Peer::http1(move |_, _| held(&go, answer(200, "last"))).await;
    let world = World::new(&[peer.address]);
    let mut client = world.connect("cart", Wire::Http1).await;
    let in_flight = tokio::spawn(client.start(request("GET", "/", &[], "")));
    until("the request to arrive", || peer.count() == 1).await;
    client.drain.cancel();
    gate.notify_one();
    let last = in_flight.await.unwrap().unwrap();
    assert_eq!(last.headers()["connection"], "close");
    let body = last.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, "last");
    tokio::time::timeout(FAR, client.served)
        .await
        .unwrap()
        .unwrap();
}
