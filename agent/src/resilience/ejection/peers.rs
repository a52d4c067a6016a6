//! Success rate against peers: who is worse than the others by more than chance explains.

use std::sync::Arc;

use super::super::endpoint::{Endpoint, Target};
use super::super::time::Timestamp;
use super::{Cause, Ejector, Scope, SourceId, SourceState};

impl<T: Target> Ejector<T> {
    /// Compares all endpoints, once a window. Linear in their number, so it belongs on a timer and
    /// not on the path of a request.
    pub(in super::super) fn compare_peers<'a>(
        &self,
        endpoints: impl Iterator<Item = &'a Arc<Endpoint<T>>>,
        source: impl Fn(SourceId) -> Option<Arc<SourceState<T>>>,
        now: Timestamp,
    ) {
        let Some(trigger) = self.settings().success_rate else {
            return;
        };
        let mut judged = Vec::new();
        for endpoint in endpoints.filter(|endpoint| !endpoint.is_ejected()) {
            let (ok, failed) = endpoint.health.counts(now);
            if ok + failed >= u64::from(trigger.minimum_requests) {
                judged.push((endpoint, ok as f64 / (ok + failed) as f64));
            }
        }
        if judged.len() < trigger.minimum_endpoints as usize {
            return;
        }
        let count = judged.len() as f64;
        let mean = judged.iter().map(|(_, rate)| rate).sum::<f64>() / count;
        let variance = judged
            .iter()
            .map(|(_, rate)| (rate - mean).powi(2))
            .sum::<f64>()
            / count;
        let threshold = (mean - trigger.deviations * variance.sqrt()).min(mean - trigger.tolerance);
        for (endpoint, rate) in judged.into_iter().filter(|(_, rate)| *rate < threshold) {
            let scope = endpoint.health.scope_of_failures(now);
            let witness = match scope {
                Scope::Source(id) => source(id),
                Scope::Everyone => None,
            };
            self.eject(
                endpoint,
                scope,
                witness.as_ref(),
                Cause::SuccessRate { rate, threshold },
                now,
            );
        }
    }
}
