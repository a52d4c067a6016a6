//! Peak-EWMA: the latency of an endpoint, moving up at once and down slowly (Finagle's
//! `PeakEwma`; tower's `peak_ewma`).
//!
//! Value and time share one word, so that two workers never tear it: an f32 of nanoseconds above
//! 32 bits of time in ticks of 2²⁰ ns (1.05 ms), which wrap after 52 days. A negative value is a
//! guess, which the first sample replaces; it fades too, or an endpoint that nobody has asked would
//! look slower than all others for ever.

use std::time::Duration;

use super::super::sync::{AtomicU64, Ordering};
use super::super::time::Timestamp;

/// What an endpoint that was never asked is thought to take (Linkerd's 30 ms).
const INITIAL_NANOS: f32 = 30e6;
/// How fast the past fades: to 1/e in this time (Linkerd's 10 s).
const DECAY_TICKS: f32 = 10e9 / TICK_NANOS;
const TICK_NANOS: f32 = (1u64 << TICK_SHIFT) as f32;
const TICK_SHIFT: u32 = 20;
/// What a latency fades to: 1 ms.
const REST_NANOS: f32 = 1e6;
/// The most that failures may make of an endpoint's cost.
const PENALTY_CAP_NANOS: f32 = 2e9;

/// The moving latency of one endpoint. Lock-free.
#[derive(Debug)]
pub struct PeakEwma(AtomicU64);

impl PeakEwma {
    pub(in super::super) fn new(now: Timestamp) -> Self {
        Self(AtomicU64::new(pack(-INITIAL_NANOS, tick(now))))
    }

    /// An attempt took this long.
    pub(in super::super) fn observe(&self, latency: Duration, now: Timestamp) {
        let sample = latency.as_nanos() as f32;
        self.update(now, |value, fade| {
            if value < 0.0 || sample > value {
                sample
            } else {
                value * fade + sample * (1.0 - fade)
            }
        });
    }

    /// An attempt took at least this long: it ended without an answer.
    pub(in super::super) fn observe_if_slower(&self, latency: Duration, now: Timestamp) {
        let sample = latency.as_nanos() as f32;
        self.update(now, |value, fade| faded(value, fade).max(sample));
    }

    /// An attempt failed: the endpoint looks twice as slow, however fast the failure came. Without
    /// this an endpoint that fails at once would draw all traffic.
    pub(in super::super) fn punish(&self, now: Timestamp) {
        self.update(now, |value, _| {
            let value = value.abs().max(REST_NANOS);
            (value * 2.0).min(PENALTY_CAP_NANOS).max(value)
        });
    }

    /// Starts over: what is known is no longer true.
    pub(in super::super) fn forget(&self, now: Timestamp) {
        self.0
            .store(pack(-INITIAL_NANOS, tick(now)), Ordering::Relaxed);
    }

    /// The latency in nanoseconds as it is believed now; it fades while nothing is observed, so an
    /// endpoint once slow is tried again.
    pub(in super::super) fn nanos(&self, now: Timestamp) -> f32 {
        let (value, stamp) = unpack(self.0.load(Ordering::Relaxed));
        let elapsed = elapsed(stamp, tick(now));
        if elapsed == 0 {
            value.abs()
        } else {
            faded(value, fade(elapsed))
        }
    }

    fn update(&self, now: Timestamp, next: impl Fn(f32, f32) -> f32) {
        let mut seen = self.0.load(Ordering::Relaxed);
        loop {
            let (value, stamp) = unpack(seen);
            let elapsed = elapsed(stamp, tick(now));
            let word = pack(next(value, fade(elapsed)), stamp.wrapping_add(elapsed));
            match self
                .0
                .compare_exchange_weak(seen, word, Ordering::Relaxed, Ordering::Relaxed)
            {
                Ok(_) => return,
                Err(there) => seen = there,
            }
        }
    }
}

/// What is left of a latency: it falls to a resting value and no further, or requests in flight
/// would weigh nothing at an endpoint that was idle for long.
fn faded(value: f32, fade: f32) -> f32 {
    (value.abs() * fade).max(value.abs().min(REST_NANOS))
}

/// e^(−elapsed / decay), without the function where a busy or an idle endpoint needs none.
fn fade(ticks: u32) -> f32 {
    const SOON: f32 = 0.02;
    const LATE: f32 = 20.0;
    let elapsed = ticks as f32 / DECAY_TICKS;
    if elapsed < SOON {
        1.0 - elapsed
    } else if elapsed > LATE {
        0.0
    } else {
        (-elapsed).exp()
    }
}

const fn tick(now: Timestamp) -> u32 {
    (now.as_nanos() >> TICK_SHIFT) as u32
}

/// Ticks from one to the other; zero when another worker was ahead.
const fn elapsed(from: u32, to: u32) -> u32 {
    let ticks = to.wrapping_sub(from);
    if ticks > u32::MAX / 2 { 0 } else { ticks }
}

const fn pack(value: f32, stamp: u32) -> u64 {
    (value.to_bits() as u64) << 32 | stamp as u64
}

const fn unpack(word: u64) -> (f32, u32) {
    (f32::from_bits((word >> 32) as u32), word as u32)
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn at(ms: u32) -> Timestamp {
        Timestamp::ZERO + ms * MS
    }

    #[test]
    fn it_rises_at_once_and_falls_slowly() {
        let load = PeakEwma::new(Timestamp::ZERO);
        load.observe(10 * MS, at(0));
        load.observe(200 * MS, at(10));
        assert!(load.nanos(at(10)) > 199e6);
        load.observe(10 * MS, at(20));
        assert!(load.nanos(at(20)) > 190e6);
        for ms in (1000..60_000).step_by(100) {
            load.observe(10 * MS, at(ms));
        }
        assert!(load.nanos(at(60_000)) < 12e6);
    }

    #[test]
    fn an_endpoint_that_fails_fast_does_not_look_fast() {
        let (failing, working) = (
            PeakEwma::new(Timestamp::ZERO),
            PeakEwma::new(Timestamp::ZERO),
        );
        for ms in 0..5 {
            working.observe(10 * MS, at(ms));
            failing.observe(10 * MS, at(ms));
        }
        failing.punish(at(5));
        failing.punish(at(5));
        assert!(failing.nanos(at(5)) >= 3.9 * working.nanos(at(5)));
    }

    #[test]
    fn a_clock_that_two_workers_read_in_another_order_does_no_harm() {
        let load = PeakEwma::new(Timestamp::ZERO);
        load.observe(10 * MS, at(5000));
        load.observe(10 * MS, at(0));
        assert!((load.nanos(at(5000)) - 10e6).abs() < 1e5);
    }
}

#[cfg(test)]
#[cfg(loom)]
mod model {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    #[test]
    fn a_peak_is_never_lost_to_another_workers_sample() {
        loom::model(|| {
            let load = Arc::new(PeakEwma::new(Timestamp::ZERO));
            let other = {
                let load = Arc::clone(&load);
                thread::spawn(move || load.observe(Duration::from_secs(1), Timestamp::ZERO))
            };
            load.observe(Duration::from_millis(1), Timestamp::ZERO);
            other.join().unwrap();
            assert!(load.nanos(Timestamp::ZERO) > 0.99e9);
        });
    }
}
