//! The breaker's diagram, and the ways in which others leave it.

use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::resilience::backoff::Backoff;
use crate::resilience::event::EventLog;
use crate::resilience::outcome::{Failure, Unsent};
use crate::resilience::validate::Validate;

const SECOND: Duration = Duration::from_secs(1);
const BAD: Outcome = Outcome::Failure(Failure::Reset);

struct Bench {
    breaker: Arc<Breaker>,
    log: Arc<EventLog>,
    now: Timestamp,
}

fn settings() -> BreakerSettings {
    BreakerSettings {
        failure_ratio: 0.5,
        minimum_requests: 10,
        window: 10 * SECOND,
        open_time: Backoff {
            base: SECOND,
            cap: 8 * SECOND,
            jitter: 0.0,
        },
        probes: 1,
        ..BreakerSettings::default()
    }
}

fn bench(settings: BreakerSettings) -> Bench {
    let log = Arc::new(EventLog::new(1000));
    Bench {
        breaker: Breaker::new("shop/cart".into(), settings, 7, log.clone()),
        log,
        now: Timestamp::ZERO + 100 * SECOND,
    }
}

impl Bench {
    fn send(&self, outcome: Outcome) {
        self.breaker
            .admit(self.now)
            .unwrap()
            .finish(outcome, self.now);
    }

    fn open(&mut self) {
        for _ in 0..10 {
            self.send(BAD);
        }
        assert_eq!(self.breaker.state(), BreakerState::Open);
    }

    fn half_open(&mut self) -> Permit {
        self.open();
        self.now = self.now + SECOND;
        let probe = self.breaker.admit(self.now).unwrap();
        assert!(probe.is_probe());
        probe
    }

    fn moves(&self) -> Vec<(BreakerState, BreakerState, Cause)> {
        let moves = self
            .log
            .drain()
            .into_iter()
            .filter_map(|event| match event {
                Event::Breaker(moved) => Some((moved.from, moved.to, moved.cause)),
                Event::Ejection(_) => None,
            });
        moves.collect()
    }
}

#[test]
fn it_opens_at_the_failure_ratio_but_not_before_the_minimum_of_requests() {
    let mut bench = bench(settings());
    for _ in 0..9 {
        bench.send(BAD);
    }
    assert_eq!(bench.breaker.state(), BreakerState::Closed);
    bench.send(BAD);
    assert_eq!(bench.breaker.state(), BreakerState::Open);
    let cause = Cause::FailureRatio {
        failed: 10,
        total: 10,
    };
    assert_eq!(
        bench.moves(),
        [(BreakerState::Closed, BreakerState::Open, cause)]
    );
    bench.now = bench.now + 300 * Duration::from_millis(1);
    let rejected = bench.breaker.admit(bench.now).unwrap_err();
    assert_eq!(rejected.retry_after, Some(Duration::from_millis(700)));
    assert_eq!(bench.breaker.rejections(), 1);
}

#[test]
fn it_opens_at_a_run_of_failures_that_a_success_would_have_broken() {
    let bench = bench(BreakerSettings {
        consecutive: Some(3),
        minimum_requests: 1000,
        ..settings()
    });
    for outcome in [BAD, BAD, Outcome::Success, BAD, BAD] {
        bench.send(outcome);
    }
    assert_eq!(bench.breaker.state(), BreakerState::Closed);
    bench.send(BAD);
    assert_eq!(bench.moves()[0].2, Cause::ConsecutiveFailures(3));
}

#[test]
fn a_good_probe_closes_it_and_the_old_failures_are_forgotten() {
    let mut bench = bench(settings());
    bench.half_open().finish(Outcome::Success, bench.now);
    assert_eq!(bench.breaker.state(), BreakerState::Closed);
    bench.send(BAD);
    assert_eq!(bench.breaker.state(), BreakerState::Closed);
    let causes: Vec<Cause> = bench
        .moves()
        .into_iter()
        .map(|(_, _, cause)| cause)
        .collect();
    assert_eq!(
        causes[1..],
        [Cause::OpenTimePassed, Cause::ProbesSucceeded(1)]
    );
}

#[test]
fn each_failed_probe_doubles_the_open_time_up_to_the_cap() {
    let mut bench = bench(settings());
    bench.open();
    for expected in [1, 2, 4, 8, 8] {
        let wait = bench
            .breaker
            .admit(bench.now)
            .unwrap_err()
            .retry_after
            .unwrap();
        assert_eq!(wait, expected * SECOND);
        bench.now = bench.now + wait;
        bench.send(BAD);
    }
}

#[test]
fn half_open_lets_no_more_than_its_probes_through() {
    let mut bench = bench(BreakerSettings {
        probes: 2,
        successes_to_close: 2,
        ..settings()
    });
    let first = bench.half_open();
    let second = bench.breaker.admit(bench.now).unwrap();
    assert!(bench.breaker.admit(bench.now).is_err());
    first.finish(Outcome::Success, bench.now);
    assert_eq!(bench.breaker.state(), BreakerState::HalfOpen);
    second.finish(Outcome::Success, bench.now);
    assert_eq!(bench.breaker.state(), BreakerState::Closed);
}

#[test]
fn a_cancelled_probe_does_not_wedge_the_breaker() {
    let mut bench = bench(settings());
    drop(bench.half_open());
    assert_eq!(bench.breaker.probes(), 0);
    let next = bench.breaker.admit(bench.now).unwrap();
    next.finish(Outcome::Cancelled, bench.now);
    bench.send(Outcome::Success);
    assert_eq!(bench.breaker.state(), BreakerState::Closed);
}

#[test]
fn a_shed_probe_frees_its_place_without_a_verdict() {
    let mut bench = bench(settings());
    bench.half_open().finish(Outcome::Shed, bench.now);
    assert_eq!(bench.breaker.state(), BreakerState::HalfOpen);
    assert_eq!(bench.breaker.probes(), 0);
}

#[test]
fn a_straggler_from_before_is_no_verdict_on_the_probe() {
    let mut bench = bench(settings());
    let good = bench.breaker.admit(bench.now).unwrap();
    let bad = bench.breaker.admit(bench.now).unwrap();
    let probe = bench.half_open();
    bad.finish(BAD, bench.now);
    assert_eq!(bench.breaker.state(), BreakerState::HalfOpen);
    good.finish(Outcome::Success, bench.now);
    assert_eq!(bench.breaker.state(), BreakerState::HalfOpen);
    assert_eq!(bench.breaker.stragglers(), 2);
    probe.finish(Outcome::Success, bench.now);
    assert_eq!(bench.breaker.state(), BreakerState::Closed);
}

#[test]
fn a_straggling_probe_of_an_older_round_takes_no_place_of_the_new_one() {
    let mut bench = bench(BreakerSettings {
        probes: 2,
        ..settings()
    });
    let slow = bench.half_open();
    bench
        .breaker
        .admit(bench.now)
        .unwrap()
        .finish(BAD, bench.now);
    bench.now = bench.now + 2 * SECOND;
    let fresh = bench.breaker.admit(bench.now).unwrap();
    drop(slow);
    assert_eq!(bench.breaker.probes(), 1);
    fresh.finish(Outcome::Success, bench.now);
    assert_eq!(bench.breaker.state(), BreakerState::Closed);
}

#[test]
fn sheds_cancellations_and_callers_errors_never_open_it() {
    let bench = bench(settings());
    for _ in 0..100 {
        bench.send(Outcome::Shed);
        bench.send(Outcome::Cancelled);
        bench.send(Outcome::CallerError(crate::resilience::Code::Http(404)));
    }
    assert_eq!(bench.breaker.state(), BreakerState::Closed);
}

#[test]
fn an_operator_can_hold_it_open_and_closed_and_release_it() {
    let bench = bench(settings());
    bench.breaker.force(Some(Forced::Open), bench.now);
    assert_eq!(
        bench
            .breaker
            .admit(bench.now + 1000 * SECOND)
            .unwrap_err()
            .retry_after,
        None
    );
    bench.breaker.force(Some(Forced::Closed), bench.now);
    for _ in 0..100 {
        bench.send(Outcome::Unsent(Unsent::ConnectFailed));
    }
    assert_eq!(bench.breaker.state(), BreakerState::Closed);
    bench.breaker.force(None, bench.now);
    assert_eq!(bench.breaker.forced(), None);
    bench.send(BAD);
    assert_eq!(bench.breaker.state(), BreakerState::Closed);
    assert!(
        bench
            .moves()
            .iter()
            .all(|(_, _, cause)| *cause == Cause::Operator)
    );
}

#[test]
fn settings_out_of_range_are_named() {
    let faults = BreakerSettings {
        failure_ratio: 1.5,
        probes: 0,
        ..settings()
    }
    .validate()
    .unwrap_err();
    let fields: Vec<&str> = faults.iter().map(|fault| fault.field.as_str()).collect();
    assert_eq!(fields, ["failureRatio", "probes"]);
    assert!(BreakerSettings::default().validate().is_ok());
}

#[test]
fn the_exported_numbers_are_zero_closed_one_open_two_half_open() {
    assert_eq!(
        [
            BreakerState::Closed as u8,
            BreakerState::Open as u8,
            BreakerState::HalfOpen as u8
        ],
        [0, 1, 2]
    );
}

proptest! {
    #[test]
    fn it_moves_only_along_its_diagram_and_never_leaks_a_place(
        steps in proptest::collection::vec((0u8..6, 0u64..1500, 0usize..8), 1..500),
        probes in 1u32..4,
    ) {
        let mut bench = bench(BreakerSettings { probes, minimum_requests: 3, successes_to_close: 2, ..settings() });
        let mut held: Vec<Permit> = Vec::new();
        for (action, gap, index) in steps {
            bench.now = bench.now + Duration::from_millis(gap);
            match action {
                0..3 => held.extend(bench.breaker.admit(bench.now)),
                _ if held.is_empty() => {}
                _ => {
                    let permit = held.swap_remove(index % held.len());
                    match action {
                        3 => permit.finish(Outcome::Success, bench.now),
                        4 => permit.finish(BAD, bench.now),
                        _ => drop(permit),
                    }
                }
            }
            prop_assert!(bench.breaker.probes() <= probes);
            if bench.breaker.state() != BreakerState::HalfOpen {
                prop_assert_eq!(bench.breaker.probes(), 0);
            }
        }
        drop(held);
        prop_assert_eq!(bench.breaker.probes(), 0);
        use BreakerState::{Closed, HalfOpen, Open};
        let mut at = Closed;
        for (from, to, _) in bench.moves() {
            prop_assert_eq!(from, at);
            prop_assert!(matches!((from, to), (Closed, Open) | (Open, HalfOpen) | (HalfOpen, Closed) | (HalfOpen, Open)));
            at = to;
        }
    }
}
