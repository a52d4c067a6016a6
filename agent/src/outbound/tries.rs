//! One endpoint after another, until one takes a connection.
//!
//! Where another endpoint could take over, a silent one is left soon. The last one gets more time:
//! its client would have waited for it as well, while the kernel sends the SYN again (RFC 6298, after
//! 1, 3, 7 s), as to an app whose queue is full for a moment.

use std::future::Future;
use std::time::Duration;

use super::clock::Clock;
use super::connect::Failure;
use super::destinations::{EndpointId, Reachable};
use crate::mesh::{MeshConfig, TrafficPolicy};
use crate::resilience::destination::{Ask, Attempt};
use crate::resilience::retry::{Body, Decision, Facts, Method, Nature, Stop};
use crate::resilience::timeout::Deadline;
use crate::resilience::{Outcome, Retries, Timestamp, Unsent};
use crate::telemetry::FailureReason;

/// What is tried, and how often.
pub(super) struct Tries<'a> {
    pub(super) reachable: &'a Reachable,
    pub(super) policy: &'a TrafficPolicy,
    pub(super) config: &'a MeshConfig,
    pub(super) clock: Clock,
}

impl Tries<'_> {
    /// What the first endpoint gave that took the connection, else why the last one did not. `open`
    /// hears how long it may take.
    pub(super) async fn run<T, F>(
        &self,
        open: impl Fn(EndpointId, Duration) -> F,
    ) -> Result<(Attempt<EndpointId>, T), Failure>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let Self {
            reachable,
            policy,
            config,
            clock,
        } = *self;
        let retry = &policy.settings.retry;
        let budget = reachable.budget();
        // Nothing of the client was read yet: whatever it is, it can be sent elsewhere.
        let nature = Nature {
            method: Method::Other,
            body: Body::None,
        };
        let no_deadline = Deadline::at(Timestamp::NEVER);
        let mut retries = Retries::begin(&budget, nature, no_deadline, clock.now());
        let mut tried: Vec<EndpointId> = Vec::new();
        let mut last: Option<Failure> = None;
        loop {
            let ask = Ask {
                tried: &tried,
                ..Ask::default()
            };
            let attempt = reachable.pick(&ask, &mut rand::rng(), clock.now());
            let Some(attempt) = attempt.filter(|one| !tried.contains(one.target())) else {
                return Err(last.unwrap_or_else(no_endpoint));
            };
            let others = tried.len() + 1 < reachable.len() && retries.are_left(retry);
            let limit = match others {
                true => policy.connect_limit(config),
                false => policy.last_connect_limit(config),
            };
            let failure = match open(attempt.target().clone(), limit).await {
                Ok(opened) => return Ok((attempt, opened)),
                Err(failure) => failure,
            };
            tried.push(attempt.target().clone());
            attempt.finish(failure.outcome(), clock.now());
            let decision = match others && failure.may_go_elsewhere() {
                true => retries.next(
                    retry,
                    Outcome::Unsent(Unsent::ConnectFailed),
                    Facts::default(),
                    &budget,
                    &mut rand::rng(),
                    clock.now(),
                ),
                false => Decision::Stop(Stop::NotRetriable),
            };
            match decision {
                Decision::Retry { after } => tokio::time::sleep(after).await,
                Decision::Stop(_) => return Err(failure),
            }
            last = Some(failure);
        }
    }
}

pub(super) fn no_endpoint() -> Failure {
    Failure::new(
        FailureReason::NoEndpoint,
        "no endpoint of the service is ready",
    )
}

#[cfg(test)]
#[path = "tries_tests.rs"]
mod tests;
