//! Where attempts go.

use std::collections::HashMap;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::resilience::destination::{Ask, Attempt};
use crate::resilience::ejection::EjectionSettings;
use crate::resilience::endpoint::Member;
use crate::resilience::outcome::{Failure, Outcome};
use crate::resilience::testing::{Bench, bench};
use crate::resilience::time::Timestamp;

const MS: Duration = Duration::from_millis(1);
const BAD: Outcome = Outcome::Failure(Failure::Reset);

fn setup(count: u32, algorithm: Algorithm) -> Bench {
    let balance = BalanceSettings {
        algorithm,
        ..BalanceSettings::default()
    };
    bench(count, balance, EjectionSettings::default())
}

fn shares(bench: &mut Bench, picks: u32, hash: Option<u64>) -> HashMap<u32, u32> {
    let source = bench.source(1);
    let mut shares = HashMap::new();
    for _ in 0..picks {
        let ask = Ask {
            hash,
            ..Ask::default()
        };
        *shares
            .entry(*bench.pick(&source, &ask).target())
            .or_default() += 1;
    }
    shares
}

#[test]
fn peak_ewma_turns_away_from_a_slow_endpoint() {
    let mut bench = setup(10, Algorithm::PeakEwma);
    let source = bench.source(1);
    let mut to_slow = 0;
    for round in 0..2000 {
        let attempt = bench.pick(&source, &Ask::default());
        let slow = *attempt.target() == 0;
        to_slow += u32::from(slow && round > 500);
        bench.now = bench.now + MS;
        let later = bench.now + if slow { 500 * MS } else { 5 * MS };
        attempt.finish(Outcome::Success, later);
    }
    assert!(to_slow < 15, "{to_slow}");
}

#[test]
fn an_endpoint_that_hangs_gets_no_more_than_a_few() {
    let mut bench = setup(10, Algorithm::PeakEwma);
    let source = bench.source(1);
    let mut hanging: Vec<Attempt<u32>> = Vec::new();
    for _ in 0..2000 {
        bench.now = bench.now + MS;
        let attempt = bench.pick(&source, &Ask::default());
        if *attempt.target() == 0 {
            hanging.push(attempt);
        } else {
            attempt.finish(Outcome::Success, bench.now + 5 * MS);
        }
    }
    assert!(hanging.len() < 20, "{}", hanging.len());
}

#[test]
fn a_stream_that_is_answered_and_stays_open_counts_as_load_but_not_as_a_wait() {
    let mut bench = setup(2, Algorithm::PeakEwma);
    let source = bench.source(1);
    let mut streams: Vec<Attempt<u32>> = Vec::new();
    for _ in 0..100 {
        let mut stream = bench.pick(&source, &Ask::default());
        bench.now = bench.now + MS;
        stream.answered(bench.now);
        streams.push(stream);
        // An hour in which nothing ends would look like an endpoint that hangs.
        bench.now = bench.now + 3_600_000 * MS;
    }
    for endpoint in bench.destination.endpoints() {
        let load = endpoint.in_flight();
        assert!((45..=55).contains(&load), "{load} of 100");
    }
    for mut stream in streams {
        stream.settle(Outcome::Success, bench.now);
        // Once told, it is no failure any more.
        stream.finish(BAD, bench.now);
    }
    assert!(
        bench
            .destination
            .endpoints()
            .iter()
            .all(|one| one.in_flight() == 0)
    );
    assert_eq!(bench.destination.ejector().ejected(), 0);
}

#[test]
fn an_endpoint_that_fails_at_once_does_not_draw_traffic() {
    let ejection = EjectionSettings {
        consecutive_failures: None,
        failure_ratio: None,
        success_rate: None,
        ..EjectionSettings::default()
    };
    let mut bench = bench(10, BalanceSettings::default(), ejection);
    let source = bench.source(1);
    let mut to_bad = 0;
    for _ in 0..2000 {
        bench.now = bench.now + MS;
        let attempt = bench.pick(&source, &Ask::default());
        if *attempt.target() == 0 {
            to_bad += 1;
            attempt.finish(BAD, bench.now);
        } else {
            attempt.finish(Outcome::Success, bench.now + 5 * MS);
        }
    }
    assert!(to_bad < 60, "{to_bad} of 2000, a fair share is 200");
}

#[test]
fn least_request_evens_out_what_is_in_flight() {
    let mut bench = setup(10, Algorithm::LeastRequest);
    let source = bench.source(1);
    let held: Vec<Attempt<u32>> = (0..1000)
        .map(|_| bench.pick(&source, &Ask::default()))
        .collect();
    let counts: Vec<u32> = bench
        .destination
        .endpoints()
        .iter()
        .map(|endpoint| endpoint.in_flight())
        .collect();
    assert!(
        counts.iter().all(|count| (90..110).contains(count)),
        "{counts:?}"
    );
    drop(held);
    assert!(
        bench
            .destination
            .endpoints()
            .iter()
            .all(|endpoint| endpoint.in_flight() == 0)
    );
}

#[test]
fn round_robin_goes_around() {
    let shares = shares(&mut setup(10, Algorithm::RoundRobin), 1000, None);
    assert!(shares.values().all(|share| *share == 100), "{shares:?}");
}

#[test]
fn weighted_follows_weights_even_after_changes() {
    let mut bench = setup(3, Algorithm::Weighted);
    for (target, weight) in [(0, 1), (1, 5), (2, 500), (3, 94), (2, 100), (9, 7)] {
        bench.destination.put(
            &Member {
                target,
                weight,
                tier: 0,
            },
            Timestamp::ZERO,
        );
    }
    bench.destination.remove(&9, Timestamp::ZERO);
    let shares = shares(&mut bench, 20_000, None);
    for (target, low, high) in [
        (0, 50, 170),
        (1, 400, 610),
        (2, 9600, 10_400),
        (3, 9000, 9800),
    ] {
        assert!((low..high).contains(&shares[&target]), "{shares:?}");
    }
}

#[test]
fn hashing_stays_with_an_endpoint_and_moves_little_when_the_set_changes() {
    for algorithm in [Algorithm::RingHash, Algorithm::Maglev] {
        let mut bench = setup(20, algorithm);
        let source = bench.source(1);
        let homes = |bench: &mut Bench| -> Vec<u32> {
            (0..2000u64)
                .map(|key| {
                    *bench
                        .pick(
                            &source,
                            &Ask {
                                hash: Some(key.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
                                ..Ask::default()
                            },
                        )
                        .target()
                })
                .collect()
        };
        let before = homes(&mut bench);
        assert_eq!(before, homes(&mut bench));
        bench.destination.remove(&5, bench.now);
        let after = homes(&mut bench);
        let moved = before
            .iter()
            .zip(&after)
            .filter(|(was, is)| **was != 5 && was != is)
            .count();
        assert!(moved < 200, "{algorithm:?} moved {moved}");
        let mut counts: HashMap<u32, u32> = HashMap::new();
        for home in after {
            *counts.entry(home).or_default() += 1;
        }
        assert_eq!(counts.len(), 19);
        assert!(
            counts.values().all(|count| *count < 300),
            "{algorithm:?} {counts:?}"
        );
    }
}

#[test]
fn a_hot_key_overflows_to_the_next_endpoint_when_its_home_is_loaded() {
    for algorithm in [Algorithm::RingHash, Algorithm::Maglev] {
        let mut bench = setup(10, algorithm);
        let source = bench.source(1);
        let held: Vec<Attempt<u32>> = (0..100)
            .map(|_| {
                bench.pick(
                    &source,
                    &Ask {
                        hash: Some(42),
                        ..Ask::default()
                    },
                )
            })
            .collect();
        let most = bench
            .destination
            .endpoints()
            .iter()
            .map(|endpoint| endpoint.in_flight())
            .max();
        assert!(most < Some(14), "{algorithm:?} {most:?}");
        drop(held);
    }
}

#[test]
fn the_near_tier_keeps_its_traffic_until_too_little_of_it_stands() {
    let ejection = EjectionSettings {
        max_ejected: 0.9,
        panic_threshold: 0.0,
        ..EjectionSettings::default()
    };
    let mut bench = bench(10, BalanceSettings::default(), ejection);
    for target in 10..20 {
        bench.destination.put(
            &Member {
                target,
                weight: 1,
                tier: 1,
            },
            Timestamp::ZERO,
        );
    }
    let near = |shares: &HashMap<u32, u32>| {
        shares
            .iter()
            .filter(|(target, _)| **target < 10)
            .map(|(_, share)| share)
            .sum::<u32>()
    };
    assert_eq!(near(&shares(&mut bench, 1000, None)), 1000);
    let sources = [bench.source(1), bench.source(2)];
    let eject = |bench: &mut Bench, target: u32| {
        let others: Vec<u32> = (0..20).filter(|other| *other != target).collect();
        for round in 0..6 {
            let ask = Ask {
                tried: &others,
                ..Ask::default()
            };
            bench.pick(&sources[round % 2], &ask).finish(BAD, bench.now);
        }
    };
    for target in 0..2 {
        eject(&mut bench, target);
    }
    assert_eq!(
        near(&shares(&mut bench, 1000, None)),
        1000,
        "80 % stand, and 71 % suffice"
    );
    for target in 2..6 {
        eject(&mut bench, target);
    }
    let share = near(&shares(&mut bench, 10_000, None));
    assert!((5200..6000).contains(&share), "40 % × 1.4 stay: {share}");
}

#[test]
fn a_new_endpoint_warms_up() {
    for algorithm in [
        Algorithm::PeakEwma,
        Algorithm::RoundRobin,
        Algorithm::Weighted,
        Algorithm::LeastRequest,
    ] {
        let mut bench = setup(9, algorithm);
        bench.destination.put(&Member::new(9), bench.now);
        let source = bench.source(1);
        let mut to_new = 0;
        for _ in 0..1000 {
            let attempt = bench.pick(&source, &Ask::default());
            to_new += u32::from(*attempt.target() == 9);
            attempt.finish(Outcome::Success, bench.now + 30 * MS);
        }
        assert!(to_new < 50, "{algorithm:?}: {to_new} of a fair 100");
        bench.now = bench.now + Duration::from_secs(20);
        assert!(shares(&mut bench, 1000, None)[&9] > 50, "{algorithm:?}");
    }
}

#[test]
fn churn_keeps_what_was_learned_of_those_that_stay_and_of_those_that_come_back() {
    let mut bench = setup(10, Algorithm::PeakEwma);
    let source = bench.source(1);
    for _ in 0..200 {
        let attempt = bench.pick(&source, &Ask::default());
        let latency = 100 * MS * (1 + *attempt.target());
        attempt.finish(Outcome::Success, bench.now + latency);
    }
    let learned = |bench: &Bench, target| {
        bench
            .destination
            .endpoint(&target)
            .unwrap()
            .load
            .nanos(bench.now)
    };
    let (stays, returns) = (learned(&bench, 4), learned(&bench, 5));
    let members: Vec<Member<u32>> = (0..20)
        .filter(|target| *target != 5)
        .map(Member::new)
        .collect();
    bench.destination.replace(&members, bench.now);
    assert_eq!(bench.destination.len(), 19);
    bench.destination.put(
        &Member {
            target: 4,
            weight: 3,
            tier: 1,
        },
        bench.now,
    );
    bench.destination.put(&Member::new(5), bench.now);
    assert_eq!(learned(&bench, 4), stays);
    assert_eq!(learned(&bench, 5), returns);
}

#[test]
fn a_retry_goes_elsewhere_first_and_back_when_there_is_no_elsewhere() {
    let mut bench = setup(3, Algorithm::PeakEwma);
    let source = bench.source(1);
    for _ in 0..200 {
        let ask = Ask {
            tried: &[0, 2],
            ..Ask::default()
        };
        assert_eq!(*bench.pick(&source, &ask).target(), 1);
        let ask = Ask {
            tried: &[0, 1, 2],
            ..Ask::default()
        };
        drop(bench.pick(&source, &ask));
    }
}

#[test]
fn a_worker_sees_the_newest_endpoints_and_gives_back_what_it_took() {
    let mut bench = setup(2, Algorithm::PeakEwma);
    let source = bench.source(1);
    let mut worker = source.worker();
    for target in [0, 1, 5] {
        bench.destination.replace(&[Member::new(target)], bench.now);
        let attempt = worker
            .pick(&Ask::default(), &mut bench.rng, bench.now)
            .unwrap();
        assert_eq!(*attempt.target(), target);
        let endpoint = bench.destination.endpoint(&target).unwrap();
        assert_eq!(endpoint.in_flight(), 1);
        attempt.finish(Outcome::Success, bench.now);
        assert_eq!(endpoint.in_flight(), 0);
    }
}

#[test]
fn a_destination_without_endpoints_says_so() {
    let bench = setup(0, Algorithm::PeakEwma);
    let mut rng = bench.rng.clone();
    assert!(
        bench
            .source(1)
            .pick(&Ask::default(), &mut rng, bench.now)
            .is_err()
    );
}

proptest! {
    #[test]
    fn no_ejected_endpoint_is_picked_while_another_stands(
        count in 2u32..40,
        failing in proptest::collection::vec(0u32..40, 0..60),
        algorithm in prop::sample::select(vec![Algorithm::PeakEwma, Algorithm::LeastRequest, Algorithm::RoundRobin, Algorithm::Weighted, Algorithm::RingHash, Algorithm::Maglev]),
        seed in 0u64..1000,
    ) {
        let ejection = EjectionSettings { max_ejected: 1.0, panic_threshold: 0.0, ..EjectionSettings::default() };
        let balance = BalanceSettings { algorithm, maglev_table: 251, ..BalanceSettings::default() };
        let mut bench = bench(count, balance, ejection);
        let sources = [bench.source(1), bench.source(2)];
        for target in failing.into_iter().filter(|target| *target < count) {
            let others: Vec<u32> = (0..count).filter(|other| *other != target).collect();
            for round in 0..6 {
                bench.pick(&sources[round % 2], &Ask { tried: &others, hash: Some(seed), ..Ask::default() }).finish(BAD, bench.now);
            }
        }
        prop_assert!(bench.destination.ejector().ejected() < count as usize);
        for pick in 0..200u64 {
            let attempt = bench.pick(&sources[0], &Ask { hash: Some(seed.wrapping_mul(pick)), ..Ask::default() });
            let ejected = bench.destination.endpoint(attempt.target()).unwrap().is_ejected();
            prop_assert!(!ejected);
        }
    }
}

#[test]
fn a_session_gets_its_endpoint_as_long_as_that_stands() {
    let bench = setup(3, Algorithm::PeakEwma);
    let source = bench.source(1);
    for _ in 0..20 {
        let attempt = source.pick_this(&1, bench.now).unwrap();
        assert_eq!(*attempt.target(), 1);
        attempt.finish(Outcome::Success, bench.now);
    }
    assert!(source.pick_this(&9, bench.now).is_none());
    for _ in 0..5 {
        let attempt = source.pick_this(&1, bench.now).unwrap();
        attempt.finish(BAD, bench.now);
    }
    assert!(source.pick_this(&1, bench.now).is_none());
    bench.destination.remove(&2, bench.now);
    assert!(source.pick_this(&2, bench.now).is_none());
}
