//! What one pod may hold, and that its neighbours do not feel it.

use http_body_util::StreamBody;
use hyper::body::Frame;
use tokio::sync::Semaphore;

use super::*;
use crate::fairness::QuotaLimits;
use crate::telemetry::testing::total;

const HOLD: (&str, &str) = ("x-hold", "yes");

/// Answers at once; what asks for it gets an answer that goes on until the gate lets it.
async fn holding(gate: &Arc<Semaphore>) -> Peer {
    let gate = gate.clone();
    Peer::http1(move |_, heard| {
        if heard.header(HOLD.0).is_empty() {
            return answer(200, "done");
        }
        let gate = gate.clone();
        let first = futures_util::stream::iter([Ok(Frame::data(Bytes::from_static(b"first")))]);
        let last = futures_util::stream::once(async move {
            gate.acquire().await.unwrap().forget();
            Ok(Frame::data(Bytes::from_static(b"last")))
        });
        let body = StreamBody::new(futures_util::StreamExt::chain(first, Box::pin(last)));
        Act::Answer(Response::new(BodyExt::boxed(body)))
    })
    .await
}

#[tokio::test]
async fn a_flooding_pod_is_shed_until_its_answers_have_ended_and_its_neighbour_is_not() {
    let gate = Arc::new(Semaphore::new(0));
    let peer = holding(&gate).await;
    let limits = QuotaLimits {
        requests: 2,
        ..QuotaLimits::default()
    };
    let world = World::bounded(&[peer.address], limits);
    let mut flood = Vec::new();
    for _ in 0..2 {
        let mut client = world.connect_from(1, "cart", Wire::Http1).await;
        let response = client
            .start(request("GET", "/", &[HOLD], ""))
            .await
            .unwrap();
        flood.push((client, response));
    }
    let mut loud = world.connect_from(1, "cart", Wire::Http1).await;
    let seen = loud.get("/").await;
    let reason = seen.header("x-undermesh-reason");
    assert_eq!((seen.status, reason), (503, "overload"));
    let mut grpc = world.connect_from(1, "cart", Wire::Http2).await;
    let seen = grpc.call(&[]).await;
    assert_eq!((seen.status, seen.header("grpc-status")), (200, "14"));
    let mut quiet = world.connect_from(2, "cart", Wire::Http1).await;
    assert_eq!(quiet.get("/").await.status, 200);
    assert_eq!(peer.count(), 3);
    assert_eq!(world.quotas.counters()[0], ("request_quota_full", 2));
    let metrics = world.telemetry.scrape().unwrap();
    let shed = ["limit=\"source\"", "destination_service_name=\"cart\""];
    assert_eq!(total(&metrics, "undermesh_http_shed_total", &shed), 2);
    // Their heads have been there for long: it is the end of a body that makes room.
    gate.add_permits(2);
    for (_client, response) in flood {
        let body = response.into_body().collect().await.unwrap();
        assert_eq!(body.to_bytes(), "firstlast");
    }
    assert_eq!(loud.get("/").await.status, 200);
}

#[tokio::test]
async fn a_body_that_finds_no_room_streams_through_and_is_not_repeated() {
    let peer = Peer::http1(|_, _| answer(503, "")).await;
    let limits = QuotaLimits {
        bytes: 10,
        ..QuotaLimits::default()
    };
    let world = World::bounded(&[peer.address], limits);
    let policy = json!({"retries": {"attempts": 2, "backoff": {"base": "1ms", "cap": "2ms"}},
        "breaker": {"mode": "Disabled"}});
    world.policy("cart", &policy);
    let mut client = world.connect_from(1, "cart", Wire::Http1).await;
    let long = "more than ten bytes";
    assert_eq!(
        client.send(request("PUT", "/", &[], long)).await.status,
        503
    );
    assert_eq!(peer.count(), 1);
    assert_eq!(peer.heard()[0].body, long);
    assert_eq!(world.quotas.counters()[2], ("body_not_kept", 1));
    // What fits is repeated, whatever was reserved before: it was given back.
    for sent in [4, 7] {
        client.send(request("PUT", "/", &[], "ten bytes.")).await;
        assert_eq!(peer.count(), sent);
    }
    let quota = world.quotas.of(1);
    let held = quota.reserve(1);
    assert!(held.is_some());
    client.send(request("PUT", "/", &[], "ten bytes.")).await;
    assert_eq!(peer.count(), 8);
    let mut neighbour = world.connect_from(2, "cart", Wire::Http1).await;
    neighbour.send(request("PUT", "/", &[], "ten bytes.")).await;
    assert_eq!(peer.count(), 11);
    // No body, nothing to keep.
    client.get("/").await;
    assert_eq!(peer.count(), 14);
}

#[tokio::test]
async fn a_body_is_kept_no_longer_than_it_may_be_sent_again() {
    let gate = Arc::new(Semaphore::new(0));
    let peer = holding(&gate).await;
    let limits = QuotaLimits {
        bytes: 10,
        ..QuotaLimits::default()
    };
    let world = World::bounded(&[peer.address], limits);
    let quota = world.quotas.of(1);
    let mut client = world.connect_from(1, "cart", Wire::Http1).await;
    let request = request("PUT", "/", &[HOLD], "ten bytes.");
    let response = client.start(request).await.unwrap();
    assert!(quota.reserve(10).is_some(), "while the answer goes on");
    gate.add_permits(1);
    let body = response.into_body().collect().await.unwrap();
    assert_eq!(body.to_bytes(), "firstlast");
    assert_eq!(peer.heard()[0].body, "ten bytes.");
}
