//! The states of breakers, as an agent exports them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use serde::Serialize;

use crate::Agent;
use crate::metrics::Metrics;

const STATE: &str = "undermesh_circuit_breaker_state";
const REJECTIONS: &str = "undermesh_circuit_breaker_rejections_total";
/// How often the states are read. A state that is shorter is seen only in the agent's log.
const STEP: Duration = Duration::from_millis(15);

/// A breaker changed its state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Transition {
    /// Since the start of the run, in milliseconds.
    pub t_ms: u64,
    /// Whose breaker.
    pub destination: String,
    /// `closed`, `open` or `half_open`.
    pub from: String,
    /// Likewise.
    pub to: String,
    /// Why, as the agent's log says.
    pub cause: String,
}

impl fmt::Display for Transition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:>6} ms: breaker of {}: {} → {}",
            self.t_ms, self.destination, self.from, self.to
        )?;
        if !self.cause.is_empty() {
            write!(f, " ({})", self.cause)?;
        }
        Ok(())
    }
}

/// Reads the states in the background.
pub(super) struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Transition>>,
}

impl Watch {
    /// From now on; `start` is the zero of the times.
    pub fn start(agent: Agent, start: Instant) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut states = BTreeMap::new();
            let mut transitions = Vec::new();
            while !until.load(Ordering::Relaxed) {
                let at = start.elapsed();
                // An agent that is too busy for one reading has time for the next.
                if let Ok(text) = agent.metrics() {
                    compare(&mut states, &mut transitions, &Metrics::parse(&text), at);
                }
                std::thread::sleep(STEP);
            }
            transitions
        });
        Self { stop, thread }
    }

    /// What was seen.
    pub fn finish(self) -> Result<Vec<Transition>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| anyhow!("reading the breakers panicked"))
    }
}

fn compare(
    states: &mut BTreeMap<String, f64>,
    transitions: &mut Vec<Transition>,
    metrics: &Metrics,
    at: Duration,
) {
    for (destination, state) in metrics.by(STATE, "destination") {
        let before = states.insert(destination.clone(), state).unwrap_or(0.0);
        if name(before) != name(state) {
            transitions.push(Transition {
                t_ms: u64::try_from(at.as_millis()).unwrap_or(u64::MAX),
                destination,
                from: name(before).to_owned(),
                to: name(state).to_owned(),
                cause: String::new(),
            });
        }
    }
}

fn name(state: f64) -> &'static str {
    match state {
        0.0 => "closed",
        1.0 => "open",
        2.0 => "half_open",
        _ => "unknown",
    }
}

/// Requests that open breakers rejected so far.
pub(super) fn rejected(agent: &Agent) -> Result<u64> {
    Ok(Metrics::parse(&agent.metrics()?).count(REJECTIONS, &[]))
}

/// Adds what the agent's log says of the causes: its lines and the transitions are in the same order.
pub(super) fn explain(agent: &Agent, transitions: &mut [Transition]) -> Result<()> {
    let log = std::fs::read_to_string(agent.log())?;
    for transition in transitions.iter_mut() {
        let wanted = [
            format!("from={}", transition.from),
            format!("to={}", transition.to),
        ];
        let line = log
            .lines()
            .find(|line| wanted.iter().all(|word| line.contains(word)));
        if let Some(cause) = line.and_then(cause) {
            cause.clone_into(&mut transition.cause);
        }
    }
    Ok(())
}

/// The value of the field `cause` of a line of the log.
fn cause(line: &str) -> Option<&str> {
    let (_, rest) = line.split_once("cause=")?;
    match rest.strip_prefix('"') {
        Some(quoted) => quoted.split('"').next(),
        None => rest.split_whitespace().next(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_of_the_gauge_is_a_transition() {
        let (mut states, mut transitions) = (BTreeMap::new(), Vec::new());
        for (ms, state) in [(0, 0), (10, 1), (20, 1), (30, 2), (40, 0)] {
            let metrics = Metrics::parse(&format!(
                "{STATE}{{destination=\"default/api:80\"}} {state}"
            ));
            let at = Duration::from_millis(ms);
            compare(&mut states, &mut transitions, &metrics, at);
        }
        let seen: Vec<_> = transitions
            .iter()
            .map(|one| (one.t_ms, &*one.from, &*one.to))
            .collect();
        assert_eq!(
            seen,
            [
                (10, "closed", "open"),
                (30, "open", "half_open"),
                (40, "half_open", "closed"),
            ]
        );
    }

    #[test]
    fn the_cause_is_the_value_of_its_field() {
        assert_eq!(cause("x from=open cause=operator y"), Some("operator"));
        assert_eq!(
            cause("x cause=\"failure ratio 0.95\" y"),
            Some("failure ratio 0.95")
        );
        assert_eq!(cause("nothing"), None);
    }
}
