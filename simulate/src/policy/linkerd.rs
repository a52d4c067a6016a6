//! Linkerd's documented defaults, with what is off by default switched on at its default values:
//! P2C by peak-EWMA (30 ms at first, 10 s decay), consecutive failure accrual (7 failures, 1 s to
//! 60 s, jitter 0.5, one request as probe), one retry on 5xx but not on connection errors, connect
//! timeout 1 s, fail-fast after 3 s without an available endpoint.
//!
//! Endpoints that cannot be connected to leave the balancer and are reconnected in the background
//! (100 ms to 10 s), which costs no request; that is modelled in its favour.

use std::collections::BTreeMap;
use std::time::Duration;

use rand::Rng;
use rand::rngs::SmallRng;

use super::{Ejected, Proxy, Step};
use crate::resilience::{Outcome, Timestamp, Verdict};

const MAX_FAILURES: u32 = 7;
const PROBATION_MIN: Duration = Duration::from_secs(1);
const PROBATION_MAX: Duration = Duration::from_secs(60);
const JITTER: f64 = 0.5;
const DEFAULT_RTT: f64 = 0.030;
const DECAY: f64 = 10.0;
const RETRIES: u32 = 1;
const FAILFAST: Duration = Duration::from_secs(3);
const RECONNECT_MIN: Duration = Duration::from_millis(100);
const RECONNECT_MAX: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Endpoint {
    rtt: f64,
    stamp: Timestamp,
    pending: u32,
    failures: u32,
    gate: Gate,
    rounds: u32,
    /// Not connected: tried again then.
    reconnect_at: Option<Timestamp>,
    reconnects: u32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Gate {
    Open,
    Shut { until: Timestamp },
    Probing,
}

/// One Linkerd outbound balancer.
#[derive(Debug, Default)]
pub struct Linkerd {
    endpoints: BTreeMap<u32, Endpoint>,
    order: Vec<u32>,
    unavailable_since: Option<Timestamp>,
    ejections: Vec<Ejected>,
}

/// A request in the stack.
#[derive(Debug, Default)]
pub struct Ticket {
    sent: Option<(u32, Timestamp)>,
    probe: bool,
    retries: u32,
}

impl Linkerd {
    fn is_ready(&self, id: u32, now: Timestamp) -> bool {
        self.endpoints.get(&id).is_some_and(|endpoint| {
            let admitted = match endpoint.gate {
                Gate::Open => true,
                Gate::Shut { until } => now >= until,
                Gate::Probing => false,
            };
            admitted && endpoint.reconnect_at.is_none()
        })
    }

    fn cost(&self, id: u32, now: Timestamp) -> f64 {
        self.endpoints.get(&id).map_or(f64::MAX, |endpoint| {
            let elapsed = now.since(endpoint.stamp).as_secs_f64();
            endpoint.rtt * (-elapsed / DECAY).exp() * f64::from(endpoint.pending + 1)
        })
    }

    fn dispatch(&mut self, ticket: &mut Ticket, rng: &mut SmallRng, now: Timestamp) -> Step {
        let ready: Vec<u32> = self
            .order
            .iter()
            .copied()
            .filter(|id| self.is_ready(*id, now))
            .collect();
        if ready.is_empty() {
            let since = *self.unavailable_since.get_or_insert(now);
            return if now.since(since) >= FAILFAST {
                Step::Finish(Outcome::Shed)
            } else {
                Step::Wait(Duration::from_millis(20))
            };
        }
        self.unavailable_since = None;
        let (one, other) = (
            ready[rng.random_range(0..ready.len())],
            ready[rng.random_range(0..ready.len())],
        );
        let chosen = if self.cost(other, now) < self.cost(one, now) {
            other
        } else {
            one
        };
        if let Some(endpoint) = self.endpoints.get_mut(&chosen) {
            endpoint.pending += 1;
            ticket.probe = matches!(endpoint.gate, Gate::Shut { .. });
            if ticket.probe {
                endpoint.gate = Gate::Probing;
            }
        }
        ticket.sent = Some((chosen, now));
        Step::Send(chosen)
    }

    /// `verdict` is `None` for a cancellation.
    fn settle(
        &mut self,
        ticket: &mut Ticket,
        outcome: Option<Outcome>,
        rng: &mut impl Rng,
        now: Timestamp,
    ) {
        let Some((id, sent)) = ticket.sent.take() else {
            return;
        };
        let probe = std::mem::take(&mut ticket.probe);
        let Some(endpoint) = self.endpoints.get_mut(&id) else {
            return;
        };
        endpoint.pending = endpoint.pending.saturating_sub(1);
        let rtt = now.since(sent).as_secs_f64();
        let weight = (-now.since(endpoint.stamp).as_secs_f64() / DECAY).exp();
        endpoint.rtt = if rtt > endpoint.rtt {
            rtt
        } else {
            endpoint.rtt * weight + rtt * (1.0 - weight)
        };
        endpoint.stamp = now;
        if matches!(outcome, Some(Outcome::Unsent(_))) {
            let wait = RECONNECT_MIN
                .saturating_mul(1 << endpoint.reconnects.min(10))
                .min(RECONNECT_MAX);
            endpoint.reconnect_at = Some(now + wait);
        }
        match outcome.and_then(Outcome::of_destination) {
            Some(Verdict::Good) => {
                endpoint.failures = 0;
                if probe {
                    (endpoint.gate, endpoint.rounds) = (Gate::Open, 0);
                }
            }
            Some(Verdict::Bad) => {
                endpoint.failures += 1;
                if probe || (endpoint.gate == Gate::Open && endpoint.failures >= MAX_FAILURES) {
                    let nominal = PROBATION_MIN
                        .saturating_mul(1 << endpoint.rounds.min(10))
                        .min(PROBATION_MAX);
                    let until = now + nominal.mul_f64(1.0 + JITTER * rng.random::<f64>());
                    endpoint.gate = Gate::Shut { until };
                    endpoint.rounds += 1;
                    endpoint.failures = 0;
                    self.ejections.push(Ejected {
                        endpoint: id,
                        only_for: None,
                    });
                }
            }
            // No verdict: the gate would stay with its probe for ever. That fault is left out here.
            None if probe => endpoint.gate = Gate::Shut { until: now },
            None => {}
        }
    }
}

impl Proxy for Linkerd {
    type Ticket = Ticket;

    fn begin(&mut self, _: u32, rng: &mut SmallRng, now: Timestamp) -> (Ticket, Step) {
        let mut ticket = Ticket::default();
        let step = self.dispatch(&mut ticket, rng, now);
        (ticket, step)
    }

    fn ended(
        &mut self,
        ticket: &mut Ticket,
        outcome: Outcome,
        rng: &mut SmallRng,
        now: Timestamp,
    ) -> Step {
        self.settle(ticket, Some(outcome), rng, now);
        if matches!(outcome, Outcome::Failure(_)) && ticket.retries < RETRIES {
            ticket.retries += 1;
            return Step::Wait(Duration::from_millis(25).mul_f64(rng.random()));
        }
        Step::Finish(outcome)
    }

    fn resume(&mut self, ticket: &mut Ticket, rng: &mut SmallRng, now: Timestamp) -> Step {
        self.dispatch(ticket, rng, now)
    }

    fn cancel(&mut self, mut ticket: Ticket, now: Timestamp) {
        // No verdict, so nothing is left to chance.
        let mut unused = <SmallRng as rand::SeedableRng>::seed_from_u64(0);
        self.settle(&mut ticket, None, &mut unused, now);
    }

    fn members(&mut self, present: &[u32], now: Timestamp) {
        self.endpoints.retain(|id, _| present.contains(id));
        for id in present {
            self.endpoints.entry(*id).or_insert(Endpoint {
                rtt: DEFAULT_RTT,
                stamp: now,
                pending: 0,
                failures: 0,
                gate: Gate::Open,
                rounds: 0,
                reconnect_at: None,
                reconnects: 0,
            });
        }
        self.order = present.to_vec();
    }

    fn tick(&mut self, reachable: &dyn Fn(u32) -> bool, _: &mut SmallRng, now: Timestamp) {
        for (id, endpoint) in &mut self.endpoints {
            if endpoint.reconnect_at.is_some_and(|at| now >= at) {
                if reachable(*id) {
                    (endpoint.reconnect_at, endpoint.reconnects) = (None, 0);
                } else {
                    endpoint.reconnects += 1;
                    let wait = RECONNECT_MIN
                        .saturating_mul(1 << endpoint.reconnects.min(10))
                        .min(RECONNECT_MAX);
                    endpoint.reconnect_at = Some(now + wait);
                }
            }
        }
    }

    fn take_ejections(&mut self) -> Vec<Ejected> {
        std::mem::take(&mut self.ejections)
    }

    fn connect_timeout(&self) -> Duration {
        Duration::from_secs(1)
    }
}
