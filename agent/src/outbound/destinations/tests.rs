use std::collections::BTreeSet;
use std::time::Duration;

use arc_swap::ArcSwap;
use serde_json::json;

use super::*;
use crate::http::Crowded;
use crate::mesh::policy::{Layer, ServiceLayers};
use crate::mesh::{Endpoint, ObjectName, Readiness, Service, ServicePort, WorkloadUid};
use crate::resilience::BreakerBook;
use crate::resilience::destination::Ask;
use crate::resilience::event::NoSink;
use crate::resilience::limit::{LimitSettings, Rate};
use crate::resilience::{BreakerSettings, BreakerState, Failure, Outcome};
use crate::telemetry::testing::workload;

pub(super) fn id() -> DestinationId {
    DestinationId {
        service: ObjectName::new("shop", "cart"),
        port: 80,
        traffic: Traffic::Connections,
    }
}

pub(in crate::outbound) fn endpoint(address: &str, ready: bool) -> Endpoint {
    Endpoint {
        address: address.parse().unwrap(),
        readiness: Readiness::of(ready, false),
        workload: Some(WorkloadUid(format!("uid-{address}").into())),
    }
}

pub(in crate::outbound) fn mesh(endpoints: &[Endpoint]) -> Snapshot {
    let mut snapshot = Snapshot::default();
    snapshot.insert_service(Arc::new(Service {
        name: id().service,
        vips: vec![[10, 96, 0, 1].into()],
        ports: vec![ServicePort {
            name: "".into(),
            port: 80,
            app_protocol: None,
            opaque: false,
            endpoints: endpoints.into(),
        }],
    }));
    snapshot
}

pub(in crate::outbound) fn destinations(snapshot: Snapshot) -> (Arc<Destinations>, SharedSnapshot) {
    let shared: SharedSnapshot = Arc::new(ArcSwap::from_pointee(snapshot));
    let destinations =
        Destinations::new(shared.clone(), "node-a", Clock::start(), Arc::new(NoSink));
    (destinations, shared)
}

/// What a pod reaches that dialled the Service over IPv4.
pub(in crate::outbound) fn reachable(destinations: &Destinations, client: &str) -> Reachable {
    let snapshot = destinations.snapshot.load_full();
    let destination = destinations.of(&id(), &snapshot).unwrap();
    let mut pod = Arc::unwrap_or_clone(workload("web", "10.0.0.1"));
    pod.addresses = client.split(' ').map(|one| one.parse().unwrap()).collect();
    let dialled = SocketAddr::from(([10, 96, 0, 1], 80));
    let now = destinations.clock().now();
    destination.reachable(&pod, SourceId(1), dialled, now)
}

fn picked(reachable: &Reachable, tried: &[EndpointId]) -> Option<EndpointId> {
    let ask = Ask {
        tried,
        ..Ask::default()
    };
    let attempt = reachable.pick(&ask, &mut rand::rng(), crate::resilience::Timestamp::ZERO);
    attempt.map(|attempt| attempt.target().clone())
}

#[test]
fn a_destination_outlives_snapshots_and_follows_their_endpoints() {
    let (one, two) = (endpoint("10.0.1.1:80", true), endpoint("10.0.1.2:80", true));
    let (destinations, shared) = destinations(mesh(std::slice::from_ref(&one)));
    let old = shared.load_full();
    let first = destinations.of(&id(), &old).unwrap();
    assert_eq!(reachable(&destinations, "10.0.0.1").len(), 1);
    shared.store(Arc::new(mesh(&[one, two])));
    let same = destinations.of(&id(), &shared.load()).unwrap();
    assert!(Arc::ptr_eq(&first, &same));
    assert_eq!(reachable(&destinations, "10.0.0.1").len(), 2);
    // Who holds an older snapshot does not bring it back for others.
    destinations.of(&id(), &old).unwrap();
    assert_eq!(reachable(&destinations, "10.0.0.1").len(), 2);
}

#[test]
fn only_endpoints_that_are_ready_are_picked() {
    let endpoints = [
        endpoint("10.0.1.1:80", false),
        endpoint("10.0.1.2:80", true),
        endpoint("10.0.1.3:80", false),
    ];
    let (destinations, shared) = destinations(mesh(&endpoints));
    let reachable = reachable(&destinations, "10.0.0.1");
    for _ in 0..50 {
        assert_eq!(picked(&reachable, &[]), Some((&endpoints[1]).into()));
    }
    shared.store(Arc::new(mesh(&endpoints[..1])));
    assert_eq!(destinations.maintain(), [endpoints[1].address]);
    assert!(destinations.maintain().is_empty());
    assert_eq!(picked(&reachable, &[]), None);
}

#[test]
fn endpoints_that_are_leaving_are_picked_only_while_none_is_ready() {
    let leaving = |address: &str| Endpoint {
        readiness: Readiness::Leaving,
        ..endpoint(address, true)
    };
    let ready = endpoint("10.0.1.1:80", true);
    let unready = endpoint("10.0.1.3:80", false);
    let (one, two) = (leaving("10.0.1.1:80"), leaving("10.0.1.2:80"));
    let (destinations, shared) = destinations(mesh(&[ready.clone(), two.clone()]));
    let reachable = reachable(&destinations, "10.0.0.1");
    for _ in 0..50 {
        assert_eq!(picked(&reachable, &[]), Some((&ready).into()));
    }
    shared.store(Arc::new(mesh(&[one.clone(), two.clone(), unready.clone()])));
    assert!(destinations.maintain().is_empty(), "it still gets requests");
    let both = BTreeSet::from([one.address, two.address]);
    let seen = |_| picked(&reachable, &[]).unwrap().address;
    assert_eq!((0..200).map(seen).collect::<BTreeSet<_>>(), both);
    // One that is ready again takes it all.
    let back = endpoint("10.0.1.3:80", true);
    shared.store(Arc::new(mesh(&[one, two, back.clone()])));
    let departed: BTreeSet<_> = destinations.maintain().into_iter().collect();
    assert_eq!(departed, both);
    assert_eq!(picked(&reachable, &[]), Some((&back).into()));
    shared.store(Arc::new(mesh(&[unready])));
    destinations.maintain();
    assert_eq!(picked(&reachable, &[]), None);
}

#[tokio::test]
async fn opaque_connections_and_requests_to_a_port_share_one_limit_whichever_came_first() {
    let limited = |most: Option<u32>| {
        let mut snapshot = mesh(&[endpoint("10.0.1.1:80", true)]);
        let spec = most.map(|most| {
            let cart = json!([{"kind": "Service", "name": "cart"}]);
            json!({"targetRefs": cart, "limits": {"connections": most, "pending": 0}})
        });
        let layer = |spec| Layer {
            name: ObjectName::new("shop", "limits"),
            spec: Arc::new(serde_json::from_value(spec).unwrap()),
        };
        let whole = spec.into_iter().map(layer).collect();
        let layers = ServiceLayers {
            whole,
            ..ServiceLayers::default()
        };
        snapshot.set_service_policies(&id().service, Some(layers));
        snapshot
    };
    let requests = DestinationId {
        traffic: Traffic::Requests,
        ..id()
    };
    for [first, second] in [[id(), requests.clone()], [requests.clone(), id()]] {
        let (destinations, shared) = destinations(limited(Some(2)));
        let places = |id: &DestinationId| {
            let destination = destinations.of(id, &shared.load()).unwrap();
            destination.places()
        };
        let _one = places(&first).unwrap().take().await.unwrap();
        let two = places(&second).unwrap().take().await.unwrap();
        let crowded = places(&first).unwrap().take().await;
        assert_eq!(crowded.unwrap_err(), Crowded::Connections);
        // What is open counts under another limit too, also after there was none.
        shared.store(Arc::new(limited(None)));
        assert!(places(&first).is_none() && places(&second).is_none());
        shared.store(Arc::new(limited(Some(1))));
        assert!(places(&second).unwrap().take().await.is_err());
        drop(two);
        assert!(places(&second).unwrap().take().await.is_err());
        assert_eq!(places(&first).unwrap().counts().taken, 1);
        let shown = destinations.list();
        let shown = shown[0].connections.unwrap();
        assert_eq!((shown.open, shown.in_vain), (1, 3));
    }
}

#[test]
fn the_family_that_was_dialled_comes_first_and_the_other_only_for_who_has_it() {
    let (v4, v6) = (
        endpoint("10.0.1.1:80", true),
        endpoint("[fd00::1]:80", true),
    );
    let (destinations, _shared) = destinations(mesh(&[v4.clone(), v6.clone()]));
    let (v4, v6) = (EndpointId::from(&v4), EndpointId::from(&v6));
    let dual = reachable(&destinations, "10.0.0.1 fd00::9");
    for _ in 0..50 {
        assert_eq!(picked(&dual, &[]).as_ref(), Some(&v4));
    }
    assert_eq!(picked(&dual, std::slice::from_ref(&v4)), Some(v6));
    let single = reachable(&destinations, "10.0.0.1");
    assert_eq!(picked(&single, std::slice::from_ref(&v4)), Some(v4));
}

#[test]
fn live_connections_spread_evenly() {
    let endpoints: Vec<Endpoint> = (0..10)
        .map(|n| endpoint(&format!("10.0.1.{n}:80"), true))
        .collect();
    let (destinations, _shared) = destinations(mesh(&endpoints));
    let reachable = reachable(&destinations, "10.0.0.1");
    let clock = destinations.clock();
    let held: Vec<_> = (0..1000)
        .map(|_| reachable.pick(&Ask::default(), &mut rand::rng(), clock.now()))
        .collect();
    assert!(held.iter().all(Option::is_some));
    for one in destinations.all()[0].balanced()[0].endpoints() {
        let load = one.in_flight();
        assert!((95..=105).contains(&load), "{load} of 1000");
    }
}

#[test]
fn a_pod_that_got_the_address_of_another_is_another_endpoint() {
    let before = endpoint("10.0.1.1:80", true);
    let (destinations, shared) =
        destinations(mesh(&[before.clone(), endpoint("10.0.1.2:80", true)]));
    let one = reachable(&destinations, "10.0.0.1");
    let now = destinations.clock().now();
    let bad: EndpointId = (&before).into();
    let mut failures = 0;
    while failures < 5 {
        let attempt = one.pick(&Ask::default(), &mut rand::rng(), now).unwrap();
        if *attempt.target() == bad {
            failures += 1;
            attempt.finish(Outcome::Failure(Failure::Reset), now);
        }
    }
    let balanced = destinations.all()[0].balanced()[0].clone();
    assert!(balanced.endpoint(&bad).unwrap().is_ejected());
    let after = Endpoint {
        workload: Some(WorkloadUid("uid-another".into())),
        ..before
    };
    shared.store(Arc::new(mesh(&[
        after.clone(),
        endpoint("10.0.1.2:80", true),
    ])));
    destinations.maintain();
    assert!(balanced.endpoint(&bad).is_none());
    assert!(!balanced.endpoint(&(&after).into()).unwrap().is_ejected());
}

#[test]
fn a_service_that_is_gone_is_forgotten() {
    let (destinations, shared) = destinations(mesh(&[endpoint("10.0.1.1:80", true)]));
    let reachable = reachable(&destinations, "10.0.0.1");
    shared.store(Arc::default());
    assert!(destinations.of(&id(), &shared.load()).is_none());
    assert_eq!(picked(&reachable, &[]), None);
    destinations.maintain();
    assert!(destinations.all().is_empty());
}

#[test]
fn a_route_keeps_its_breaker_until_the_breakers_settings_change() {
    let (destinations, shared) = destinations(mesh(&[]));
    let destination = destinations.of(&id(), &shared.load()).unwrap();
    let now = destinations.clock().now();
    let breaker = BreakerSettings {
        consecutive: Some(1),
        ..BreakerSettings::default()
    };
    let mut limits = LimitSettings::default();
    let key = RouteKey::Rule("HTTPRoute/shop/cart/0".into());
    let route = destination.route(&key, &breaker, &limits, now);
    let permit = route.breaker.admit(now).unwrap();
    permit.finish(Outcome::Failure(Failure::Reset), now);
    assert_eq!(route.breaker.state(), BreakerState::Open);
    limits.concurrency = Some(1);
    limits.rates.route = Some(Rate {
        per_second: 1.0,
        burst: 1,
    });
    let limited = destination.route(&key, &breaker, &limits, now);
    assert!(Arc::ptr_eq(&route.breaker, &limited.breaker));
    let rates = limited.rates.as_ref().unwrap();
    assert!(rates.take(SourceId(1), now).is_ok());
    let place = limited.places.as_ref().unwrap().take().unwrap();
    // The same settings again do not fill a bucket, and others do not free a place.
    let again = destination.route(&key, &breaker, &limits, now);
    assert!(
        again
            .rates
            .as_ref()
            .unwrap()
            .take(SourceId(1), now)
            .is_err()
    );
    let others = destination.route(&key, &BreakerSettings::default(), &limits, now);
    assert_eq!(others.breaker.state(), BreakerState::Closed);
    assert!(others.places.as_ref().unwrap().take().is_err());
    drop(place);
}

#[test]
fn routes_beyond_the_bound_share_one_breaker_and_idle_ones_make_room() {
    let (destinations, shared) = destinations(mesh(&[]));
    let destination = destinations.of(&id(), &shared.load()).unwrap();
    let now = destinations.clock().now();
    let route = |name: String| {
        let key = RouteKey::Rule(name.into());
        let (breaker, limits) = (BreakerSettings::default(), LimitSettings::default());
        destination.route(&key, &breaker, &limits, now)
    };
    let mut keys = BTreeSet::new();
    for n in 0..1100 {
        keys.insert(route(n.to_string()).key.clone());
    }
    assert_eq!(keys.len(), 1025);
    assert!(keys.contains(&RouteKey::Others));
    let held = route("0".into());
    destination.maintain(now + Duration::from_secs(601));
    let left: Vec<RouteKey> = destination
        .routes()
        .iter()
        .map(|one| one.key.clone())
        .collect();
    assert_eq!(left, std::slice::from_ref(&held.key));
}
