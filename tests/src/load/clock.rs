//! When requests are due.

use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::sync::mpsc;

/// Moments that nobody has asked for yet; a client that is so far behind gets the rest when it asks.
const AHEAD: usize = 16;

/// Gives moments at a steady rate. The runtime's own timers have a grain of 1 ms, which would be part of every
/// latency; those of a thread of its own have none.
pub(super) struct Pace(mpsc::Receiver<Vec<Instant>>);

impl Pace {
    pub fn start(per_second: u32) -> Result<Self> {
        let (sender, receiver) = mpsc::channel(AHEAD);
        std::thread::Builder::new()
            .name("pace".into())
            .spawn(move || {
                // The kernel may otherwise be 50 µs late, to save wake-ups.
                let _ = nix::sys::prctl::set_timerslack(1);
                let mut moments = Moments::new(Instant::now(), per_second);
                loop {
                    std::thread::sleep(moments.next().saturating_duration_since(Instant::now()));
                    let due = moments.until(Instant::now());
                    // An error means that nobody asks any more.
                    if !due.is_empty() && sender.blocking_send(due).is_err() {
                        return;
                    }
                }
            })?;
        Ok(Self(receiver))
    }

    /// Waits for the next moment, and gives all that have come since the last call, however late this one is.
    pub async fn due(&mut self) -> Option<Vec<Instant>> {
        self.0.recv().await
    }
}

struct Moments {
    start: Instant,
    interval: Duration,
    given: u32,
}

impl Moments {
    fn new(start: Instant, per_second: u32) -> Self {
        Self {
            start,
            interval: Duration::from_secs(1) / per_second.max(1),
            given: 0,
        }
    }

    fn next(&self) -> Instant {
        self.start + self.interval * (self.given + 1)
    }

    fn until(&mut self, now: Instant) -> Vec<Instant> {
        let mut due = Vec::new();
        while self.next() <= now {
            due.push(self.next());
            self.given += 1;
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_that_were_missed_are_due_all_the_same() {
        let start = Instant::now();
        let mut moments = Moments::new(start, 1000);
        let late = moments.until(start + Duration::from_micros(3500));
        assert_eq!(
            late,
            [1, 2, 3].map(|milli| start + Duration::from_millis(milli))
        );
        assert!(
            moments
                .until(start + Duration::from_micros(3600))
                .is_empty()
        );
    }
}
