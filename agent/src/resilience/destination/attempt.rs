//! An attempt: from the choice of its endpoint to the verdict over it.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use super::Source;
use crate::resilience::ejection::Probe;
use crate::resilience::endpoint::{Endpoint, Target};
use crate::resilience::outcome::{Outcome, Verdict};
use crate::resilience::time::Timestamp;

/// One attempt under way. Dropped without an outcome it is a cancellation: no verdict, and what it
/// held is free again. Whoever holds it owns a share of the source, or borrows it (`S`).
#[derive(Debug)]
#[must_use]
pub struct Attempt<T: Target, S: Deref<Target = Source<T>> = Arc<Source<T>>> {
    source: S,
    endpoint: Arc<Endpoint<T>>,
    started: Timestamp,
    /// How long the head of the answer took.
    latency: Option<Duration>,
    probe: Option<Probe>,
    settled: bool,
}

impl<T: Target, S: Deref<Target = Source<T>>> Attempt<T, S> {
    pub(super) fn begin(
        source: S,
        endpoint: Arc<Endpoint<T>>,
        probe: Option<Probe>,
        now: Timestamp,
    ) -> Self {
        endpoint.begin(now);
        source.destination.chooser.begin();
        Self {
            source,
            endpoint,
            started: now,
            latency: None,
            probe,
            settled: false,
        }
    }

    /// Where it goes.
    pub fn target(&self) -> &T {
        self.endpoint.target()
    }

    /// Whether it decides over the return of an ejected endpoint.
    pub const fn is_probe(&self) -> bool {
        self.probe.is_some()
    }

    /// When it began.
    pub const fn started(&self) -> Timestamp {
        self.started
    }

    /// The head of the answer has come, so the endpoint's latency is known. How long the rest takes
    /// is a matter of its size, or of a stream that may be open for hours: it counts as load, but
    /// nobody waits for it.
    pub fn answered(&mut self, now: Timestamp) {
        if self.latency.is_none() {
            self.latency = Some(now.since(self.started));
            self.endpoint.answered(now);
        }
    }

    /// Tells how it ended.
    pub fn finish(mut self, outcome: Outcome, now: Timestamp) {
        self.settle(outcome, now);
    }

    /// Tells how it went while it is still under way, as with a stream that is served well so far.
    /// It goes on counting as load until it is dropped; what is told of it later is not heard.
    pub fn settle(&mut self, outcome: Outcome, now: Timestamp) {
        if std::mem::replace(&mut self.settled, true) {
            return;
        }
        let verdict = outcome.of_endpoint();
        if verdict.is_some() {
            self.endpoint.progressed(now);
        }
        let elapsed = self.latency.unwrap_or_else(|| now.since(self.started));
        match (outcome, verdict) {
            // Nothing was learned of the endpoint's speed.
            (Outcome::Shed | Outcome::Unsent(_), None) => {}
            (_, Some(Verdict::Bad)) => {
                self.endpoint.load.observe_if_slower(elapsed, now);
                self.endpoint.load.punish(now);
            }
            // It took at least this long: else an endpoint that hangs would look idle and fast.
            (Outcome::Cancelled, _) => self.endpoint.load.observe_if_slower(elapsed, now),
            _ => self.endpoint.load.observe(elapsed, now),
        }
        let ejector = &self.source.destination.ejector;
        if let Some(probe) = self.probe.take() {
            ejector.probed(&self.endpoint, probe, verdict.map(|verdict| (verdict, now)));
        } else if let Some(verdict) = verdict
            && !self.endpoint.is_straggler(self.started)
        {
            let alone = || {
                self.source
                    .destination
                    .is_alone(self.source.state.id(), now)
            };
            ejector.judge(&self.endpoint, &self.source.state, verdict, alone, now);
        }
    }
}

impl<T: Target, S: Deref<Target = Source<T>>> Drop for Attempt<T, S> {
    fn drop(&mut self) {
        self.endpoint.end(self.latency.is_some());
        self.source.destination.chooser.end();
        if let Some(probe) = self.probe.take() {
            self.source
                .destination
                .ejector
                .probed(&self.endpoint, probe, None);
        }
    }
}
