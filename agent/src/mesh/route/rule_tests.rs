use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::super::testing::{backend, rule, target};
use super::super::{RouteKind, SessionCarrier};
use super::*;

fn with(backends: Vec<Backend>) -> Rule {
    Rule {
        backends,
        ..(*rule(RouteKind::Http, "r", vec![RequestMatch::any()])).clone()
    }
}

fn shares(rule: &Rule, names: &[&str]) -> Vec<f64> {
    const DRAWS: u32 = 20_000;
    let mut rng = SmallRng::seed_from_u64(3);
    let mut counts = vec![0_u32; names.len()];
    for _ in 0..DRAWS {
        let chosen = &rule.choose(None, &mut rng).unwrap().target;
        let index = names.iter().position(|name| target(name) == *chosen);
        counts[index.unwrap()] += 1;
    }
    counts
        .into_iter()
        .map(|count| f64::from(count) / f64::from(DRAWS))
        .collect()
}

/// Conformance: HTTPRouteWeight.
#[test]
fn each_backend_has_its_weights_share() {
    let rule = with(vec![backend("v1", 70), backend("v2", 30), backend("v3", 0)]);
    let shares = shares(&rule, &["v1", "v2", "v3"]);
    assert!((shares[0] - 0.7).abs() < 0.02, "{shares:?}");
    assert!((shares[1] - 0.3).abs() < 0.02, "{shares:?}");
    assert!(shares[2] == 0.0, "{shares:?}");
}

#[test]
fn the_largest_weights_do_not_overflow() {
    let rule = with((0..16).map(|_| backend("v1", u32::MAX)).collect());
    assert_eq!(shares(&rule, &["v1"]), [1.0]);
}

#[test]
fn without_a_backend_or_a_weight_there_is_no_choice() {
    let mut rng = SmallRng::seed_from_u64(3);
    assert_eq!(with(Vec::new()).choose(None, &mut rng), None);
    let zero = with(vec![backend("v1", 0), backend("v2", 0)]);
    assert_eq!(zero.choose(None, &mut rng), None);
}

#[test]
fn an_invalid_backend_has_its_share_too() {
    let reason = InvalidBackend::BackendNotFound;
    let invalid = Backend::new(BackendTarget::Invalid { reason }, 1, Filters::default());
    let rule = with(vec![invalid, backend("v1", 1)]);
    let mut rng = SmallRng::seed_from_u64(3);
    let wrong = (0..10_000)
        .filter(|_| {
            let chosen = rule.choose(None, &mut rng).unwrap();
            chosen.target == BackendTarget::Invalid { reason }
        })
        .count();
    assert!((4_800..5_200).contains(&wrong), "{wrong}");
}

/// GEP-1619: persistence holds even if the weight is 0 by now.
#[test]
fn a_session_stays_with_its_backend_as_long_as_that_is_there() {
    use std::time::{Duration, SystemTime};
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
    let carrier = SessionCarrier::Header(http::HeaderName::from_static("x-session"));
    let persistence = SessionPersistence::new("r", carrier);
    let endpoint = "10.0.0.1:8080".parse().unwrap();
    let (name, token) = persistence
        .answer(None, &backend("v2", 1), endpoint, now)
        .unwrap();
    let headers = http::HeaderMap::from_iter([(name, token)]);
    let session = persistence.read(&headers, now).unwrap();
    let mut rng = SmallRng::seed_from_u64(3);
    let moved = with(vec![backend("v1", 100), backend("v2", 0)]);
    for _ in 0..100 {
        let chosen = moved.choose(Some(&session), &mut rng).unwrap();
        assert_eq!(chosen.target, target("v2"));
    }
    let gone = with(vec![backend("v1", 100)]);
    let chosen = gone.choose(Some(&session), &mut rng).unwrap();
    assert_eq!(chosen.target, target("v1"));
}
