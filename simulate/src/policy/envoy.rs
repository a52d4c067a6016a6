//! Envoy's documented defaults, with what is off by default switched on at its default values:
//! round robin, outlier detection, one retry on 5xx.
//!
//! From the v3 API reference: outlier detection of 5 consecutive 5xx (connection failures count
//! among them), success rate below mean − 1.9σ with 5 hosts of 100 requests per interval of 10 s,
//! base ejection 30 s times the ejections so far, cap 300 s, at most 10 % ejected; panic below 50 %
//! healthy; circuit breaker limits of 1,024 requests and 3 retries; retry back-off with full jitter
//! from 25 ms to 250 ms; connect timeout 5 s.

use std::collections::BTreeMap;
use std::time::Duration;

use rand::Rng;
use rand::rngs::SmallRng;

use super::{Ejected, Proxy, Step};
use crate::resilience::{Outcome, Timestamp, Verdict};

const CONSECUTIVE: u32 = 5;
const INTERVAL: Duration = Duration::from_secs(10);
const BASE_EJECTION: Duration = Duration::from_secs(30);
const MAX_EJECTION: Duration = Duration::from_secs(300);
const MAX_EJECTED: f64 = 0.1;
const PANIC: f64 = 0.5;
const MAX_REQUESTS: u32 = 1024;
const MAX_RETRIES: u32 = 3;
const NUM_RETRIES: u32 = 1;
const BASE_INTERVAL: Duration = Duration::from_millis(25);

#[derive(Debug, Default)]
struct Host {
    consecutive: u32,
    ok: u32,
    failed: u32,
    ejected_at: Option<Timestamp>,
    multiplier: u32,
}

/// One Envoy cluster.
#[derive(Debug, Default)]
pub struct Envoy {
    hosts: BTreeMap<u32, Host>,
    order: Vec<u32>,
    turn: usize,
    active: u32,
    retrying: u32,
    next_sweep: Timestamp,
    ejections: Vec<Ejected>,
}

/// A request in the router filter.
#[derive(Debug, Default)]
pub struct Ticket {
    host: u32,
    retries: u32,
    /// Holds one of the three retry places.
    retrying: bool,
    active: bool,
}

impl Envoy {
    fn pick(&mut self) -> u32 {
        let healthy = self
            .hosts
            .values()
            .filter(|host| host.ejected_at.is_none())
            .count();
        let panic = (healthy as f64) < PANIC * self.hosts.len() as f64;
        loop {
            self.turn = (self.turn + 1) % self.order.len();
            let id = self.order[self.turn];
            if panic
                || self
                    .hosts
                    .get(&id)
                    .is_some_and(|host| host.ejected_at.is_none())
            {
                return id;
            }
        }
    }

    fn eject(&mut self, id: u32, now: Timestamp) {
        let ejected = self
            .hosts
            .values()
            .filter(|host| host.ejected_at.is_some())
            .count();
        if (ejected + 1) as f64 > MAX_EJECTED * self.hosts.len() as f64 {
            return;
        }
        if let Some(host) = self
            .hosts
            .get_mut(&id)
            .filter(|host| host.ejected_at.is_none())
        {
            host.ejected_at = Some(now);
            host.multiplier += 1;
            self.ejections.push(Ejected {
                endpoint: id,
                only_for: None,
            });
        }
    }

    fn observe(&mut self, id: u32, verdict: Option<Verdict>, now: Timestamp) {
        let Some(host) = self.hosts.get_mut(&id) else {
            return;
        };
        match verdict {
            Some(Verdict::Good) => {
                host.consecutive = 0;
                host.ok += 1;
            }
            Some(Verdict::Bad) => {
                host.consecutive += 1;
                host.failed += 1;
                if host.consecutive >= CONSECUTIVE {
                    host.consecutive = 0;
                    self.eject(id, now);
                }
            }
            None => {}
        }
    }

    fn sweep(&mut self, now: Timestamp) {
        for host in self.hosts.values_mut() {
            match host.ejected_at {
                Some(at)
                    if now.since(at) >= (BASE_EJECTION * host.multiplier).min(MAX_EJECTION) =>
                {
                    host.ejected_at = None;
                    host.consecutive = 0;
                }
                None => host.multiplier = host.multiplier.saturating_sub(1),
                Some(_) => {}
            }
        }
        let rates: Vec<(u32, f64)> = self
            .hosts
            .iter()
            .filter(|(_, host)| host.ejected_at.is_none() && host.ok + host.failed >= 100)
            .map(|(id, host)| (*id, f64::from(host.ok) / f64::from(host.ok + host.failed)))
            .collect();
        if rates.len() >= 5 {
            let mean = rates.iter().map(|(_, rate)| rate).sum::<f64>() / rates.len() as f64;
            let variance = rates
                .iter()
                .map(|(_, rate)| (rate - mean).powi(2))
                .sum::<f64>()
                / rates.len() as f64;
            let threshold = mean - 1.9 * variance.sqrt();
            for (id, _) in rates.iter().filter(|(_, rate)| *rate < threshold) {
                self.eject(*id, now);
            }
        }
        for host in self.hosts.values_mut() {
            (host.ok, host.failed) = (0, 0);
        }
    }

    fn finish(&mut self, ticket: &mut Ticket) {
        self.active -= u32::from(std::mem::take(&mut ticket.active));
        self.retrying -= u32::from(std::mem::take(&mut ticket.retrying));
    }
}

impl Proxy for Envoy {
    type Ticket = Ticket;

    fn begin(&mut self, _: u32, _: &mut SmallRng, _: Timestamp) -> (Ticket, Step) {
        if self.active >= MAX_REQUESTS || self.order.is_empty() {
            return (Ticket::default(), Step::Finish(Outcome::Shed));
        }
        self.active += 1;
        let host = self.pick();
        let ticket = Ticket {
            host,
            active: true,
            ..Ticket::default()
        };
        (ticket, Step::Send(host))
    }

    fn ended(
        &mut self,
        ticket: &mut Ticket,
        outcome: Outcome,
        rng: &mut SmallRng,
        now: Timestamp,
    ) -> Step {
        let verdict = outcome.of_destination();
        self.observe(ticket.host, verdict, now);
        self.retrying -= u32::from(std::mem::take(&mut ticket.retrying));
        if verdict == Some(Verdict::Bad)
            && ticket.retries < NUM_RETRIES
            && self.retrying < MAX_RETRIES
        {
            ticket.retries += 1;
            ticket.retrying = true;
            self.retrying += 1;
            return Step::Wait(BASE_INTERVAL.mul_f64(rng.random()));
        }
        self.finish(ticket);
        Step::Finish(outcome)
    }

    fn resume(&mut self, ticket: &mut Ticket, _: &mut SmallRng, _: Timestamp) -> Step {
        ticket.host = self.pick();
        Step::Send(ticket.host)
    }

    fn cancel(&mut self, mut ticket: Ticket, _: Timestamp) {
        self.finish(&mut ticket);
    }

    fn members(&mut self, present: &[u32], _: Timestamp) {
        self.hosts.retain(|id, _| present.contains(id));
        for id in present {
            self.hosts.entry(*id).or_default();
        }
        self.order = present.to_vec();
    }

    fn tick(&mut self, _: &dyn Fn(u32) -> bool, _: &mut SmallRng, now: Timestamp) {
        if now >= self.next_sweep {
            self.next_sweep = now + INTERVAL;
            self.sweep(now);
        }
    }

    fn take_ejections(&mut self) -> Vec<Ejected> {
        std::mem::take(&mut self.ejections)
    }

    fn connect_timeout(&self) -> Duration {
        Duration::from_secs(5)
    }
}
