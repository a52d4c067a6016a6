//! A destination as one pod sees it.

use std::sync::Arc;

use rand::Rng;

use super::destination::Balanced;
use super::name::EndpointId;
use crate::resilience::Timestamp;
use crate::resilience::budget::Share;
use crate::resilience::destination::{Ask, Attempt, Source};
use crate::resilience::ejection::SourceId;

/// The endpoints of a destination that a pod can reach. A dual-stack Service has every pod twice,
/// once for each family: those of the family that the client dialled come first.
#[derive(Debug, Clone)]
pub struct Reachable {
    first: Arc<Source<EndpointId>>,
    second: Option<Arc<Source<EndpointId>>>,
}

impl Reachable {
    pub(super) fn new(
        first: &Arc<Balanced>,
        second: Option<&Arc<Balanced>>,
        source: SourceId,
        now: Timestamp,
    ) -> Self {
        Self {
            first: first.source(source, now),
            second: second.map(|balanced| balanced.source(source, now)),
        }
    }

    /// An endpoint for an attempt that begins now: of the other family where this one has none that
    /// was not tried. None if there is no endpoint at all.
    pub fn pick(
        &self,
        ask: &Ask<'_, EndpointId>,
        rng: &mut (impl Rng + ?Sized),
        now: Timestamp,
    ) -> Option<Attempt<EndpointId>> {
        let first = self.first.pick(ask, rng, now).ok();
        let is_new = |attempt: &Attempt<EndpointId>| !ask.tried.contains(attempt.target());
        if first.as_ref().is_some_and(is_new) {
            return first;
        }
        let second = self.second.as_ref();
        let second = second.and_then(|source| source.pick(ask, rng, now).ok());
        second.filter(is_new).or(first)
    }

    /// This endpoint, as a session wants it; none if it is gone, ejected or out of reach.
    pub fn pick_this(&self, endpoint: &EndpointId, now: Timestamp) -> Option<Attempt<EndpointId>> {
        let first = self.first.pick_this(endpoint, now);
        first.or_else(|| self.second.as_ref()?.pick_this(endpoint, now))
    }

    /// How many endpoints there are.
    #[must_use]
    pub fn len(&self) -> usize {
        let second = self.second.as_ref();
        self.first.destination().len() + second.map_or(0, |source| source.destination().len())
    }

    /// This pod's part of the retry budget.
    #[must_use]
    pub fn budget(&self) -> Share<'_> {
        self.first.budget()
    }
}
