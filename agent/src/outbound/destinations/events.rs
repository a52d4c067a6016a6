//! What destinations tell operators: breakers that move, endpoints that are ejected and come back.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::resilience::ejection::{Change, Scope};
use crate::resilience::{BreakerState, Event, EventSink};

/// Logs each movement with its cause, and counts them.
#[derive(Debug, Default)]
pub struct EventReporter {
    opened: AtomicU64,
    closed: AtomicU64,
    half_opened: AtomicU64,
    ejected: AtomicU64,
    returned: AtomicU64,
}

impl EventReporter {
    /// Movements since the start, by kind.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        [
            ("breaker_opened", &self.opened),
            ("breaker_half_opened", &self.half_opened),
            ("breaker_closed", &self.closed),
            ("endpoint_ejected", &self.ejected),
            ("endpoint_returned", &self.returned),
        ]
        .map(|(event, count)| (event, count.load(Ordering::Relaxed)))
        .into()
    }
}

impl EventSink for EventReporter {
    fn event(&self, event: Event) {
        let counter = match &event {
            Event::Breaker(moved) => match moved.to {
                BreakerState::Closed => &self.closed,
                BreakerState::Open => &self.opened,
                BreakerState::HalfOpen => &self.half_opened,
            },
            Event::Ejection(moved) => match moved.change {
                Change::Ejected { .. } => &self.ejected,
                Change::Returned(_) => &self.returned,
            },
        };
        counter.fetch_add(1, Ordering::Relaxed);
        match event {
            Event::Breaker(moved) => tracing::warn!(
                breaker = &*moved.breaker,
                from = ?moved.from,
                to = ?moved.to,
                cause = ?moved.cause,
                "circuit breaker"
            ),
            Event::Ejection(moved) => {
                let source = match moved.scope {
                    Scope::Everyone => None,
                    Scope::Source(source) => Some(source.0),
                };
                tracing::info!(
                    destination = &*moved.destination,
                    endpoint = moved.endpoint,
                    only_for_netns = source,
                    change = ?moved.change,
                    "endpoint ejection"
                );
            }
        }
    }
}
