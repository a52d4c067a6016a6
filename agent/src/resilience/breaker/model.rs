//! The breaker's word under every interleaving of two workers.

use std::time::Duration;

use loom::thread;

use super::*;
use crate::resilience::backoff::Backoff;
use crate::resilience::event::NoSink;
use crate::resilience::outcome::Failure;

const BAD: Outcome = Outcome::Failure(Failure::Reset);

fn half_open() -> (Arc<Breaker>, Permit) {
    let settings = BreakerSettings {
        consecutive: Some(1),
        open_time: Backoff {
            base: Duration::from_secs(1),
            cap: Duration::from_secs(1),
            jitter: 0.0,
        },
        probes: 1,
        ..BreakerSettings::default()
    };
    let breaker = Breaker::new("model".into(), settings, 1, Arc::new(NoSink));
    breaker
        .admit(Timestamp::ZERO)
        .unwrap()
        .finish(BAD, Timestamp::ZERO);
    let probe = breaker
        .admit(Timestamp::ZERO + Duration::from_secs(1))
        .unwrap();
    (breaker, probe)
}

#[test]
fn two_workers_never_hold_more_probes_than_allowed() {
    loom::model(|| {
        let (breaker, probe) = half_open();
        drop(probe);
        let later = Timestamp::ZERO + Duration::from_secs(1);
        let other = {
            let breaker = Arc::clone(&breaker);
            thread::spawn(move || breaker.admit(later).ok())
        };
        let mine = breaker.admit(later).ok();
        let theirs = other.join().unwrap();
        assert_eq!(
            usize::from(mine.is_some()) + usize::from(theirs.is_some()),
            1
        );
        drop((mine, theirs));
        assert_eq!(breaker.probes(), 0);
    });
}

#[test]
fn a_place_is_freed_whoever_else_moves_the_breaker() {
    loom::model(|| {
        let (breaker, probe) = half_open();
        let later = Timestamp::ZERO + Duration::from_secs(1);
        let other = thread::spawn(move || drop(probe));
        if let Ok(permit) = breaker.admit(later) {
            permit.finish(BAD, later);
        }
        other.join().unwrap();
        assert_eq!(breaker.probes(), 0);
    });
}

#[test]
fn a_breaker_that_opens_shows_until_when() {
    loom::model(|| {
        let settings = BreakerSettings {
            consecutive: Some(1),
            ..BreakerSettings::default()
        };
        let breaker = Breaker::new("model".into(), settings, 1, Arc::new(NoSink));
        let now = Timestamp::ZERO + Duration::from_secs(5);
        let permit = breaker.admit(now).unwrap();
        let other = thread::spawn(move || permit.finish(BAD, now));
        if let Ok(permit) = breaker.admit(now) {
            assert!(!permit.is_probe());
        }
        other.join().unwrap();
    });
}
