//! Who is ejected, for whom, for how long, and how many at most.

use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::resilience::balance::BalanceSettings;
use crate::resilience::destination::{Ask, Probing, Source};
use crate::resilience::endpoint::Member;
use crate::resilience::outcome::{Failure, Outcome, Unsent};
use crate::resilience::testing::{Bench, bench};

const BAD: Outcome = Outcome::Failure(Failure::Reset);
const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

fn settings() -> EjectionSettings {
    EjectionSettings {
        failure_ratio: None,
        success_rate: None,
        panic_threshold: 0.0,
        ejection_time: crate::resilience::Backoff {
            base: SECOND,
            cap: 30 * SECOND,
            jitter: 0.0,
        },
        ..EjectionSettings::default()
    }
}

fn setup(count: u32, ejection: EjectionSettings) -> Bench {
    // Not by latency: a failing endpoint would be avoided before it is ejected.
    let balance = BalanceSettings {
        algorithm: crate::resilience::Algorithm::LeastRequest,
        ..BalanceSettings::default()
    };
    bench(count, balance, ejection)
}

/// Sends to one endpoint, whatever the balancer would like.
fn send(bench: &mut Bench, source: &Arc<Source<u32>>, target: u32, outcome: Outcome) {
    let others: Vec<u32> = (0..bench.destination.len() as u32 + 50)
        .filter(|other| *other != target)
        .collect();
    let ask = Ask {
        tried: &others,
        probing: Probing::Forbidden,
        ..Ask::default()
    };
    let attempt = bench.pick(source, &ask);
    if *attempt.target() == target {
        attempt.finish(outcome, bench.now);
    }
}

fn is_out(bench: &Bench, target: u32) -> bool {
    bench
        .destination
        .endpoint(&target)
        .is_some_and(|endpoint| endpoint.is_ejected())
}

fn eject_for_all(bench: &mut Bench, target: u32) {
    let sources = [bench.source(1), bench.source(2), bench.source(3)];
    for round in 0..6 {
        send(bench, &sources[round % 3], target, BAD);
    }
}

#[test]
fn a_source_that_sees_failures_ejects_for_itself_at_once() {
    let mut bench = setup(10, settings());
    let (one, other) = (bench.source(1), bench.source(2));
    send(&mut bench, &other, 3, Outcome::Success);
    for _ in 0..5 {
        send(&mut bench, &one, 3, BAD);
    }
    assert!(!is_out(&bench, 3));
    let scopes: Vec<Scope> = bench.movements().iter().map(|moved| moved.scope).collect();
    assert_eq!(scopes, [Scope::Source(SourceId(1))]);
    let ask = Ask {
        probing: Probing::Forbidden,
        ..Ask::default()
    };
    let mut others_pick = 0;
    for _ in 0..1000 {
        assert_ne!(*bench.pick(&one, &ask).target(), 3);
        others_pick += u32::from(*bench.pick(&other, &ask).target() == 3);
    }
    assert!(others_pick > 0);
}

#[test]
fn what_two_sources_saw_is_ejected_for_everybody() {
    let mut bench = setup(10, settings());
    let sources = [bench.source(1), bench.source(2)];
    for round in 0..5 {
        send(&mut bench, &sources[round % 2], 3, BAD);
    }
    assert!(is_out(&bench, 3));
}

#[test]
fn the_only_source_there_is_ejects_for_everybody() {
    let mut bench = setup(10, settings());
    let alone = bench.source(1);
    for _ in 0..5 {
        send(&mut bench, &alone, 3, BAD);
    }
    assert!(is_out(&bench, 3));
}

#[test]
fn one_tenant_whose_requests_always_fail_poisons_nothing_for_the_others() {
    let mut bench = setup(
        10,
        EjectionSettings {
            panic_threshold: 0.0,
            ..EjectionSettings::default()
        },
    );
    let (tenant, others) = (bench.source(1), [bench.source(2), bench.source(3)]);
    for round in 0..2000 {
        bench.now = bench.now + MS;
        let attempt = bench.pick(&tenant, &Ask::default());
        attempt.finish(BAD, bench.now);
        // The others fail once in a hundred.
        let outcome = if round % 100 == 7 {
            BAD
        } else {
            Outcome::Success
        };
        bench
            .pick(&others[round % 2], &Ask::default())
            .finish(outcome, bench.now);
        bench.destination.maintain(bench.now);
    }
    assert_eq!(bench.destination.ejector().ejected(), 0);
    assert!(
        bench
            .movements()
            .iter()
            .all(|moved| moved.scope == Scope::Source(SourceId(1)))
    );
}

#[test]
fn local_sheds_and_cancellations_never_eject_an_innocent_endpoint() {
    let mut bench = setup(4, EjectionSettings::default());
    let source = bench.source(1);
    for _ in 0..1000 {
        for outcome in [
            Outcome::Shed,
            Outcome::Cancelled,
            Outcome::Unsent(Unsent::GoingAway),
        ] {
            bench
                .pick(&source, &Ask::default())
                .finish(outcome, bench.now);
        }
        drop(bench.pick(&source, &Ask::default()));
    }
    assert!(bench.movements().is_empty());
}

#[test]
fn connect_failures_of_opaque_tcp_eject_like_failed_requests() {
    let mut bench = setup(4, settings());
    let source = bench.source(1);
    for _ in 0..5 {
        send(
            &mut bench,
            &source,
            2,
            Outcome::Unsent(Unsent::ConnectFailed),
        );
    }
    assert!(is_out(&bench, 2));
}

#[test]
fn endpoints_are_never_all_ejected_whatever_fails() {
    for count in 1..12 {
        let mut bench = setup(count, settings());
        for target in 0..count {
            eject_for_all(&mut bench, target);
        }
        let allowed = settings().ejectable(count as usize);
        assert_eq!(bench.destination.ejector().ejected(), allowed, "of {count}");
        assert!(allowed < count as usize);
    }
}

#[test]
fn the_bound_holds_when_endpoints_are_removed_while_others_are_ejected() {
    let mut bench = setup(10, settings());
    for target in 0..5 {
        eject_for_all(&mut bench, target);
        bench.now = bench.now + MS;
    }
    assert_eq!(bench.destination.ejector().ejected(), 5);
    for target in 5..9 {
        bench.destination.remove(&target, bench.now);
    }
    assert_eq!(bench.destination.len(), 6);
    assert_eq!(bench.destination.ejector().ejected(), 3);
    let floor = bench
        .movements()
        .iter()
        .filter(|moved| moved.change == Change::Returned(Return::Floor))
        .count();
    assert_eq!(floor, 2);
}

#[test]
fn a_bad_probe_doubles_the_time_and_a_good_one_returns_the_endpoint() {
    let mut bench = setup(10, settings());
    let source = bench.source(9);
    eject_for_all(&mut bench, 3);
    for expected in [1, 2, 4] {
        let almost = bench.now + (expected * SECOND - MS);
        bench.now = almost;
        assert!(!bench.pick(&source, &Ask::default()).is_probe());
        bench.now = bench.now + MS;
        let probe = bench.pick(&source, &Ask::default());
        assert!(probe.is_probe());
        assert_eq!(*probe.target(), 3);
        assert!(
            !bench.pick(&source, &Ask::default()).is_probe(),
            "one probe at a time"
        );
        probe.finish(BAD, bench.now);
    }
    bench.now = bench.now + 8 * SECOND;
    bench
        .pick(&source, &Ask::default())
        .finish(Outcome::Success, bench.now);
    assert!(!is_out(&bench, 3));
    assert!(matches!(
        bench.movements().last().unwrap().change,
        Change::Returned(Return::ProbeSucceeded)
    ));
}

#[test]
fn a_cancelled_or_shed_probe_of_an_endpoint_frees_its_place() {
    let mut bench = setup(10, settings());
    let source = bench.source(9);
    eject_for_all(&mut bench, 3);
    bench.now = bench.now + SECOND;
    drop(bench.pick(&source, &Ask::default()));
    bench
        .pick(&source, &Ask::default())
        .finish(Outcome::Cancelled, bench.now);
    bench
        .pick(&source, &Ask::default())
        .finish(Outcome::Shed, bench.now);
    let probe = bench.pick(&source, &Ask::default());
    assert!(probe.is_probe());
    probe.finish(Outcome::Success, bench.now);
    assert!(!is_out(&bench, 3));
}

#[test]
fn a_request_that_cannot_be_repeated_is_no_probe() {
    let mut bench = setup(10, settings());
    let source = bench.source(9);
    eject_for_all(&mut bench, 3);
    bench.now = bench.now + SECOND;
    let ask = Ask {
        probing: Probing::Forbidden,
        ..Ask::default()
    };
    assert!(!bench.pick(&source, &ask).is_probe());
}

#[test]
fn a_straggler_is_not_the_probes_verdict() {
    let mut bench = setup(10, settings());
    let source = bench.source(9);
    // Two attempts that hang since before the ejection.
    let others: Vec<u32> = (0..10).filter(|target| *target != 3).collect();
    let ask = Ask {
        tried: &others,
        probing: Probing::Forbidden,
        ..Ask::default()
    };
    let (good, bad) = (bench.pick(&source, &ask), bench.pick(&source, &ask));
    assert_eq!((*good.target(), *bad.target()), (3, 3));
    bench.now = bench.now + MS;
    eject_for_all(&mut bench, 3);
    bench.now = bench.now + SECOND;
    let probe = bench.pick(&source, &Ask::default());
    assert!(probe.is_probe());
    good.finish(Outcome::Success, bench.now);
    assert!(is_out(&bench, 3), "an old success does not bring it back");
    probe.finish(Outcome::Success, bench.now);
    bad.finish(BAD, bench.now);
    let (ok, failed) = bench
        .destination
        .endpoint(&3)
        .unwrap()
        .health
        .counts(bench.now);
    assert_eq!(
        (ok, failed),
        (0, 0),
        "an old failure does not count against the returned"
    );
}

#[test]
fn a_straggling_probe_decides_nothing_about_a_later_ejection() {
    let mut bench = setup(10, settings());
    let source = bench.source(9);
    eject_for_all(&mut bench, 3);
    bench.now = bench.now + SECOND;
    let probe = bench.pick(&source, &Ask::default());
    bench.destination.remove(&3, bench.now);
    bench.destination.put(&Member::new(3), bench.now);
    eject_for_all(&mut bench, 3);
    assert!(is_out(&bench, 3));
    probe.finish(Outcome::Success, bench.now);
    assert!(is_out(&bench, 3));
}

#[test]
fn an_endpoint_that_discovery_takes_away_and_brings_back_is_as_sick_as_before() {
    let mut bench = setup(10, settings());
    eject_for_all(&mut bench, 3);
    bench.destination.remove(&3, bench.now);
    bench.destination.put(&Member::new(3), bench.now);
    bench.movements();
    eject_for_all(&mut bench, 3);
    assert!(matches!(
        bench.movements()[0].change,
        Change::Ejected { times: 2, .. }
    ));
}

#[test]
fn the_failure_ratio_ejects_what_never_fails_five_times_in_a_row() {
    let mut bench = setup(
        10,
        EjectionSettings {
            failure_ratio: EjectionSettings::default().failure_ratio,
            ..settings()
        },
    );
    let sources = [bench.source(1), bench.source(2), bench.source(3)];
    for round in 0..12 {
        let outcome = if round % 3 == 0 {
            Outcome::Success
        } else {
            BAD
        };
        send(&mut bench, &sources[round % 2], 3, outcome);
    }
    let moved = bench.movements();
    assert!(
        matches!(
            moved[0].change,
            Change::Ejected {
                cause: Cause::FailureRatio { .. },
                ..
            }
        ),
        "{moved:?}"
    );
    assert_eq!(moved[0].scope, Scope::Everyone);
}

#[test]
fn an_endpoint_worse_than_its_peers_is_ejected_and_equals_are_not() {
    let only_peers = EjectionSettings {
        consecutive_failures: None,
        success_rate: EjectionSettings::default().success_rate,
        ..settings()
    };
    let mut bench = setup(10, only_peers);
    let sources = [bench.source(1), bench.source(2), bench.source(3)];
    for round in 0..6000u32 {
        bench.now = bench.now + MS;
        let attempt = bench.pick(&sources[round as usize % 3], &Ask::default());
        let share = if *attempt.target() == 7 { 4 } else { 100 };
        let outcome = if (round / 3) % share == 0 {
            BAD
        } else {
            Outcome::Success
        };
        attempt.finish(outcome, bench.now);
        // The first call only starts the clock.
        bench.destination.maintain(bench.now);
    }
    bench.now = bench.now + 6 * SECOND;
    bench.destination.maintain(bench.now);
    let out: Vec<String> = bench
        .movements()
        .into_iter()
        .map(|moved| moved.endpoint)
        .collect();
    assert_eq!(out, ["7"]);
}

#[test]
fn below_the_panic_threshold_ejection_is_ignored() {
    let mut bench = setup(
        10,
        EjectionSettings {
            max_ejected: 0.9,
            panic_threshold: 0.5,
            ..settings()
        },
    );
    let source = bench.source(9);
    for target in 0..6 {
        eject_for_all(&mut bench, target);
    }
    let ask = Ask {
        probing: Probing::Forbidden,
        ..Ask::default()
    };
    let to_ejected = (0..1000)
        .filter(|_| *bench.pick(&source, &ask).target() < 6)
        .count();
    assert!(to_ejected > 200, "{to_ejected}");
}

#[test]
fn a_good_probe_brings_the_others_nearer() {
    let mut bench = setup(
        10,
        EjectionSettings {
            ejection_time: crate::resilience::Backoff {
                base: 8 * SECOND,
                cap: 60 * SECOND,
                jitter: 0.0,
            },
            ..settings()
        },
    );
    let source = bench.source(9);
    eject_for_all(&mut bench, 1);
    bench.now = bench.now + 4 * SECOND;
    eject_for_all(&mut bench, 2);
    bench.now = bench.now + 4 * SECOND;
    bench
        .pick(&source, &Ask::default())
        .finish(Outcome::Success, bench.now);
    bench.now = bench.now + 2 * SECOND;
    let probe = bench.pick(&source, &Ask::default());
    assert_eq!((probe.is_probe(), *probe.target()), (true, 2));
}

proptest! {
    #[test]
    fn the_floor_is_never_broken_while_endpoints_fail_come_and_go(
        steps in proptest::collection::vec((0u8..10, 0u32..24, 0u64..3, 0u64..800), 1..300),
        max_ejected in 0.0..1.0f64,
        floor in 1u32..4,
    ) {
        let settings = EjectionSettings { max_ejected, floor, ..settings() };
        let mut bench = setup(8, settings);
        let sources: Vec<_> = (0..3).map(|id| bench.source(id)).collect();
        for (action, target, source, gap) in steps {
            bench.now = bench.now + Duration::from_millis(gap);
            match action {
                0 => bench.destination.put(&Member::new(target), bench.now),
                1 if bench.destination.len() > 1 => bench.destination.remove(&target, bench.now),
                2..6 => eject_for_all(&mut bench, target),
                6..8 => for _ in 0..5 {
                    send(&mut bench, &sources[source as usize], target, BAD);
                },
                _ if bench.destination.is_empty() => {}
                8 => bench.pick(&sources[source as usize], &Ask::default()).finish(Outcome::Success, bench.now),
                _ => drop(bench.pick(&sources[source as usize], &Ask::default())),
            }
            let total = bench.destination.len();
            let out = bench.destination.endpoints().iter().filter(|endpoint| endpoint.is_ejected()).count();
            prop_assert_eq!(out, bench.destination.ejector().ejected());
            prop_assert!(out <= settings.ejectable(total), "{} of {}", out, total);
            if total > 0 {
                prop_assert!(out < total);
                prop_assert!(out + floor as usize <= total.max(floor as usize));
            }
            for source in &sources {
                let own = bench.destination.endpoints().iter().filter(|endpoint| source.ejects(endpoint.target())).count();
                prop_assert!(out + own <= settings.ejectable(total), "{} and {} of {}", out, own, total);
            }
        }
    }
}
