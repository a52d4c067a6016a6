//! Ends an agent that is alive but hung.
//!
//! The kernel takes an agent for alive as long as its listeners exist, so one whose workers are
//! stuck would hold every new connection of its pods for ever. Dead, it does what the failure mode
//! says, its connections are reset, and whoever supervises it starts another.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::AbortHandle;

/// How often the workers shall give a sign of life, and how often it is looked for.
const INTERVAL: Duration = Duration::from_secs(1);

/// So many looks in a row without a sign of life, and the agent is hung: about 30 s, far more than
/// a worker of an overloaded machine waits for its turn. Looks are counted, not time, so that a
/// machine that slept, or a process that was stopped, is not taken for hung when it goes on.
const MISSED: u32 = 30;

/// Watches over a runtime until dropped.
#[derive(Debug)]
pub struct Watchdog {
    heart: AbortHandle,
    /// Dropped, it ends the thread.
    _end: Sender<()>,
}

impl Watchdog {
    /// Aborts the process when no worker of the runtime has run for about 30 s. An error means that
    /// there is no thread to watch with.
    pub fn start(runtime: &Handle) -> io::Result<Self> {
        Self::with(runtime, INTERVAL, || {
            // Not through the log: what writes it may hang as well.
            eprintln!("undermesh: no worker has run for {MISSED} s: the agent is hung and aborts");
            std::process::abort();
        })
    }

    fn with(
        runtime: &Handle,
        interval: Duration,
        hung: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let beats = Arc::new(AtomicU64::new(0));
        let beating = beats.clone();
        let heart = runtime.spawn(async move {
            loop {
                beating.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(interval).await;
            }
        });
        let (end, ended) = channel();
        thread::Builder::new()
            .name("watchdog".to_owned())
            .spawn(move || {
                let mut pulse = Pulse::default();
                while ended.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                    if pulse.look(beats.load(Ordering::Relaxed)) == Sign::Hung {
                        return hung();
                    }
                }
            })?;
        Ok(Self {
            heart: heart.abort_handle(),
            _end: end,
        })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.heart.abort();
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
    fn a_runtime_whose_workers_are_all_stuck_is_hung_and_one_that_runs_is_not() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_time()
            .build()
            .unwrap();
        let interval = Duration::from_millis(20);
        let (told, hung) = mpsc::channel();
        let tell = move || told.send(()).unwrap();
        let _watchdog = Watchdog::with(runtime.handle(), interval, tell).unwrap();
        let well = hung.recv_timeout(interval * MISSED * 2);
        assert_eq!(well, Err(RecvTimeoutError::Timeout));

        let (release, stuck) = mpsc::channel::<()>();
        runtime.spawn(async move { stuck.recv() });
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
        let watchdog = Watchdog::with(runtime.handle(), interval, move || drop(told)).unwrap();
        drop(watchdog);
        // The thread ends, and lets go of what it would have told with.
        assert_eq!(hung.recv(), Err(mpsc::RecvError));
    }
}
