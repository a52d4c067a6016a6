//! What happens to the endpoints, and who asks them.

use std::time::Duration;

use crate::server::{Condition, Shape};

/// One story.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is, in a line.
    pub about: &'static str,
    /// How many endpoints there are.
    pub endpoints: u32,
    /// What they are like.
    pub shape: Shape,
    /// Requests per second of all clients together.
    pub rate: f64,
    /// How long it lasts.
    pub length: Duration,
    /// A time with this many times the rate.
    pub rush: Option<(Duration, Duration, f64)>,
    /// One more client whose requests all fail: from when, until when, how many per second.
    pub tenant: Option<(Duration, Duration, f64)>,
    /// The time limit of one attempt that the route sets, for every policy.
    pub attempt_timeout: Option<Duration>,
    /// What happens.
    pub changes: Vec<Change>,
    /// The faults, for the drawing, and from when recovery is measured.
    pub fault: (Duration, Duration),
    /// From when recovery is measured: the end of the fault, or its start if others can help out.
    pub recover_from: Duration,
}

/// Something that happens to an endpoint.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    /// When.
    pub at: Duration,
    /// To which endpoint.
    pub endpoint: u32,
    /// What.
    pub what: What,
}

/// What happens to an endpoint.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum What {
    /// Its process ends: what it was doing is reset.
    Stop(Condition),
    /// A new process starts, cold.
    Start,
    /// It takes so many times as long.
    Slow(f64),
    /// Such a share of its answers is 500.
    Err(f64),
    /// Discovery takes it out.
    Leave,
    /// Discovery takes it in.
    Join,
}

/// How many clients there are, and over how many nodes they are spread.
pub const CLIENTS: u32 = 1000;
/// Nodes, each with a proxy of its own.
pub const NODES: u32 = 10;
/// How long a client waits for an answer.
pub const PATIENCE: Duration = Duration::from_secs(2);

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Twenty endpoints at 60 % of what they can do, for a minute, and nothing happens.
fn calm(name: &'static str, about: &'static str) -> Scenario {
    Scenario {
        name,
        about,
        endpoints: 20,
        shape: Shape {
            workers: 4,
            queue: 400,
            service: ms(20),
            cold: s(5),
        },
        rate: 2400.0,
        length: s(60),
        rush: None,
        tenant: None,
        attempt_timeout: None,
        changes: Vec::new(),
        fault: (s(20), s(40)),
        recover_from: s(20),
    }
}

/// A hundred endpoints at 60 % of what they can do.
fn hundred(name: &'static str, about: &'static str) -> Scenario {
    Scenario {
        endpoints: 100,
        shape: Shape {
            workers: 2,
            queue: 100,
            service: ms(50),
            cold: s(5),
        },
        ..calm(name, about)
    }
}

fn change(at: Duration, endpoint: u32, what: What) -> Change {
    Change { at, endpoint, what }
}

fn outage(
    endpoints: impl Iterator<Item = u32>,
    condition: Condition,
    from: Duration,
    until: Duration,
) -> Vec<Change> {
    let both = |endpoint| {
        [
            change(from, endpoint, What::Stop(condition)),
            change(until, endpoint, What::Start),
        ]
    };
    endpoints.flat_map(both).collect()
}

/// All stories.
pub fn all() -> Vec<Scenario> {
    let one = Scenario {
        changes: outage(0..1, Condition::Refusing, s(20), s(40)),
        ..calm(
            "one_down",
            "one endpoint of 20 refuses connections for 20 s",
        )
    };
    let one_silent = Scenario {
        changes: outage(0..1, Condition::Silent, s(20), s(40)),
        ..calm(
            "one_silent",
            "one endpoint of 20 answers nothing, not even a refusal, for 20 s",
        )
    };
    let some = Scenario {
        changes: outage(0..30, Condition::Refusing, s(20), s(40)),
        ..hundred(
            "some_down",
            "30 endpoints of 100 refuse connections for 20 s",
        )
    };
    let every = Scenario {
        changes: (0..20)
            .flat_map(|endpoint| {
                let back = s(40) + ms(250) * endpoint;
                outage(endpoint..endpoint + 1, Condition::Refusing, s(20), back)
            })
            .collect(),
        recover_from: s(40),
        rate: 1200.0,
        fault: (s(20), s(45)),
        ..calm(
            "all_down",
            "all 20 endpoints refuse connections for 20 s, then come back one by one within 5 s",
        )
    };
    let slow = Scenario {
        changes: (0..10)
            .flat_map(|endpoint| {
                [
                    change(s(20), endpoint, What::Slow(40.0)),
                    change(s(40), endpoint, What::Slow(1.0)),
                ]
            })
            .collect(),
        ..hundred(
            "slow",
            "10 endpoints of 100 take 40 times as long, and answer, for 20 s",
        )
    };
    let flapping = Scenario {
        changes: (0..3)
            .flat_map(|endpoint| {
                (0..6).flat_map(move |round| {
                    let from = s(15) + ms(6000) * round + ms(700) * endpoint;
                    outage(
                        endpoint..endpoint + 1,
                        Condition::Refusing,
                        from,
                        from + s(3),
                    )
                })
            })
            .collect(),
        fault: (s(15), s(50)),
        recover_from: s(15),
        ..calm(
            "flapping",
            "three endpoints of 20 go down and up, 3 s each, for 35 s",
        )
    };
    vec![
        one,
        one_silent,
        some,
        every,
        slow,
        flapping,
        rolling(),
        storm(),
        tenant(),
        thundering(),
    ]
}

/// A thousand endpoints are replaced, a hundred at a time. The old process stops listening half a
/// second before discovery has told all nodes; the new one has another address.
fn rolling() -> Scenario {
    let mut changes = Vec::new();
    for batch in 0..10u32 {
        let at = s(10) + ms(3000) * batch;
        for endpoint in batch * 100..batch * 100 + 100 {
            let fresh = endpoint + 1000;
            changes.push(change(at, fresh, What::Start));
            changes.push(change(at + ms(500), fresh, What::Join));
            changes.push(change(
                at + ms(1000),
                endpoint,
                What::Stop(Condition::Refusing),
            ));
            changes.push(change(at + ms(1500), endpoint, What::Leave));
        }
    }
    Scenario {
        endpoints: 1000,
        changes,
        shape: Shape {
            workers: 1,
            queue: 50,
            service: ms(50),
            cold: s(5),
        },
        rate: 4000.0,
        fault: (s(10), s(40)),
        recover_from: s(10),
        ..calm(
            "rolling_restart",
            "1,000 endpoints are replaced in batches of 100; discovery lags by 0.5 s",
        )
    }
}

/// A rush to 140 % of what the endpoints can do, under a time limit per attempt that invites
/// retries.
fn storm() -> Scenario {
    Scenario {
        rush: Some((s(20), s(30), 2.4)),
        attempt_timeout: Some(ms(500)),
        fault: (s(20), s(30)),
        recover_from: s(30),
        ..calm(
            "retry_storm",
            "10 s at 144 % of capacity, with 500 ms per attempt, then 60 % again",
        )
    }
}

/// One pod's requests all fail, while an endpoint goes down.
fn tenant() -> Scenario {
    Scenario {
        tenant: Some((s(10), s(50), 600.0)),
        changes: outage(0..1, Condition::Refusing, s(20), s(40)),
        fault: (s(10), s(50)),
        recover_from: s(20),
        ..calm(
            "noisy_tenant",
            "one client's 600 requests a second all get 500, and an endpoint goes down; others are counted",
        )
    }
}

/// All endpoints come back at once, cold, at 85 % of what they can do when warm.
fn thundering() -> Scenario {
    Scenario {
        changes: outage(0..20, Condition::Refusing, s(20), s(30)),
        rate: 3400.0,
        attempt_timeout: Some(ms(500)),
        fault: (s(20), s(30)),
        recover_from: s(30),
        ..calm(
            "thundering_recovery",
            "all 20 endpoints refuse for 10 s and come back cold, a third as fast, under 85 % load",
        )
    }
}
