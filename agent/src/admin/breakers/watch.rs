//! What breakers and ejections did: logged, counted, and the last of each breaker remembered.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::resilience::breaker::{Cause, Transition};
use crate::resilience::ejection::{self, Change, Movement, Return, Scope};
use crate::resilience::{BreakerState, Event, EventSink};

/// Breakers, and destinations, of which moves are remembered; those beyond are logged and count
/// as `_overflow`.
const REMEMBERED: usize = 4_096;

/// Name of what stands for all that found no room.
const OVERFLOW: &str = "_overflow";

/// Takes the events of breakers and ejections: each is logged with its cause and counted.
#[derive(Debug, Default)]
pub struct BreakerWatch {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    breakers: HashMap<Arc<str>, Moves>,
    ejections: HashMap<Arc<str>, BTreeMap<&'static str, u64>>,
}

/// The moves of one breaker.
#[derive(Debug, Default)]
struct Moves {
    last: Option<Moved>,
    into: BTreeMap<&'static str, u64>,
}

/// The last move of a breaker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Moved {
    /// When, as RFC 3339 in UTC.
    since: String,
    /// Why.
    cause: String,
}

impl BreakerWatch {
    /// One that has seen nothing.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The last move of the breaker of this name.
    pub(super) fn moved(&self, breaker: &str) -> Option<Moved> {
        self.state.lock().breakers.get(breaker)?.last.clone()
    }

    /// How often each breaker moved, by the state that it moved to.
    pub(super) fn transitions(&self) -> Vec<(Arc<str>, &'static str, u64)> {
        let state = self.state.lock();
        flattened(
            state
                .breakers
                .iter()
                .map(|(name, moves)| (name, &moves.into)),
        )
    }

    /// How often endpoints of each destination were ejected, by cause.
    pub(super) fn ejections(&self) -> Vec<(Arc<str>, &'static str, u64)> {
        flattened(self.state.lock().ejections.iter())
    }

    /// Forgets what is not there any more.
    pub(super) fn retain(
        &self,
        breaker: impl Fn(&str) -> bool,
        destination: impl Fn(&str) -> bool,
    ) {
        let mut state = self.state.lock();
        state
            .breakers
            .retain(|name, _| &**name == OVERFLOW || breaker(name));
        state
            .ejections
            .retain(|name, _| &**name == OVERFLOW || destination(name));
    }

    fn breaker_moved(&self, transition: &Transition) {
        let Transition {
            breaker,
            at: _,
            from,
            to,
            cause,
        } = transition;
        let cause = told(cause);
        tracing::warn!(
            breaker = &**breaker,
            from = name(*from),
            to = name(*to),
            cause = cause.as_str(),
            "circuit breaker moved"
        );
        let mut state = self.state.lock();
        let moves = slot(&mut state.breakers, breaker);
        *moves.into.entry(name(*to)).or_default() += 1;
        moves.last = Some(Moved {
            since: OffsetDateTime::from(SystemTime::now())
                .format(&Rfc3339)
                .unwrap_or_default(),
            cause,
        });
    }

    fn endpoint_moved(&self, movement: &Movement) {
        let Movement {
            destination,
            endpoint,
            at,
            scope,
            change,
        } = movement;
        let scope = match scope {
            Scope::Everyone => "everyone",
            Scope::Source(_) => "source",
        };
        match change {
            Change::Ejected {
                cause,
                until,
                times,
            } => {
                let (label, cause) = ejected(cause);
                tracing::warn!(
                    destination = &**destination,
                    endpoint = endpoint.as_str(),
                    scope,
                    cause = cause.as_str(),
                    seconds = until.since(*at).as_secs_f64(),
                    times,
                    "endpoint ejected"
                );
                let mut state = self.state.lock();
                let causes = slot(&mut state.ejections, destination);
                *causes.entry(label).or_default() += 1;
            }
            Change::Returned(cause) => {
                let cause = match cause {
                    Return::ProbeSucceeded => "a request to it succeeded",
                    Return::Floor => "too few others are left",
                };
                tracing::info!(
                    destination = &**destination,
                    endpoint = endpoint.as_str(),
                    scope,
                    cause,
                    "endpoint returned"
                );
            }
        }
    }
}

impl EventSink for BreakerWatch {
    fn event(&self, event: Event) {
        match event {
            Event::Breaker(transition) => self.breaker_moved(&transition),
            Event::Ejection(movement) => self.endpoint_moved(&movement),
        }
    }
}

fn slot<'a, V: Default>(map: &'a mut HashMap<Arc<str>, V>, name: &Arc<str>) -> &'a mut V {
    let room = map.len() < REMEMBERED || map.contains_key(name);
    let name = if room { name.clone() } else { OVERFLOW.into() };
    map.entry(name).or_default()
}

fn flattened<'a>(
    counts: impl Iterator<Item = (&'a Arc<str>, &'a BTreeMap<&'static str, u64>)>,
) -> Vec<(Arc<str>, &'static str, u64)> {
    counts
        .flat_map(|(name, values)| {
            values
                .iter()
                .map(|(value, count)| (name.clone(), *value, *count))
        })
        .collect()
}

/// The label's value of a state.
pub(super) const fn name(state: BreakerState) -> &'static str {
    match state {
        BreakerState::Closed => "closed",
        BreakerState::Open => "open",
        BreakerState::HalfOpen => "half_open",
    }
}

fn told(cause: &Cause) -> String {
    match cause {
        Cause::FailureRatio { failed, total } => format!("{failed} of {total} requests failed"),
        Cause::ConsecutiveFailures(count) => format!("{count} requests in a row failed"),
        Cause::OpenTimePassed => "the open time has passed".to_owned(),
        Cause::ProbesSucceeded(count) => format!("{count} probes succeeded"),
        Cause::ProbeFailed => "a probe failed".to_owned(),
        Cause::Operator => "an operator said so".to_owned(),
    }
}

/// The label's value, and the cause in words.
fn ejected(cause: &ejection::Cause) -> (&'static str, String) {
    use ejection::Cause;
    match cause {
        Cause::ConsecutiveFailures(count) => {
            let told = format!("{count} attempts in a row failed");
            ("consecutive_failures", told)
        }
        Cause::FailureRatio { failed, total } => {
            let told = format!("{failed} of {total} attempts failed");
            ("failure_ratio", told)
        }
        Cause::SuccessRate { rate, threshold } => {
            let told = format!("{rate:.3} of its attempts succeeded; of its peers' {threshold:.3}");
            ("success_rate", told)
        }
        Cause::ProbeFailed => {
            let told = "the request that was to bring it back failed".to_owned();
            ("probe_failed", told)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::resilience::Timestamp;
    use crate::telemetry::testing::logged_as_json;

    fn opened(breaker: &str) -> Event {
        Event::Breaker(Transition {
            breaker: breaker.into(),
            at: Timestamp::ZERO,
            from: BreakerState::Closed,
            to: BreakerState::Open,
            cause: Cause::ConsecutiveFailures(5),
        })
    }

    #[test]
    fn a_transition_is_logged_with_its_cause() {
        let line = logged_as_json(|| BreakerWatch::new().event(opened("shop/cart:80/none")));
        assert_eq!(line["message"], "circuit breaker moved");
        assert_eq!(line["level"], "WARN");
        assert_eq!(line["breaker"], "shop/cart:80/none");
        assert_eq!(
            (&line["from"], &line["to"]),
            (&"closed".into(), &"open".into())
        );
        assert_eq!(line["cause"], "5 requests in a row failed");
    }

    #[test]
    fn an_ejection_is_logged_and_counted_with_its_cause() {
        let watch = BreakerWatch::new();
        let line = logged_as_json(|| {
            watch.event(Event::Ejection(Movement {
                destination: "shop/cart:80".into(),
                endpoint: "10.0.0.1:80".to_owned(),
                at: Timestamp::ZERO,
                scope: Scope::Everyone,
                change: Change::Ejected {
                    cause: ejection::Cause::FailureRatio {
                        failed: 6,
                        total: 10,
                    },
                    until: Timestamp::ZERO + Duration::from_secs(2),
                    times: 1,
                },
            }));
        });
        assert_eq!(line["message"], "endpoint ejected");
        assert_eq!(line["endpoint"], "10.0.0.1:80");
        assert_eq!(line["seconds"], 2.0);
        let expected = ("shop/cart:80".into(), "failure_ratio", 1);
        assert_eq!(watch.ejections(), [expected]);
    }

    #[test]
    fn what_is_remembered_is_bounded_and_what_is_gone_is_forgotten() {
        let watch = BreakerWatch::new();
        for number in 0..REMEMBERED + 10 {
            watch.event(opened(&format!("breaker-{number}")));
        }
        let transitions = watch.transitions();
        assert_eq!(transitions.len(), REMEMBERED + 1);
        let overflow: u64 = transitions
            .iter()
            .filter(|(name, _, _)| &**name == OVERFLOW)
            .map(|(_, _, count)| count)
            .sum();
        assert_eq!(overflow, 10);
        watch.retain(|name| name == "breaker-1", |_| false);
        assert_eq!(watch.transitions().len(), 2);
        assert!(watch.moved("breaker-1").is_some());
        assert!(watch.moved("breaker-2").is_none());
    }
}
