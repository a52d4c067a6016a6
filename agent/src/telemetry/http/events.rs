//! What is counted by Service and route besides requests.

/// Something that happened on the way of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RequestEvent {
    /// A failed attempt is made again.
    RetryGranted,
    /// It is not: the retry budget is spent.
    RetryBudgetSpent,
    /// It is not: no attempt is left.
    RetryAttemptsSpent,
    /// It is not: the deadline would pass first.
    RetryDeadlineNear,
    /// It is not: the request may not be sent twice.
    RetryNotRepeatable,
    /// It is not: the client has seen part of the answer.
    RetryAnswerBegun,
    /// It is not: the server asks to wait for longer than is allowed.
    RetryAfterTooLong,
    /// The source's own rate limit was reached.
    RateLimitedSource,
    /// The route's rate limit was reached.
    RateLimitedRoute,
    /// The destination's rate limit was reached.
    RateLimitedTotal,
    /// The limit of connections to the destination was reached.
    ShedConnections,
    /// The limit of requests that wait was reached, or one waited for too long.
    ShedPending,
    /// The limit of requests in flight was reached.
    ShedInFlight,
    /// The adaptive limit was reached.
    ShedAdaptive,
    /// One pod's own share of this node was used up: connections, requests or memory.
    ShedSource,
    /// A delay on purpose.
    FaultDelay,
    /// A failure on purpose.
    FaultAbort,
    /// A mirror got its copy.
    MirrorSent,
    /// A mirror could not be reached; the request itself is not concerned.
    MirrorFailed,
    /// No copy was made: too many were under way, or the body was too large.
    MirrorDropped,
    /// Another backend answered.
    FallbackBackend,
    /// A fixed response answered.
    FallbackFixed,
}

/// A metric that counts events, and the label that tells them apart.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Family {
    pub name: &'static str,
    pub help: &'static str,
    pub label: &'static str,
}

/// Attempts after a failed one, made or refused.
pub(super) const RETRIES: Family = Family {
    name: "undermesh_http_retries",
    help: "Failed attempts that were or were not made again, by why",
    label: "outcome",
};
/// Rate limits reached.
pub(super) const RATE_LIMITED: Family = Family {
    name: "undermesh_http_rate_limited",
    help: "Requests above a rate limit, by whose",
    label: "axis",
};
/// Requests shed.
pub(super) const SHED: Family = Family {
    name: "undermesh_http_shed",
    help: "Requests that were shed because a limit was reached, by which",
    label: "limit",
};
/// Faults on purpose.
pub(super) const FAULTS: Family = Family {
    name: "undermesh_http_faults",
    help: "Requests that were delayed or failed on purpose",
    label: "fault",
};
/// Copies for mirrors.
pub(super) const MIRRORED: Family = Family {
    name: "undermesh_http_mirrored",
    help: "Copies of requests for mirrors, by what became of them",
    label: "outcome",
};
/// Fallbacks.
pub(super) const FALLBACKS: Family = Family {
    name: "undermesh_http_fallbacks",
    help: "Requests that a fallback answered",
    label: "kind",
};

/// All of them, in the order in which they are written.
pub(super) const FAMILIES: [&Family; 6] = [
    &RETRIES,
    &RATE_LIMITED,
    &SHED,
    &FAULTS,
    &MIRRORED,
    &FALLBACKS,
];

impl RequestEvent {
    /// Every event, in the order of their declaration.
    pub const ALL: [Self; 22] = [
        Self::RetryGranted,
        Self::RetryBudgetSpent,
        Self::RetryAttemptsSpent,
        Self::RetryDeadlineNear,
        Self::RetryNotRepeatable,
        Self::RetryAnswerBegun,
        Self::RetryAfterTooLong,
        Self::RateLimitedSource,
        Self::RateLimitedRoute,
        Self::RateLimitedTotal,
        Self::ShedConnections,
        Self::ShedPending,
        Self::ShedInFlight,
        Self::ShedAdaptive,
        Self::ShedSource,
        Self::FaultDelay,
        Self::FaultAbort,
        Self::MirrorSent,
        Self::MirrorFailed,
        Self::MirrorDropped,
        Self::FallbackBackend,
        Self::FallbackFixed,
    ];

    /// The metric that counts it, and the value of its label.
    pub(super) const fn place(self) -> (&'static Family, &'static str) {
        match self {
            Self::RetryGranted => (&RETRIES, "granted"),
            Self::RetryBudgetSpent => (&RETRIES, "budget_spent"),
            Self::RetryAttemptsSpent => (&RETRIES, "attempts_spent"),
            Self::RetryDeadlineNear => (&RETRIES, "deadline_near"),
            Self::RetryNotRepeatable => (&RETRIES, "not_repeatable"),
            Self::RetryAnswerBegun => (&RETRIES, "answer_begun"),
            Self::RetryAfterTooLong => (&RETRIES, "retry_after_too_long"),
            Self::RateLimitedSource => (&RATE_LIMITED, "source"),
            Self::RateLimitedRoute => (&RATE_LIMITED, "route"),
            Self::RateLimitedTotal => (&RATE_LIMITED, "total"),
            Self::ShedConnections => (&SHED, "connections"),
            Self::ShedPending => (&SHED, "pending"),
            Self::ShedInFlight => (&SHED, "in_flight"),
            Self::ShedAdaptive => (&SHED, "adaptive"),
            Self::ShedSource => (&SHED, "source"),
            Self::FaultDelay => (&FAULTS, "delay"),
            Self::FaultAbort => (&FAULTS, "abort"),
            Self::MirrorSent => (&MIRRORED, "sent"),
            Self::MirrorFailed => (&MIRRORED, "failed"),
            Self::MirrorDropped => (&MIRRORED, "dropped"),
            Self::FallbackBackend => (&FALLBACKS, "backend"),
            Self::FallbackFixed => (&FALLBACKS, "fixed"),
        }
    }

    pub(super) const fn index(self) -> usize {
        self as usize
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_event_has_a_place_of_its_own() {
        let places: HashSet<_> = RequestEvent::ALL
            .into_iter()
            .map(|event| {
                let (family, value) = event.place();
                assert!(FAMILIES.contains(&family));
                (family.name, value)
            })
            .collect();
        assert_eq!(places.len(), RequestEvent::ALL.len());
        for (place, event) in RequestEvent::ALL.into_iter().enumerate() {
            assert_eq!(event.index(), place);
        }
    }
}
