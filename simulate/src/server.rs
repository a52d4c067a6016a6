//! A simulated endpoint: some workers, a queue in front of them, and ways to fail.

use std::collections::VecDeque;
use std::time::Duration;

use rand::Rng;

use crate::resilience::Timestamp;

/// One attempt of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// Which request.
    pub request: usize,
    /// Its how-manieth attempt.
    pub attempt: u32,
}

/// Whether and how an endpoint answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Condition {
    /// It works.
    Up,
    /// Nobody listens: connections are refused.
    Refusing,
    /// Packets vanish: connections time out.
    Silent,
}

/// One endpoint.
#[derive(Debug)]
pub struct Server {
    /// Whether it answers.
    pub condition: Condition,
    /// How many times as long as usual it takes.
    pub slowness: f64,
    /// Its share of 500s.
    pub errors: f64,
    /// Since when it is healthy.
    pub well_since: Timestamp,
    /// When its process started.
    started: Timestamp,
    /// Tells a process from its predecessor.
    generation: u32,
    serving: Vec<Job>,
    queue: VecDeque<Job>,
}

/// What endpoints have in common.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Requests served at once.
    pub workers: usize,
    /// Requests that may wait; one more gets a 503.
    pub queue: usize,
    /// Mean service time, exponentially distributed.
    pub service: Duration,
    /// For how long after its start a process is slower, three times at first.
    pub cold: Duration,
}

/// What happens to an attempt that arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It is served: done after this time.
    Served(Duration),
    /// It waits.
    Queued,
    /// The queue is full.
    Full,
}

impl Server {
    /// A warm endpoint.
    pub const fn new() -> Self {
        Self {
            condition: Condition::Up,
            slowness: 1.0,
            errors: 0.0,
            well_since: Timestamp::ZERO,
            started: Timestamp::ZERO,
            generation: 0,
            serving: Vec::new(),
            queue: VecDeque::new(),
        }
    }

    /// Which process this is.
    pub const fn generation(&self) -> u32 {
        self.generation
    }

    /// Whether nothing ails it.
    pub fn is_well(&self) -> bool {
        self.condition == Condition::Up && self.slowness == 1.0 && self.errors == 0.0
    }

    /// An attempt arrives at a process that is up.
    pub fn arrive(
        &mut self,
        job: Job,
        shape: &Shape,
        rng: &mut impl Rng,
        now: Timestamp,
    ) -> Arrival {
        if self.serving.len() < shape.workers {
            self.serving.push(job);
            Arrival::Served(self.service(shape, rng, now))
        } else if self.queue.len() < shape.queue {
            self.queue.push_back(job);
            Arrival::Queued
        } else {
            Arrival::Full
        }
    }

    /// An attempt is done; the next in the queue, if any, is done after this time.
    pub fn done(
        &mut self,
        job: Job,
        shape: &Shape,
        rng: &mut impl Rng,
        now: Timestamp,
    ) -> Option<(Job, Duration)> {
        self.serving.retain(|other| *other != job);
        let next = self.queue.pop_front()?;
        self.serving.push(next);
        Some((next, self.service(shape, rng, now)))
    }

    /// The process ends; these attempts are reset.
    pub fn stop(&mut self, condition: Condition) -> Vec<Job> {
        self.condition = condition;
        self.generation += 1;
        let mut lost = std::mem::take(&mut self.serving);
        lost.extend(self.queue.drain(..));
        lost
    }

    /// A new process starts, cold.
    pub fn start(&mut self, now: Timestamp) {
        self.condition = Condition::Up;
        self.started = now;
        self.well_since = now;
    }

    fn service(&self, shape: &Shape, rng: &mut impl Rng, now: Timestamp) -> Duration {
        let age = now.since(self.started);
        let cold = if self.started > Timestamp::ZERO && age < shape.cold {
            3.0 - 2.0 * age.as_secs_f64() / shape.cold.as_secs_f64()
        } else {
            1.0
        };
        let chance: f64 = rng.random();
        shape
            .service
            .mul_f64(-(1.0 - chance).ln() * cold * self.slowness)
    }
}

impl Default for Server {
    fn default() -> Self {
        Self::new()
    }
}
