//! What only work needs goes back to the node when there is none: the code that was run, which Linux maps sixteen
//! pages at a time and keeps, buffers that wait for the next bytes, and the room of tables that were full. The allocator
//! gives back by itself what was freed, within a second.
//!
//! Under traffic nothing is touched. What is needed again comes back with some two hundred page faults from the page
//! cache, less than a millisecond in all; so it happens at most once for each [`WORTH`] of work.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::telemetry::{Labelled, Telemetry};
use crate::workers::Workers;
use crate::{capture, relay, tunnel};

/// How often it is looked.
const LOOK: Duration = Duration::from_secs(1);
/// After so long start is over, with all that follows it: enrolments, certificates, first tunnels.
const STARTED: Duration = Duration::from_secs(15);
/// It is quiet when at none of the looks of so long …
const QUIET: Duration = Duration::from_secs(5);
/// … the workers had been busy for more than this part of the time since the one before.
const BUSY: u32 = 100;
/// So much the workers must have done since the last time.
const WORTH: Duration = Duration::from_millis(50);
/// So long after the last time at the earliest.
const APART: Duration = Duration::from_secs(30);

/// Trims whenever it is time, until told to stop.
pub(super) async fn run(workers: Arc<Workers>, telemetry: Arc<Telemetry>, stop: CancellationToken) {
    let trims = Arc::new(AtomicU64::new(0));
    let counted = trims.clone();
    telemetry.register_counter(
        "undermesh_memory_trims",
        "How often the agent, having nothing to do, gave back memory that only work needs",
        move || vec![Labelled::bare(counted.load(Ordering::Relaxed))],
    );
    let mut calm = Calm::begin(Instant::now());
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        if calm.look(Instant::now(), workers.busy()) == Look::Trim {
            trim(&telemetry).await;
            trims.fetch_add(1, Ordering::Relaxed);
        }
    }
}

async fn trim(telemetry: &Telemetry) {
    telemetry.shrink();
    relay::free_buffers();
    tunnel::free_buffers();
    match spawn_blocking(capture::forget_code).await {
        Ok(Ok(bytes)) => tracing::debug!(bytes, "code that was run is forgotten"),
        // It stays, which costs memory and nothing else.
        Ok(Err(error)) => tracing::debug!(%error, "code that was run stays in memory"),
        Err(error) => tracing::debug!(%error, "code that was run stays in memory"),
    }
}

/// What a look came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    Leave,
    Trim,
}

/// Whether there is anything to do.
#[derive(Debug)]
struct Calm {
    /// When it was last looked, and how long the workers had been busy then, in all.
    last: (Instant, Duration),
    /// Since when it is quiet.
    since: Instant,
    /// The earliest moment of the next time.
    not_before: Instant,
    /// How long the workers had been busy at the last time; none before the first, which follows start and not them.
    trimmed_at: Option<Duration>,
}

impl Calm {
    fn begin(now: Instant) -> Self {
        Self {
            last: (now, Duration::ZERO),
            since: now,
            not_before: now + STARTED,
            trimmed_at: None,
        }
    }

    /// Looks at how long the workers have been busy by now, in all.
    fn look(&mut self, now: Instant, busy: Duration) -> Look {
        let (then, before) = std::mem::replace(&mut self.last, (now, busy));
        if busy.saturating_sub(before) > now.saturating_duration_since(then) / BUSY {
            self.since = now;
        }
        let is_worth = self
            .trimmed_at
            .is_none_or(|trimmed_at| busy.saturating_sub(trimmed_at) >= WORTH);
        let is_quiet = now.saturating_duration_since(self.since) >= QUIET;
        if !is_worth || !is_quiet || now < self.not_before {
            return Look::Leave;
        }
        self.not_before = now + APART;
        self.trimmed_at = Some(busy);
        Look::Trim
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks once a second for so long, while the workers are busy for so long in each; how many seconds had passed at
    /// each time that it trimmed.
    fn watch(
        calm: &mut Calm,
        begin: Instant,
        seconds: std::ops::Range<u64>,
        each: Duration,
    ) -> Vec<u64> {
        let trims = seconds.filter(|second| {
            let now = begin + Duration::from_secs(*second);
            let busy = calm.last.1 + each;
            calm.look(now, busy) == Look::Trim
        });
        trims.collect()
    }

    const IDLE: Duration = Duration::from_micros(100);
    const WORK: Duration = Duration::from_millis(200);

    #[test]
    fn what_start_ran_is_forgotten_once_and_then_nothing_is_done_for_nothing() {
        let begin = Instant::now();
        let mut calm = Calm::begin(begin);
        assert_eq!(watch(&mut calm, begin, 1..400, IDLE), [15]);
    }

    #[test]
    fn a_start_under_traffic_waits_until_it_is_quiet() {
        let begin = Instant::now();
        let mut calm = Calm::begin(begin);
        assert!(watch(&mut calm, begin, 1..100, WORK).is_empty());
        // Five quiet seconds after the last busy one.
        assert_eq!(watch(&mut calm, begin, 100..200, IDLE), [104]);
    }

    #[test]
    fn a_burst_is_followed_by_one_trim_and_never_interrupted_by_one() {
        let begin = Instant::now();
        let mut calm = Calm::begin(begin);
        assert_eq!(watch(&mut calm, begin, 1..60, IDLE), [15]);
        assert!(watch(&mut calm, begin, 60..90, WORK).is_empty());
        assert_eq!(watch(&mut calm, begin, 90..400, IDLE), [94]);
    }

    #[test]
    fn a_trickle_of_connections_has_it_trim_once_for_so_much_work_and_not_more_often() {
        let begin = Instant::now();
        let mut calm = Calm::begin(begin);
        let trickle = Duration::from_millis(1);
        let trims = watch(&mut calm, begin, 1..1_000, trickle);
        assert_eq!(trims.first(), Some(&15));
        for pair in trims.windows(2) {
            assert_eq!(pair[1] - pair[0], 50, "{trims:?}");
        }
        let mut calm = Calm::begin(begin);
        let more = Duration::from_millis(8);
        let trims = watch(&mut calm, begin, 1..1_000, more);
        for pair in trims.windows(2) {
            assert_eq!(pair[1] - pair[0], APART.as_secs(), "{trims:?}");
        }
        assert!(trims.len() > 30, "{trims:?}");
    }

    #[tokio::test]
    async fn a_program_runs_on_after_it_was_trimmed() {
        trim(&Telemetry::new()).await;
        assert_eq!("still there".len(), 11);
    }
}
