//! The series of connection metrics: bounded, and removed when the workloads that they speak of are
//! gone.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::RwLock;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::histogram::Histogram;
use tokio::time::Instant;

use super::labels::{Ends, Labels, PartyLabels, With};
use super::{CloseReason, FailureReason};
use crate::mesh::{Snapshot, SpiffeId};

/// Upper bounds of the buckets of `undermesh_tcp_connection_duration_seconds`: a connection of one
/// request, of a session, of a pool, of a database. Each bucket costs one line per series, so there
/// are as many as tell these apart.
pub(super) const DURATION_BUCKETS: [f64; 9] =
    [0.001, 0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3_600.0, 86_400.0];

/// What is counted about connections with one set of labels.
pub(super) struct Series {
    opened: AtomicU64,
    closed: [AtomicU64; CloseReason::ALL.len()],
    failed: [AtomicU64; FailureReason::ALL.len()],
    sent: AtomicU64,
    received: AtomicU64,
    durations: Histogram,
    /// Connections that will count here again.
    live: AtomicU64,
}

impl Series {
    fn new() -> Self {
        Self {
            opened: AtomicU64::new(0),
            closed: Default::default(),
            failed: Default::default(),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            durations: Histogram::new(DURATION_BUCKETS),
            live: AtomicU64::new(0),
        }
    }

    fn open(&self) {
        self.opened.fetch_add(1, Ordering::Relaxed);
        self.live.fetch_add(1, Ordering::Relaxed);
    }

    pub fn add_bytes(&self, sent: u64, received: u64) {
        self.sent.fetch_add(sent, Ordering::Relaxed);
        self.received.fetch_add(received, Ordering::Relaxed);
    }

    /// The last thing that a connection counts here.
    pub fn close(&self, reason: CloseReason, failure: Option<FailureReason>, lasted: Duration) {
        self.closed[reason.index()].fetch_add(1, Ordering::Relaxed);
        if let Some(failure) = failure {
            self.failed[failure.index()].fetch_add(1, Ordering::Relaxed);
        }
        self.durations.observe(lasted.as_secs_f64());
        self.live.fetch_sub(1, Ordering::Release);
    }
}

/// All series, at most as many as the bound says and one overflow series for each direction and
/// security.
pub(super) struct SeriesTable {
    slots: RwLock<HashMap<Labels, Slot>>,
    bound: usize,
    overflowed: AtomicU64,
}

struct Slot {
    series: Arc<Series>,
    /// Since when somebody that the labels name is gone and nothing was counted.
    stale: Option<Stale>,
}

struct Stale {
    since: Instant,
    opened: u64,
}

impl SeriesTable {
    pub fn new(bound: usize) -> Self {
        Self {
            slots: RwLock::default(),
            bound,
            overflowed: AtomicU64::new(0),
        }
    }

    /// Counts an opened connection in the series of these labels, and gives the series.
    pub fn open(&self, labels: Labels) -> Arc<Series> {
        if let Some(slot) = self.slots.read().get(&labels) {
            // Counted under the lock: a series with live connections is never removed.
            slot.series.open();
            return slot.series.clone();
        }
        let mut slots = self.slots.write();
        let labels = if slots.len() < self.bound || slots.contains_key(&labels) {
            labels
        } else {
            self.overflowed.fetch_add(1, Ordering::Relaxed);
            labels.overflow()
        };
        let slot = slots.entry(labels).or_insert_with(|| Slot {
            series: Arc::new(Series::new()),
            stale: None,
        });
        slot.series.open();
        slot.series.clone()
    }

    /// Removes the series that speak of a workload, an identity or a service that is not in the
    /// snapshot, when they had no live connection and no new one for `grace`: long enough for the
    /// last values to be scraped.
    pub fn retain(&self, known: &Known<'_>, grace: Duration, now: Instant) {
        self.slots.write().retain(|labels, slot| {
            let idle = slot.series.live.load(Ordering::Acquire) == 0;
            if !idle || known.all_of(labels) {
                slot.stale = None;
                return true;
            }
            let opened = slot.series.opened.load(Ordering::Relaxed);
            match &slot.stale {
                Some(stale) if stale.opened == opened => {
                    now.saturating_duration_since(stale.since) < grace
                }
                _ => {
                    slot.stale = Some(Stale { since: now, opened });
                    true
                }
            }
        });
    }

    pub fn len(&self) -> usize {
        self.slots.read().len()
    }

    /// Connections that were counted in an overflow series.
    pub fn overflowed(&self) -> u64 {
        self.overflowed.load(Ordering::Relaxed)
    }

    fn all(&self) -> Vec<(Labels, Arc<Series>)> {
        let slots = self.slots.read();
        slots
            .iter()
            .map(|(labels, slot)| (labels.clone(), slot.series.clone()))
            .collect()
    }

    /// Writes every series.
    pub fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let all = self.all();
        counter(
            encoder,
            &all,
            "undermesh_tcp_connections_opened",
            "TCP connections opened",
            |series| &series.opened,
        )?;
        by_value(
            encoder,
            &all,
            "undermesh_tcp_connections_closed",
            "TCP connections closed, whatever their end was",
            "close_reason",
            CloseReason::ALL.map(CloseReason::as_str),
            |series| &series.closed,
        )?;
        by_value(
            encoder,
            &all,
            "undermesh_tcp_connections_failed",
            "TCP connections that the mesh did not make or ended, by reason; closed counts them too",
            "reason",
            FailureReason::ALL.map(FailureReason::as_str),
            |series| &series.failed,
        )?;
        counter(
            encoder,
            &all,
            "undermesh_tcp_sent_bytes",
            "Bytes sent to the source: the response",
            |series| &series.sent,
        )?;
        counter(
            encoder,
            &all,
            "undermesh_tcp_received_bytes",
            "Bytes received from the source: the request",
            |series| &series.received,
        )?;
        let mut durations = encoder.encode_descriptor(
            "undermesh_tcp_connection_duration_seconds",
            "How long TCP connections lasted",
            None,
            MetricType::Histogram,
        )?;
        for (labels, series) in &all {
            series.durations.encode(durations.encode_family(labels)?)?;
        }
        Ok(())
    }
}

fn counter(
    encoder: &mut DescriptorEncoder<'_>,
    all: &[(Labels, Arc<Series>)],
    name: &'static str,
    help: &'static str,
    value: impl Fn(&Series) -> &AtomicU64,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, series) in all {
        let value = value(series).load(Ordering::Relaxed);
        family
            .encode_family(labels)?
            .encode_counter::<NoLabelSet, _, u64>(&value, None)?;
    }
    Ok(())
}

/// A counter for each value of one more label; values that were never counted are left out.
fn by_value<const N: usize>(
    encoder: &mut DescriptorEncoder<'_>,
    all: &[(Labels, Arc<Series>)],
    name: &'static str,
    help: &'static str,
    label: &'static str,
    values: [&'static str; N],
    counts: impl Fn(&Series) -> &[AtomicU64; N],
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, series) in all {
        for (value, count) in values.into_iter().zip(counts(series)) {
            let count = count.load(Ordering::Relaxed);
            if count == 0 {
                continue;
            }
            let labels = With {
                labels,
                name: label,
                value,
            };
            family
                .encode_family(&labels)?
                .encode_counter::<NoLabelSet, _, u64>(&count, None)?;
        }
    }
    Ok(())
}

/// Whom a snapshot knows.
pub(super) struct Known<'a> {
    snapshot: &'a Snapshot,
    /// (namespace, workload)
    workloads: HashSet<(&'a str, &'a str)>,
    identities: HashSet<&'a SpiffeId>,
}

impl<'a> Known<'a> {
    pub fn of(snapshot: &'a Snapshot) -> Self {
        let workloads = snapshot.workloads();
        Self {
            snapshot,
            workloads: workloads
                .map(|workload| (&*workload.name.namespace, &*workload.workload))
                .collect(),
            identities: snapshot
                .workloads()
                .map(|workload| &workload.identity)
                .collect(),
        }
    }

    /// Whether it knows everybody that these labels name.
    pub fn all_of(&self, labels: &Labels) -> bool {
        match &labels.ends {
            Ends::Overflow => true,
            Ends::Named(ends) => {
                self.party(&ends.source)
                    && self.party(&ends.destination)
                    && ends
                        .service
                        .as_ref()
                        .is_none_or(|service| self.snapshot.service(service).is_some())
            }
        }
    }

    fn party(&self, party: &PartyLabels) -> bool {
        let workload = match (&party.namespace, &party.workload) {
            (Some(namespace), Some(workload)) => {
                self.workloads.contains(&(&**namespace, &**workload))
            }
            _ => true,
        };
        workload
            && party
                .principal
                .as_ref()
                .is_none_or(|principal| self.identities.contains(principal))
    }
}
