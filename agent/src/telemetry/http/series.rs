//! What is counted about requests.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::RwLock;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::histogram::Histogram;
use tokio::time::Instant;

use super::RequestEvent;
use super::events::FAMILIES;
use super::labels::{EventLabels, OutcomeLabels, RequestLabels, RouteScope, ScopeLabels};
use super::table::Table;
use crate::mesh::Snapshot;
use crate::telemetry::Direction;
use crate::telemetry::series::Known;

/// Upper bounds of the buckets of `undermesh_http_request_duration_seconds`, from what a cache
/// takes to the default timeout of a request. Each costs one line per series.
const DURATION_BUCKETS: [f64; 12] = [
    0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0,
];

/// What is counted about requests with one set of [`ScopeLabels`].
#[derive(Debug)]
pub(super) struct ScopeSeries {
    outcomes: RwLock<HashMap<OutcomeLabels, AtomicU64>>,
    durations: Histogram,
}

impl Default for ScopeSeries {
    fn default() -> Self {
        Self {
            outcomes: RwLock::default(),
            durations: Histogram::new(DURATION_BUCKETS),
        }
    }
}

/// What is counted by Service and route.
#[derive(Debug)]
pub(super) struct RouteSeries([AtomicU64; RequestEvent::ALL.len()]);

impl Default for RouteSeries {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl RouteSeries {
    pub fn add(&self, event: RequestEvent) {
        self.0[event.index()].fetch_add(1, Ordering::Relaxed);
    }

    fn count(&self, event: RequestEvent) -> u64 {
        self.0[event.index()].load(Ordering::Relaxed)
    }
}

/// All series of requests.
#[derive(Debug)]
pub(in crate::telemetry) struct HttpSeries {
    pub(super) scopes: Table<ScopeLabels, ScopeSeries>,
    pub(super) routes: Table<RouteScope, RouteSeries>,
    outcomes: AtomicUsize,
    outcome_bound: usize,
    outcomes_overflowed: AtomicU64,
    live: [AtomicU64; 2],
}

impl HttpSeries {
    /// `bound` is that of the sets of labels without an outcome, and of Services and routes;
    /// `outcome_bound` that of all combinations with method, status, gRPC status and flag.
    pub fn new(bound: usize, outcome_bound: usize) -> Self {
        Self {
            scopes: Table::new(bound, ScopeLabels::overflow),
            routes: Table::new(bound, |_| RouteScope::Overflow),
            outcomes: AtomicUsize::new(0),
            outcome_bound,
            outcomes_overflowed: AtomicU64::new(0),
            live: Default::default(),
        }
    }

    pub(super) fn begin(&self, direction: Direction) {
        self.live[direction as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn end(&self, direction: Direction) {
        self.live[direction as usize].fetch_sub(1, Ordering::Relaxed);
    }

    /// Requests that have begun and not ended.
    fn live(&self, direction: Direction) -> u64 {
        self.live[direction as usize].load(Ordering::Relaxed)
    }

    /// Counts a request that ended.
    pub(super) fn record(&self, series: &ScopeSeries, outcome: OutcomeLabels, lasted: Duration) {
        self.add_outcome(series, outcome);
        series.durations.observe(lasted.as_secs_f64());
    }

    fn add_outcome(&self, series: &ScopeSeries, outcome: OutcomeLabels) {
        if let Some(count) = series.outcomes.read().get(&outcome) {
            count.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut outcomes = series.outcomes.write();
        let outcome = if outcomes.contains_key(&outcome) || self.reserve_outcome() {
            outcome
        } else {
            self.outcomes_overflowed.fetch_add(1, Ordering::Relaxed);
            outcome.overflow()
        };
        outcomes
            .entry(outcome)
            .or_default()
            .fetch_add(1, Ordering::Relaxed);
    }

    fn reserve_outcome(&self) -> bool {
        self.outcomes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
                (taken < self.outcome_bound).then_some(taken + 1)
            })
            .is_ok()
    }

    /// Removes the series that speak of a workload, an identity or a service that is not in the
    /// snapshot, when nothing was counted for `grace`.
    pub fn retain(&self, known: &Known<'_>, snapshot: &Snapshot, grace: Duration, now: Instant) {
        self.scopes
            .retain(|labels| known.all_of(&labels.ends), grace, now);
        self.routes.retain(
            |labels| match labels {
                RouteScope::Of(Some(service), _) => snapshot.service(service).is_some(),
                RouteScope::Of(None, _) | RouteScope::Overflow => true,
            },
            grace,
            now,
        );
        // Exact again: what was removed gave its places back. A place that is taken between the
        // sum and the store is one too many for a while.
        let taken: usize = self
            .scopes
            .all()
            .iter()
            .map(|(_, scope)| scope.value().outcomes.read().len())
            .sum();
        self.outcomes.store(taken, Ordering::Relaxed);
    }

    fn encode_requests(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let all = self.scopes.all();
        let mut requests = encoder.encode_descriptor(
            "undermesh_http_requests",
            "HTTP requests that ended, each once",
            None,
            MetricType::Counter,
        )?;
        for (scope, series) in &all {
            for (outcome, count) in &*series.value().outcomes.read() {
                let labels = RequestLabels {
                    scope,
                    outcome: *outcome,
                };
                requests
                    .encode_family(&labels)?
                    .encode_counter::<NoLabelSet, _, u64>(&count.load(Ordering::Relaxed), None)?;
            }
        }
        let mut durations = encoder.encode_descriptor(
            "undermesh_http_request_duration_seconds",
            "From the head of a request to the last byte of its answer",
            None,
            MetricType::Histogram,
        )?;
        for (scope, series) in &all {
            // Asked for by an event alone: its request counts elsewhere.
            if series.value().outcomes.read().is_empty() {
                continue;
            }
            let family = durations.encode_family(scope)?;
            series.value().durations.encode(family)?;
        }
        Ok(())
    }

    fn encode_events(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let all = self.routes.all();
        for family in FAMILIES {
            let mut written =
                encoder.encode_descriptor(family.name, family.help, None, MetricType::Counter)?;
            for (scope, series) in &all {
                for event in RequestEvent::ALL {
                    let (of, value) = event.place();
                    let count = series.value().count(event);
                    if of != family || count == 0 {
                        continue;
                    }
                    let labels = EventLabels {
                        scope,
                        label: family.label,
                        value,
                    };
                    written
                        .encode_family(&labels)?
                        .encode_counter::<NoLabelSet, _, u64>(&count, None)?;
                }
            }
        }
        Ok(())
    }

    fn encode_live(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut live = encoder.encode_descriptor(
            "undermesh_http_requests_live",
            "HTTP requests that have begun and not ended",
            None,
            MetricType::Gauge,
        )?;
        for direction in [Direction::Outbound, Direction::Inbound] {
            live.encode_family(&[("direction", direction.as_str())])?
                .encode_gauge(&(self.live(direction) as f64))?;
        }
        Ok(())
    }

    fn encode_bounds(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        encoder
            .encode_descriptor(
                "undermesh_http_series",
                "Series of request metrics that are kept",
                None,
                MetricType::Gauge,
            )?
            .encode_gauge(&(self.scopes.len() as f64))?;
        let overflowed = self.scopes.overflowed()
            + self.routes.overflowed()
            + self.outcomes_overflowed.load(Ordering::Relaxed);
        encoder
            .encode_descriptor(
                "undermesh_http_series_overflow",
                "How often request metrics found no room for a series of their own",
                None,
                MetricType::Counter,
            )?
            .encode_counter::<NoLabelSet, _, u64>(&overflowed, None)
    }
}

/// The series as a part of the registry.
#[derive(Debug)]
pub(in crate::telemetry) struct HttpMetrics(pub std::sync::Arc<HttpSeries>);

impl Collector for HttpMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.0.encode_requests(&mut encoder)?;
        self.0.encode_live(&mut encoder)?;
        self.0.encode_events(&mut encoder)?;
        self.0.encode_bounds(&mut encoder)
    }
}
