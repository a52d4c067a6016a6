//! The agent's own resilience module, with its defaults. The route asks for retries, as it does of
//! the others, and for the adaptive concurrency limit.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::SmallRng;

use super::{Ejected, Proxy, Step};
use crate::resilience::balance::{Algorithm, BalanceSettings};
use crate::resilience::breaker::{Forced, Permit};
use crate::resilience::budget::BudgetSettings;
use crate::resilience::destination::{
    Ask, Attempt, Destination, DestinationSettings, Probing, Source,
};
use crate::resilience::ejection::{Change, EjectionSettings, Scope, SourceId};
use crate::resilience::endpoint::Member;
use crate::resilience::event::{Event, EventLog};
use crate::resilience::limit::{AdaptiveLimit, AdaptiveSettings, Slot};
use crate::resilience::retry::{
    Body, Condition, Decision, Facts, Method, Nature, Retries, RetryPolicy,
};
use crate::resilience::timeout::Timeouts;
use crate::resilience::{Breaker, BreakerSettings, Outcome, Timestamp};

/// One mechanism that can be left out, to see what it is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mechanism {
    /// Retries.
    Retry,
    /// The retry budget: retries are then limited by attempts only.
    Budget,
    /// The circuit breaker.
    Breaker,
    /// Endpoint ejection.
    Ejection,
    /// P2C peak-EWMA: round robin instead.
    Balancing,
    /// The adaptive concurrency limit.
    Limit,
}

impl Mechanism {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Retry,
        Self::Budget,
        Self::Breaker,
        Self::Ejection,
        Self::Balancing,
        Self::Limit,
    ];
}

/// One node's agent.
#[derive(Debug)]
pub struct Undermesh {
    destination: Arc<Destination<u32>>,
    breaker: Arc<Breaker>,
    sources: HashMap<u32, Arc<Source<u32>>>,
    policy: RetryPolicy,
    timeouts: Timeouts,
    limit: Option<Arc<AdaptiveLimit>>,
    log: Arc<EventLog>,
    ejections: Vec<Ejected>,
}

/// A request under way.
#[derive(Debug)]
pub struct Ticket {
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// Waits for a place below the concurrency limit.
    Queued {
        client: u32,
        since: Timestamp,
    },
    UnderWay(Box<UnderWay>),
    Over,
}

/// How long a request waits for a place, and how often it looks.
const QUEUE: Duration = Duration::from_millis(100);
const LOOK: Duration = Duration::from_millis(5);

#[derive(Debug)]
struct UnderWay {
    source: Arc<Source<u32>>,
    permit: Permit,
    _place: Option<Slot>,
    retries: Retries,
    attempt: Option<Attempt<u32>>,
    tried: Vec<u32>,
}

impl Undermesh {
    /// An agent with all mechanisms but those left out.
    pub fn new(node: u64, without: &[Mechanism]) -> Self {
        let is_out = |mechanism| without.contains(&mechanism);
        let log = Arc::new(EventLog::new(1_000_000));
        let mut settings = DestinationSettings {
            balance: BalanceSettings::default(),
            ejection: EjectionSettings::default(),
            budget: BudgetSettings::default(),
            seed: node,
            sink: log.clone(),
        };
        if is_out(Mechanism::Balancing) {
            settings.balance.algorithm = Algorithm::RoundRobin;
        }
        if is_out(Mechanism::Ejection) {
            settings.ejection.consecutive_failures = None;
            settings.ejection.failure_ratio = None;
            settings.ejection.success_rate = None;
        }
        if is_out(Mechanism::Budget) {
            settings.budget = BudgetSettings {
                ratio: 1.0,
                minimum_rate: 10_000.0,
                ..settings.budget
            };
        }
        let breaker = Breaker::new(
            "simulated".into(),
            BreakerSettings::default(),
            node,
            log.clone(),
        );
        if is_out(Mechanism::Breaker) {
            breaker.force(Some(Forced::Closed), Timestamp::ZERO);
        }
        let mut policy = RetryPolicy::of_route(
            2,
            vec![Condition::ServerError, Condition::Reset, Condition::Timeout],
        );
        if is_out(Mechanism::Retry) {
            policy.retries = 0;
        }
        Self {
            destination: Destination::new("simulated".into(), settings),
            breaker,
            sources: HashMap::new(),
            policy,
            timeouts: Timeouts {
                request: Some(Duration::from_secs(15)),
                ..Timeouts::default()
            },
            limit: (!is_out(Mechanism::Limit))
                .then(|| AdaptiveLimit::new(AdaptiveSettings::default(), Timestamp::ZERO)),
            log,
            ejections: Vec::new(),
        }
    }

    fn send(&self, under_way: &mut UnderWay, rng: &mut SmallRng, now: Timestamp) -> Step {
        let may_probe = !under_way.permit.is_probe() && under_way.retries.can_repeat(&self.policy);
        let ask = Ask {
            tried: &under_way.tried,
            hash: None,
            probing: if may_probe {
                Probing::Allowed
            } else {
                Probing::Forbidden
            },
        };
        match under_way.source.pick(&ask, rng, now) {
            Ok(attempt) => {
                let target = *attempt.target();
                under_way.tried.push(target);
                under_way.attempt = Some(attempt);
                Step::Send(target)
            }
            Err(_) => Step::Finish(Outcome::Shed),
        }
    }

    /// Breaker, limit, then the first attempt.
    fn admit(
        &mut self,
        client: u32,
        since: Timestamp,
        rng: &mut SmallRng,
        now: Timestamp,
    ) -> (Stage, Step) {
        let Ok(permit) = self.breaker.admit(now) else {
            return (Stage::Over, Step::Finish(Outcome::Shed));
        };
        let place = self.limit.as_ref().map(|limit| limit.take()).transpose();
        let Ok(place) = place else {
            return if now.since(since) < QUEUE {
                (Stage::Queued { client, since }, Step::Wait(LOOK))
            } else {
                (Stage::Over, Step::Finish(Outcome::Shed))
            };
        };
        let source = self
            .sources
            .entry(client)
            .or_insert_with(|| self.destination.source(SourceId(u64::from(client)), now));
        let nature = Nature {
            method: Method::Safe,
            body: Body::None,
        };
        let retries = Retries::begin(&source.budget(), nature, self.timeouts.deadline(now), now);
        let mut under_way = Box::new(UnderWay {
            source: Arc::clone(source),
            permit,
            _place: place,
            retries,
            attempt: None,
            tried: Vec::new(),
        });
        let step = self.send(&mut under_way, rng, now);
        (Stage::UnderWay(under_way), step)
    }

    fn drain(&mut self) {
        let ejected = self
            .log
            .drain()
            .into_iter()
            .filter_map(|event| match event {
                Event::Ejection(moved) => match (moved.change, moved.endpoint.parse()) {
                    (Change::Ejected { .. }, Ok(endpoint)) => Some(Ejected {
                        endpoint,
                        only_for: match moved.scope {
                            Scope::Everyone => None,
                            Scope::Source(id) => u32::try_from(id.0).ok(),
                        },
                    }),
                    _ => None,
                },
                Event::Breaker(_) => None,
            });
        self.ejections.extend(ejected);
    }
}

impl Proxy for Undermesh {
    type Ticket = Ticket;

    fn begin(&mut self, client: u32, rng: &mut SmallRng, now: Timestamp) -> (Ticket, Step) {
        let (stage, step) = self.admit(client, now, rng, now);
        (Ticket { stage }, step)
    }

    fn ended(
        &mut self,
        ticket: &mut Ticket,
        outcome: Outcome,
        rng: &mut SmallRng,
        now: Timestamp,
    ) -> Step {
        let Stage::UnderWay(mut under_way) = std::mem::replace(&mut ticket.stage, Stage::Over)
        else {
            return Step::Finish(outcome);
        };
        if let Some(attempt) = under_way.attempt.take() {
            if let Some(limit) = &self.limit {
                limit.sample(now.since(attempt.started()), outcome, now);
            }
            attempt.finish(outcome, now);
        }
        let budget = under_way.source.budget();
        match under_way
            .retries
            .next(&self.policy, outcome, Facts::default(), &budget, rng, now)
        {
            Decision::Retry { after } => {
                ticket.stage = Stage::UnderWay(under_way);
                Step::Wait(after)
            }
            Decision::Stop(_) => {
                under_way.permit.finish(outcome, now);
                Step::Finish(outcome)
            }
        }
    }

    fn resume(&mut self, ticket: &mut Ticket, rng: &mut SmallRng, now: Timestamp) -> Step {
        match &mut ticket.stage {
            Stage::UnderWay(under_way) => self.send(under_way, rng, now),
            Stage::Queued { client, since } => {
                let (stage, step) = self.admit(*client, *since, rng, now);
                ticket.stage = stage;
                step
            }
            Stage::Over => Step::Finish(Outcome::Shed),
        }
    }

    fn cancel(&mut self, ticket: Ticket, now: Timestamp) {
        if let Stage::UnderWay(under_way) = ticket.stage {
            if let Some(attempt) = under_way.attempt {
                attempt.finish(Outcome::Cancelled, now);
            }
            under_way.permit.finish(Outcome::Cancelled, now);
        }
    }

    fn members(&mut self, present: &[u32], now: Timestamp) {
        let members: Vec<Member<u32>> = present.iter().copied().map(Member::new).collect();
        self.destination.replace(&members, now);
    }

    fn tick(&mut self, _: &dyn Fn(u32) -> bool, _: &mut SmallRng, now: Timestamp) {
        self.destination.maintain(now);
        self.drain();
    }

    fn take_ejections(&mut self) -> Vec<Ejected> {
        std::mem::take(&mut self.ejections)
    }

    fn connect_timeout(&self) -> Duration {
        self.timeouts.connect
    }
}
