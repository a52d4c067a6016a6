//! The discrete-event simulation: clients, nodes with their proxies, endpoints. Deterministic: the
//! same seed gives the same run.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::policy::{Proxy, Step};
use crate::report::Trace;
use crate::resilience::{Code, Failure, Outcome, Timestamp, outcome::Unsent};
use crate::scenario::{CLIENTS, NODES, PATIENCE, Scenario, What};
use crate::server::{Arrival, Condition, Job, Server};

/// One way over the network.
const NETWORK: Duration = Duration::from_micros(250);
const TICK: Duration = Duration::from_millis(100);
/// The client whose requests all fail.
const TENANT: u32 = CLIENTS;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrive {
        client: u32,
    },
    ArriveTenant,
    AtServer {
        request: usize,
        attempt: u32,
        endpoint: u32,
    },
    Served {
        endpoint: u32,
        generation: u32,
        request: usize,
        attempt: u32,
    },
    Answer {
        request: usize,
        attempt: u32,
        answer: Answer,
    },
    TimedOut {
        request: usize,
        attempt: u32,
    },
    Resume {
        request: usize,
    },
    GiveUp {
        request: usize,
    },
    Change {
        index: usize,
    },
    Tick,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Answer {
    Ok,
    Failed,
    Full,
    Refused,
    NoConnection,
    Reset,
}

impl Answer {
    const fn outcome(self) -> Outcome {
        match self {
            Self::Ok => Outcome::Success,
            Self::Failed => Outcome::Failure(Failure::Status(Code::Http(500))),
            Self::Full => Outcome::Failure(Failure::Status(Code::Http(503))),
            Self::Refused => Outcome::Unsent(Unsent::ConnectFailed),
            Self::NoConnection => Outcome::Unsent(Unsent::ConnectTimeout),
            Self::Reset => Outcome::Failure(Failure::Reset),
        }
    }
}

struct Request<T> {
    client: u32,
    began: Timestamp,
    attempt: u32,
    /// `None` once it is answered.
    ticket: Option<T>,
}

/// A run of one scenario under one policy.
pub struct World<'s, P: Proxy> {
    scenario: &'s Scenario,
    now: Timestamp,
    events: BinaryHeap<Reverse<(Timestamp, u64, Event)>>,
    serial: u64,
    /// Of its own, so that all policies get the same requests at the same moments.
    arrivals: SmallRng,
    rng: SmallRng,
    servers: Vec<Server>,
    present: BTreeSet<u32>,
    proxies: Vec<P>,
    requests: Vec<Request<P::Ticket>>,
    trace: Trace,
}

impl<'s, P: Proxy> World<'s, P> {
    /// Runs it to the end.
    pub fn run(scenario: &'s Scenario, proxy: impl Fn(u32) -> P, seed: u64) -> Trace {
        let most = scenario
            .changes
            .iter()
            .map(|change| change.endpoint + 1)
            .max()
            .unwrap_or(0)
            .max(scenario.endpoints);
        let mut world = Self {
            scenario,
            now: Timestamp::ZERO,
            events: BinaryHeap::new(),
            serial: 0,
            arrivals: SmallRng::seed_from_u64(seed),
            rng: SmallRng::seed_from_u64(seed.wrapping_add(1)),
            servers: (0..most).map(|_| Server::new()).collect(),
            present: (0..scenario.endpoints).collect(),
            proxies: (0..NODES).map(proxy).collect(),
            requests: Vec::new(),
            trace: Trace::new(scenario.length),
        };
        for fresh in scenario.endpoints..most {
            world.servers[fresh as usize].stop(Condition::Refusing);
        }
        world.tell_members();
        world.arrive_next();
        if let Some((from, _, _)) = scenario.tenant {
            world.after(from, Event::ArriveTenant);
        }
        world.after(TICK, Event::Tick);
        for (index, change) in scenario.changes.iter().enumerate() {
            world.after(change.at, Event::Change { index });
        }
        let end = Timestamp::ZERO + scenario.length;
        while let Some(Reverse((at, _, event))) = world.events.pop() {
            // Requests that began in time are seen to their end.
            if at > end + PATIENCE {
                break;
            }
            world.now = at;
            world.handle(event, end);
        }
        world.trace
    }

    fn after(&mut self, wait: Duration, event: Event) {
        self.serial += 1;
        self.events
            .push(Reverse((self.now + wait, self.serial, event)));
    }

    fn handle(&mut self, event: Event, end: Timestamp) {
        match event {
            Event::Arrive { client } => {
                if self.now < end {
                    self.begin(client);
                    self.arrive_next();
                }
            }
            Event::ArriveTenant => {
                if let Some((_, until, rate)) = self.scenario.tenant
                    && self.now.since(Timestamp::ZERO) < until
                {
                    self.begin(TENANT);
                    let wait = self.exponential(rate);
                    self.after(wait, Event::ArriveTenant);
                }
            }
            Event::AtServer {
                request,
                attempt,
                endpoint,
            } => self.at_server(Job { request, attempt }, endpoint),
            Event::Served {
                endpoint,
                generation,
                request,
                attempt,
            } => {
                if self.servers[endpoint as usize].generation() == generation {
                    self.served(Job { request, attempt }, endpoint);
                }
            }
            Event::Answer {
                request,
                attempt,
                answer,
            } => self.ended(request, attempt, answer.outcome()),
            Event::TimedOut { request, attempt } => {
                self.ended(request, attempt, Outcome::Failure(Failure::Timeout))
            }
            Event::Resume { request } => {
                let now = self.now;
                let node = self.node(request);
                if let Some(ticket) = &mut self.requests[request].ticket {
                    let step = self.proxies[node].resume(ticket, &mut self.rng, now);
                    self.follow(request, step);
                }
            }
            Event::GiveUp { request } => {
                let node = self.node(request);
                if let Some(ticket) = self.requests[request].ticket.take() {
                    self.proxies[node].cancel(ticket, self.now);
                    self.answered(request, Outcome::Cancelled);
                }
            }
            Event::Change { index } => self.change(index),
            Event::Tick => self.tick(end),
        }
    }

    fn exponential(&mut self, rate: f64) -> Duration {
        let chance: f64 = self.arrivals.random();
        Duration::from_secs_f64(-(1.0 - chance).ln() / rate)
    }

    fn arrive_next(&mut self) {
        let at = self.now.since(Timestamp::ZERO);
        let rush = self
            .scenario
            .rush
            .filter(|(from, until, _)| (*from..*until).contains(&at));
        let rate = self.scenario.rate * rush.map_or(1.0, |(_, _, factor)| factor);
        let wait = self.exponential(rate);
        let client = self.arrivals.random_range(0..CLIENTS);
        self.after(wait, Event::Arrive { client });
    }

    fn begin(&mut self, client: u32) {
        let request = self.requests.len();
        let node = (client % NODES) as usize;
        let (ticket, step) = self.proxies[node].begin(client, &mut self.rng, self.now);
        self.requests.push(Request {
            client,
            began: self.now,
            attempt: 0,
            ticket: Some(ticket),
        });
        self.after(PATIENCE, Event::GiveUp { request });
        self.follow(request, step);
    }

    fn follow(&mut self, request: usize, step: Step) {
        match step {
            Step::Send(endpoint) => {
                let bystander = self.is_bystander(request);
                let state = &mut self.requests[request];
                state.attempt += 1;
                let attempt = state.attempt;
                self.trace.attempt(self.now, bystander);
                self.after(
                    NETWORK,
                    Event::AtServer {
                        request,
                        attempt,
                        endpoint,
                    },
                );
                if let Some(limit) = self.scenario.attempt_timeout {
                    self.after(limit, Event::TimedOut { request, attempt });
                }
            }
            Step::Wait(wait) => self.after(wait, Event::Resume { request }),
            Step::Finish(outcome) => {
                self.requests[request].ticket = None;
                self.answered(request, outcome);
            }
        }
    }

    fn ended(&mut self, request: usize, attempt: u32, outcome: Outcome) {
        let node = self.node(request);
        let state = &mut self.requests[request];
        if state.attempt != attempt {
            return;
        }
        let Some(ticket) = &mut state.ticket else {
            return;
        };
        // The attempt is over, whoever else still works on it.
        state.attempt += 1;
        let step = self.proxies[node].ended(ticket, outcome, &mut self.rng, self.now);
        self.follow(request, step);
    }

    fn answered(&mut self, request: usize, outcome: Outcome) {
        if self.is_bystander(request) {
            self.trace.answered(
                self.requests[request].began,
                self.now,
                outcome == Outcome::Success,
            );
        }
    }

    fn at_server(&mut self, job: Job, endpoint: u32) {
        let Job { request, attempt } = job;
        let node = self.node(request);
        let server = &mut self.servers[endpoint as usize];
        let (wait, answer) = match server.condition {
            Condition::Refusing => (NETWORK, Answer::Refused),
            Condition::Silent => (self.proxies[node].connect_timeout(), Answer::NoConnection),
            Condition::Up => {
                match server.arrive(job, &self.scenario.shape, &mut self.rng, self.now) {
                    Arrival::Served(time) => {
                        let generation = server.generation();
                        return self.after(
                            time,
                            Event::Served {
                                endpoint,
                                generation,
                                request,
                                attempt,
                            },
                        );
                    }
                    Arrival::Queued => return,
                    Arrival::Full => (NETWORK, Answer::Full),
                }
            }
        };
        self.after(
            wait,
            Event::Answer {
                request,
                attempt,
                answer,
            },
        );
    }

    fn served(&mut self, job: Job, endpoint: u32) {
        let server = &mut self.servers[endpoint as usize];
        let next = server.done(job, &self.scenario.shape, &mut self.rng, self.now);
        let (generation, errors) = (server.generation(), server.errors);
        if let Some((Job { request, attempt }, time)) = next {
            self.after(
                time,
                Event::Served {
                    endpoint,
                    generation,
                    request,
                    attempt,
                },
            );
        }
        let failed =
            self.requests[job.request].client == TENANT || self.rng.random::<f64>() < errors;
        let answer = if failed { Answer::Failed } else { Answer::Ok };
        let Job { request, attempt } = job;
        self.after(
            NETWORK,
            Event::Answer {
                request,
                attempt,
                answer,
            },
        );
    }

    fn change(&mut self, index: usize) {
        let change = self.scenario.changes[index];
        let server = &mut self.servers[change.endpoint as usize];
        match change.what {
            What::Stop(condition) => {
                for Job { request, attempt } in server.stop(condition) {
                    self.after(
                        NETWORK,
                        Event::Answer {
                            request,
                            attempt,
                            answer: Answer::Reset,
                        },
                    );
                }
            }
            What::Start => server.start(self.now),
            What::Slow(factor) => (server.slowness, server.well_since) = (factor, self.now),
            What::Err(share) => (server.errors, server.well_since) = (share, self.now),
            What::Leave => {
                self.present.remove(&change.endpoint);
                self.members_changed();
            }
            What::Join => {
                self.present.insert(change.endpoint);
                self.members_changed();
            }
        }
    }

    /// A batch of changes at one moment is told as one.
    fn members_changed(&mut self) {
        let more = self.events.peek().is_some_and(|Reverse((at, _, event))| {
            let next = matches!(event, Event::Change { index }
                if matches!(self.scenario.changes[*index].what, What::Leave | What::Join));
            *at == self.now && next
        });
        if !more {
            self.tell_members();
        }
    }

    fn tell_members(&mut self) {
        let present: Vec<u32> = self.present.iter().copied().collect();
        for proxy in &mut self.proxies {
            proxy.members(&present, self.now);
        }
    }

    fn tick(&mut self, end: Timestamp) {
        let servers = &self.servers;
        let reachable = |endpoint: u32| servers[endpoint as usize].condition == Condition::Up;
        for proxy in &mut self.proxies {
            proxy.tick(&reachable, &mut self.rng, self.now);
            for ejected in proxy.take_ejections() {
                let server = &servers[ejected.endpoint as usize];
                // One that was sick a moment ago may be ejected for it still.
                let well =
                    server.is_well() && self.now.since(server.well_since) > Duration::from_secs(1);
                if well && ejected.only_for != Some(TENANT) {
                    self.trace.false_ejections += 1;
                }
            }
        }
        if self.now < end {
            self.after(TICK, Event::Tick);
        }
    }

    fn node(&self, request: usize) -> usize {
        (self.requests[request].client % NODES) as usize
    }

    fn is_bystander(&self, request: usize) -> bool {
        self.requests[request].client != TENANT
    }
}
