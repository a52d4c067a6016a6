//! A queue that sheds what has waited too long: CoDel (RFC 8289) for requests instead of packets.
//!
//! A queue that is long for a moment absorbs a burst; one that stays long serves nobody any sooner.
//! So what counts is the time that requests wait, not how many they are: once even the shortest wait
//! of an interval is above the target, requests are shed, ever faster until the wait is down again.

use std::collections::VecDeque;
use std::time::Duration;

use super::super::time::Timestamp;
use super::super::validate::{Faults, Validate};

/// Bounds of a queue. Runs where the queue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodelSettings {
    /// A wait that is fine. Range 1 ms to 10 s, default 5 ms.
    pub target: Duration,
    /// How long waits may be above it. Range `target` to 60 s, default 100 ms.
    pub interval: Duration,
    /// The most that wait; one more is refused. Range 1 to 1,000,000, default 1,024.
    pub capacity: usize,
}

impl Default for CodelSettings {
    fn default() -> Self {
        Self {
            target: Duration::from_millis(5),
            interval: Duration::from_millis(100),
            capacity: 1024,
        }
    }
}

impl Validate for CodelSettings {
    fn check(&self, at: &str, faults: &mut Faults) {
        faults.duration(
            self.target,
            Duration::from_millis(1),
            Duration::from_secs(10),
            at,
            "target",
        );
        faults.duration(
            self.interval,
            self.target,
            Duration::from_secs(60),
            at,
            "interval",
        );
        faults.range(self.capacity, 1, 1_000_000, at, "capacity");
    }
}

/// A bounded queue with shedding.
#[derive(Debug)]
pub struct CodelQueue<I> {
    settings: CodelSettings,
    items: VecDeque<(Timestamp, I)>,
    /// When waits will have been too long for an interval.
    first_above: Option<Timestamp>,
    shedding: Option<Shedding>,
    /// How many the last phase of shedding took, to take up from there.
    last_count: u32,
    last_end: Timestamp,
    shed: u64,
    refused: u64,
}

#[derive(Clone, Copy, Debug)]
struct Shedding {
    next: Timestamp,
    count: u32,
}

/// What leaves a queue at one time.
#[derive(Debug, PartialEq, Eq)]
pub struct Popped<I> {
    /// Whose turn it is.
    pub next: Option<I>,
    /// Whom it sheds: [`super::super::Outcome::Shed`], nobody's failure.
    pub shed: Vec<I>,
}

impl<I> CodelQueue<I> {
    /// An empty queue.
    pub const fn new(settings: CodelSettings) -> Self {
        Self {
            settings,
            items: VecDeque::new(),
            first_above: None,
            shedding: None,
            last_count: 0,
            last_end: Timestamp::ZERO,
            shed: 0,
            refused: 0,
        }
    }

    /// Lets one wait.
    ///
    /// # Errors
    /// The item itself when the queue is full; counted.
    pub fn push(&mut self, item: I, now: Timestamp) -> Result<(), I> {
        if self.items.len() >= self.settings.capacity {
            self.refused += 1;
            return Err(item);
        }
        self.items.push_back((now, item));
        Ok(())
    }

    /// Takes out whose turn it is, and whom the queue sheds.
    pub fn pop(&mut self, now: Timestamp) -> Popped<I> {
        let mut shed = Vec::new();
        let mut head = self.take(now);
        match self.shedding {
            Some(_) if !head.late => self.end_shedding(now),
            Some(mut phase) => {
                while head.late && now >= phase.next {
                    shed.extend(head.item.take());
                    phase.count = phase.count.saturating_add(1);
                    phase.next = phase.next + self.gap(phase.count);
                    head = self.take(now);
                }
                self.shedding = Some(phase);
                if !head.late {
                    self.end_shedding(now);
                }
            }
            None if head.late => {
                shed.extend(head.item.take());
                head = self.take(now);
                // A phase that follows another soon goes on at its pace.
                let recent = now.since(self.last_end) < self.settings.interval * 16;
                let count = if recent && self.last_count > 2 {
                    self.last_count - 2
                } else {
                    1
                };
                let next = now + self.gap(count);
                self.shedding = Some(Shedding { next, count });
            }
            None => {}
        }
        self.shed += shed.len() as u64;
        Popped {
            next: head.item,
            shed,
        }
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Shed since the start.
    pub const fn shed(&self) -> u64 {
        self.shed
    }

    /// Refused since the start because the queue was full.
    pub const fn refused(&self) -> u64 {
        self.refused
    }

    fn take(&mut self, now: Timestamp) -> Head<I> {
        let Some((since, item)) = self.items.pop_front() else {
            self.first_above = None;
            return Head {
                item: None,
                late: false,
            };
        };
        if now.since(since) < self.settings.target || self.items.is_empty() {
            self.first_above = None;
            return Head {
                item: Some(item),
                late: false,
            };
        }
        let deadline = *self.first_above.get_or_insert(now + self.settings.interval);
        Head {
            item: Some(item),
            late: now >= deadline,
        }
    }

    fn end_shedding(&mut self, now: Timestamp) {
        if let Some(phase) = self.shedding.take() {
            self.last_count = phase.count;
            self.last_end = now;
        }
    }

    fn gap(&self, count: u32) -> Duration {
        self.settings
            .interval
            .div_f64(f64::from(count.max(1)).sqrt())
    }
}

struct Head<I> {
    item: Option<I>,
    /// Waits have been above the target for an interval.
    late: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_burst_that_drains_in_time_is_not_shed() {
        let mut queue = CodelQueue::new(CodelSettings::default());
        for item in 0..50 {
            queue.push(item, Timestamp::ZERO).unwrap();
        }
        let mut now = Timestamp::ZERO;
        for item in 0..50 {
            now = now + MS;
            assert_eq!(
                queue.pop(now),
                Popped {
                    next: Some(item),
                    shed: vec![]
                }
            );
        }
    }

    #[test]
    fn a_standing_queue_is_shed_until_waits_are_short_again() {
        let mut queue = CodelQueue::new(CodelSettings::default());
        let mut now = Timestamp::ZERO;
        let mut waits = Vec::new();
        // Two arrive for each one that is served, for ten seconds.
        for step in 0..10_000u32 {
            now = now + MS;
            let _ = queue.push(now, now);
            if step % 2 == 0 {
                waits.extend(queue.pop(now).next.map(|since| now.since(since)));
            }
        }
        assert!(queue.shed() > 1000, "{}", queue.shed());
        // An arrival process that outruns the pace of shedding is bounded by the capacity.
        assert!(queue.len() <= 1024);
        let late = waits[waits.len() - 100..].iter().sum::<Duration>() / 100;
        assert!(late < 1024 * 2 * MS, "{late:?}");
        // Once arrivals stop the queue drains and nothing more is shed.
        while !queue.is_empty() {
            now = now + MS;
            queue.pop(now);
        }
        let shed = queue.shed();
        queue.push(now, now).unwrap();
        assert!(queue.pop(now).shed.is_empty());
        assert_eq!(queue.shed(), shed);
    }

    #[test]
    fn a_full_queue_refuses_and_counts() {
        let mut queue = CodelQueue::new(CodelSettings {
            capacity: 1,
            ..CodelSettings::default()
        });
        queue.push(1, Timestamp::ZERO).unwrap();
        assert_eq!(queue.push(2, Timestamp::ZERO), Err(2));
        assert_eq!(queue.refused(), 1);
    }
}
