//! Ends an agent that is alive but hung.
//!
//! The kernel takes an agent for alive as long as its listeners exist, so one of which a worker is
//! stuck would hold its connections, and the new ones that it is given, for ever. Dead, it does what the failure mode
//! says, its connections are reset, and whoever supervises it starts another.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::AbortHandle;

/// How often each runtime shall give a sign of life, and how often it is looked for.
const INTERVAL: Duration = Duration::from_secs(1);

/// So many looks in a row without a sign of life, and the agent is hung: about 30 s, far more than
/// a worker of an overloaded machine waits for its turn. Looks are counted, not time, so that a
/// machine that slept, or a process that was stopped, is not taken for hung when it goes on.
const MISSED: u32 = 30;

/// Watches over runtimes until dropped.
#[derive(Debug)]
pub struct Watchdog {
    hearts: Vec<AbortHandle>,
    /// Dropped, it ends the thread.
    _end: Sender<()>,
}

impl Watchdog {
    /// Aborts the process when one of these runtimes has not run for about 30 s: nobody else goes on with what is
    /// on a worker. An error means that there is no thread to watch with.
    pub fn start<'a>(runtimes: impl IntoIterator<Item = &'a Handle>) -> io::Result<Self> {
        Self::with(runtimes, INTERVAL, || {
            // Not through the log: what writes it may hang as well.
            eprintln!(
                "undermesh: a worker has not run for {MISSED} s: the agent is hung and aborts"
            );
            std::process::abort();
        })
    }

    fn with<'a>(
        runtimes: impl IntoIterator<Item = &'a Handle>,
        interval: Duration,
        hung: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let (hearts, mut pulses): (Vec<_>, Vec<_>) = runtimes
            .into_iter()
            .map(|runtime| {
                let beats = Arc::new(AtomicU64::new(0));
                let beating = beats.clone();
                let heart = runtime.spawn(async move {
                    loop {
                        beating.fetch_add(1, Ordering::Relaxed);
                        tokio::time::sleep(interval).await;
                    }
                });
                (heart.abort_handle(), (beats, Pulse::default()))
            })
            .unzip();
        let (end, ended) = channel();
        thread::Builder::new()
            .name("watchdog".to_owned())
            .spawn(move || {
                while ended.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                    for (beats, pulse) in &mut pulses {
                        if pulse.look(beats.load(Ordering::Relaxed)) == Sign::Hung {
                            return hung();
                        }
                    }
                }
            })?;
        Ok(Self { hearts, _end: end })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.hearts.iter().for_each(AbortHandle::abort);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sign {
    Alive,
    Hung,
}

/// What was seen of the heart.
#[derive(Debug, Default)]
struct Pulse {
    beats: u64,
    missed: u32,
}

impl Pulse {
    fn look(&mut self, beats: u64) -> Sign {
        if beats == self.beats {
            self.missed += 1;
        } else {
            *self = Self { beats, missed: 0 };
        }
        if self.missed >= MISSED {
            Sign::Hung
        } else {
            Sign::Alive
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn only_missed_beats_in_a_row_are_a_hang() {
        let mut pulse = Pulse::default();
        assert_eq!(pulse.look(1), Sign::Alive);
        for _ in 1..MISSED {
            assert_eq!(pulse.look(1), Sign::Alive);
        }
        assert_eq!(pulse.look(2), Sign::Alive);
        for _ in 1..MISSED {
            assert_eq!(pulse.look(2), Sign::Alive);
        }
        assert_eq!(pulse.look(2), Sign::Hung);
    }

    #[test]
    fn one_stuck_runtime_of_two_is_a_hang_and_while_both_run_there_is_none() {
        let runtime = || {
            tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_time()
                .build()
                .unwrap()
        };
        let (well, ill) = (runtime(), runtime());
        let interval = Duration::from_millis(20);
        let (told, hung) = mpsc::channel();
        let tell = move || told.send(()).unwrap();
        let both = [well.handle(), ill.handle()];
        let _watchdog = Watchdog::with(both, interval, tell).unwrap();
        let barked = hung.recv_timeout(interval * MISSED * 2);
        assert_eq!(barked, Err(RecvTimeoutError::Timeout));

        let (release, stuck) = mpsc::channel::<()>();
        ill.spawn(async move { stuck.recv() });
        hung.recv_timeout(Duration::from_secs(60)).unwrap();
        drop(release);
    }

    #[test]
    fn a_watchdog_that_was_dropped_barks_no_more() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let (told, hung) = mpsc::channel::<()>();
        let interval = Duration::from_millis(1);
        // Nobody drives this runtime, so its heart never beats.
        let watchdog = Watchdog::with([runtime.handle()], interval, move || drop(told)).unwrap();
        drop(watchdog);
        // The thread ends, and lets go of what it would have told with.
        assert_eq!(hung.recv(), Err(mpsc::RecvError));
    }
}
