//! The one place that all telemetry comes together in.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::connection::Entry;
use super::history::{Ended, History};
use super::http::Requester;
use super::http::series::{HttpMetrics, HttpSeries};
use super::process::Process;
use super::samples::{Labelled, SampledFamily, Samples};
use super::series::{Known, SeriesTable};
use super::{Connection, ConnectionInfo, ConnectionView, Direction, EndedView, Party};
use crate::mesh::{SharedSnapshot, Snapshot};

/// Parts of the connection table: enough that two workers seldom meet at one lock.
const SHARDS: usize = 32;

/// How often [`housekeep`] looks for series to remove.
const HOUSEKEEPING_INTERVAL: Duration = Duration::from_secs(30);

/// Bounds of the telemetry.
#[derive(Debug, Clone)]
pub struct TelemetryOptions {
    /// Series of connection metrics, at most. A connection beyond counts in an overflow series, and
    /// in `undermesh_telemetry_series_overflow_total`. A series is about 20 lines of the
    /// exposition. Default 2,048.
    pub max_series: usize,
    /// Series of request metrics, at most: each about 15 lines of the exposition, and beside it
    /// those of Services and routes. Default 2,048; what is beyond counts as `_overflow`.
    pub max_request_series: usize,
    /// Combinations of method, status, gRPC status and flag in all of them, at most: a line each.
    /// Default 8,192; what is beyond keeps its series and the class of its status.
    pub max_request_outcomes: usize,
    /// How long the series of a workload that is gone stay. Default 5 minutes: a few scrapes.
    pub series_grace: Duration,
    /// Ended connections that are remembered, the newest. Default 1,024, 256 KiB beside
    /// the pods that they speak of, which are the model's while they are in it.
    pub max_ended: usize,
}

impl Default for TelemetryOptions {
    fn default() -> Self {
        Self {
            max_series: 2_048,
            max_request_series: 2_048,
            max_request_outcomes: 8_192,
            series_grace: Duration::from_secs(5 * 60),
            max_ended: 1_024,
        }
    }
}

/// Connection table and metrics of the agent.
pub struct Telemetry {
    next_id: AtomicU64,
    table: [Mutex<HashMap<u64, Arc<Entry>>>; SHARDS],
    series: Arc<SeriesTable>,
    http: Arc<HttpSeries>,
    series_grace: Duration,
    history: History,
    registry: Mutex<Registry>,
}

impl Telemetry {
    /// With default bounds.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Self::with_options(&TelemetryOptions::default())
    }

    /// With these bounds.
    #[must_use]
    pub fn with_options(options: &TelemetryOptions) -> Arc<Self> {
        let series = Arc::new(SeriesTable::new(options.max_series));
        let mut registry = Registry::default();
        registry.register(
            "undermesh_build",
            "The build of this agent",
            Info::new(vec![
                ("version", env!("CARGO_PKG_VERSION")),
                ("arch", std::env::consts::ARCH),
            ]),
        );
        registry.register_collector(Box::new(Process {
            started: SystemTime::now(),
        }));
        registry.register_collector(Box::new(ConnectionMetrics(series.clone())));
        let http = Arc::new(HttpSeries::new(
            options.max_request_series,
            options.max_request_outcomes,
        ));
        registry.register_collector(Box::new(HttpMetrics(http.clone())));
        let telemetry = Arc::new(Self {
            next_id: AtomicU64::new(1),
            table: std::array::from_fn(|_| Mutex::default()),
            series,
            http,
            series_grace: options.series_grace,
            history: History::new(options.max_ended),
            registry: Mutex::new(registry),
        });
        let weak = Arc::downgrade(&telemetry);
        telemetry.register_gauge(
            "undermesh_tcp_connections_live",
            "TCP connections in the connection table",
            move || {
                let live = weak.upgrade().map_or(0, |telemetry| telemetry.live());
                vec![Labelled::bare(live as f64)]
            },
        );
        telemetry
    }

    /// Announces a connection: it is in the table from now on, and counts in the metrics as
    /// [`Connection::established`] says.
    pub fn open(self: &Arc<Self>, info: ConnectionInfo) -> Connection {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let entry = Arc::new(Entry::new(id, info));
        self.shard(id).lock().insert(id, entry.clone());
        Connection::new(self.clone(), entry)
    }

    /// The client of a downstream connection, of which requests are to come: where it stands, what
    /// it connected to, and the number of its [`Connection`].
    pub fn requester(
        self: &Arc<Self>,
        direction: Direction,
        source: Party,
        original_destination: SocketAddr,
        connection: u64,
    ) -> Arc<Requester> {
        Requester::new(
            self.clone(),
            direction,
            source,
            original_destination,
            connection,
        )
    }

    /// The live connections, oldest first.
    #[must_use]
    pub fn connections(&self) -> Vec<ConnectionView> {
        self.connections_limited(usize::MAX)
    }

    /// At most `limit` of the live connections, the oldest of them first.
    #[must_use]
    pub fn connections_limited(&self, limit: usize) -> Vec<ConnectionView> {
        let now = Instant::now();
        let mut entries = self.entries();
        entries.sort_unstable_by_key(|entry| entry.id);
        entries
            .iter()
            .take(limit)
            .map(|entry| entry.view(now))
            .collect()
    }

    /// The connections that ended last, newest first.
    #[must_use]
    pub fn ended(&self) -> Vec<EndedView> {
        self.history.all().iter().map(Ended::view).collect()
    }

    /// Number of live connections.
    #[must_use]
    pub fn live(&self) -> usize {
        self.table.iter().map(|shard| shard.lock().len()).sum()
    }

    /// All metrics in the OpenMetrics text format. Bytes of live connections are exact at this
    /// moment. An error comes only from a family that cannot be written.
    pub fn scrape(&self) -> Result<String, fmt::Error> {
        let now = Instant::now();
        for entry in self.entries() {
            entry.fold(&self.series, now);
        }
        let mut exposition = String::new();
        text::encode(&mut exposition, &self.registry.lock())?;
        Ok(exposition)
    }

    /// Adds counters of another part; `name` without `_total`. `read` is called at each scrape and
    /// must not scrape itself.
    pub fn register_counter(
        &self,
        name: &'static str,
        help: &'static str,
        read: impl Fn() -> Vec<Labelled<u64>> + Send + Sync + 'static,
    ) {
        self.register(SampledFamily {
            name,
            help,
            read: Samples::Counter(Box::new(read)),
        });
    }

    /// Adds counters of time of another part; `name` ends in `_seconds`, without `_total`. `read` is
    /// called at each scrape and must not scrape itself.
    pub fn register_seconds(
        &self,
        name: &'static str,
        help: &'static str,
        read: impl Fn() -> Vec<Labelled<Duration>> + Send + Sync + 'static,
    ) {
        self.register(SampledFamily {
            name,
            help,
            read: Samples::Seconds(Box::new(read)),
        });
    }

    /// Adds gauges of another part. `read` is called at each scrape and must not scrape itself.
    pub fn register_gauge(
        &self,
        name: &'static str,
        help: &'static str,
        read: impl Fn() -> Vec<Labelled<f64>> + Send + Sync + 'static,
    ) {
        self.register(SampledFamily {
            name,
            help,
            read: Samples::Gauge(Box::new(read)),
        });
    }

    /// Removes the series of workloads, identities and services that are not in the snapshot, once
    /// they were unused for the grace period. [`housekeep`] calls it regularly.
    pub fn retain(&self, snapshot: &Snapshot, now: Instant) {
        let known = Known::of(snapshot);
        self.series.retain(&known, self.series_grace, now);
        self.http.retain(&known, snapshot, self.series_grace, now);
    }

    /// Gives back the room that the connection table had for a burst.
    pub fn shrink(&self) {
        for shard in &self.table {
            let mut shard = shard.lock();
            // To grow again a little later would cost more than the room does.
            if shard.capacity() > 4 * shard.len() {
                shard.shrink_to_fit();
            }
        }
    }

    pub(super) fn series(&self) -> &SeriesTable {
        &self.series
    }

    pub(super) fn http(&self) -> &HttpSeries {
        &self.http
    }

    pub(super) fn forget_connection(&self, id: u64) {
        self.shard(id).lock().remove(&id);
    }

    pub(super) fn remember(&self, ended: Ended) {
        self.history.remember(ended);
    }

    fn register(&self, family: SampledFamily) {
        self.registry.lock().register_collector(Box::new(family));
    }

    fn shard(&self, id: u64) -> &Mutex<HashMap<u64, Arc<Entry>>> {
        &self.table[id as usize % SHARDS]
    }

    fn entries(&self) -> Vec<Arc<Entry>> {
        let mut entries = Vec::new();
        for shard in &self.table {
            entries.extend(shard.lock().values().cloned());
        }
        entries
    }
}

impl fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Telemetry")
            .field("live", &self.live())
            .field("series", &self.series.len())
            .finish_non_exhaustive()
    }
}

/// Removes series of what is gone, until stopped.
pub async fn housekeep(
    telemetry: Arc<Telemetry>,
    snapshot: SharedSnapshot,
    stop: CancellationToken,
) {
    let mut tick = tokio::time::interval(HOUSEKEEPING_INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while stop.run_until_cancelled(tick.tick()).await.is_some() {
        telemetry.retain(&snapshot.load(), Instant::now());
    }
}

/// The series of connections as a part of the registry.
struct ConnectionMetrics(Arc<SeriesTable>);

impl Collector for ConnectionMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.0.encode(&mut encoder)?;
        encoder
            .encode_descriptor(
                "undermesh_telemetry_series",
                "Series of connection metrics that are kept",
                None,
                MetricType::Gauge,
            )?
            .encode_gauge(&(self.0.len() as f64))?;
        encoder
            .encode_descriptor(
                "undermesh_telemetry_series_overflow",
                "TCP connections that were counted in an overflow series",
                None,
                MetricType::Counter,
            )?
            .encode_counter::<NoLabelSet, _, u64>(&self.0.overflowed(), None)
    }
}

impl fmt::Debug for ConnectionMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ConnectionMetrics")
    }
}

#[cfg(test)]
mod tests {
    use super::super::http;
    use super::super::testing::{info, info_from, total, workload};
    use super::super::{
        CloseReason, ConnectionInfo, Direction, End, FailureReason, Party, ResponseFlag, Security,
    };
    use super::*;
    use crate::mesh::{ObjectName, Service};

    const OPENED: &str = "undermesh_tcp_connections_opened_total";
    const SERIES: &str = "undermesh_telemetry_series";
    const OVERFLOWED: &str = "undermesh_telemetry_series_overflow_total";

    /// The mesh that has these workloads, and the service `cart`.
    fn mesh_of(names: &[&str]) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for (number, name) in names.iter().enumerate() {
            snapshot.insert_workload(workload(name, &format!("10.0.0.{}", number + 1)));
        }
        snapshot.insert_service(Arc::new(Service {
            name: ObjectName::new("shop", "cart"),
            vips: Vec::new(),
            ports: Vec::new(),
        }));
        snapshot
    }

    #[test]
    fn series_are_bounded_and_what_is_beyond_counts_as_overflow() {
        let telemetry = Telemetry::with_options(&TelemetryOptions {
            max_series: 3,
            ..TelemetryOptions::default()
        });
        for number in 0..10 {
            telemetry
                .open(info_from(&format!("web{number}")))
                .close(End::Complete);
        }
        let metrics = telemetry.scrape().unwrap();
        assert_eq!(total(&metrics, OPENED, &[]), 10);
        assert_eq!(
            total(
                &metrics,
                OPENED,
                &["source_workload=\"_overflow\"", "direction=\"outbound\""]
            ),
            7
        );
        assert_eq!(total(&metrics, OVERFLOWED, &[]), 7);
        assert_eq!(total(&metrics, SERIES, &[]), 4);
        // Who has a series keeps it.
        telemetry.open(info_from("web0")).close(End::Complete);
        let metrics = telemetry.scrape().unwrap();
        assert_eq!(total(&metrics, OPENED, &["source_workload=\"web0\""]), 2);
        assert_eq!(total(&metrics, OVERFLOWED, &[]), 7);
    }

    #[test]
    fn series_of_a_workload_that_is_gone_are_removed_after_the_grace_period() {
        let telemetry = Telemetry::new();
        let grace = TelemetryOptions::default().series_grace;
        let start = Instant::now();
        telemetry.open(info_from("web")).close(End::Complete);
        telemetry.open(info_from("api")).close(End::Complete);
        let without_web = mesh_of(&["api", "cart"]);
        telemetry.retain(&without_web, start);
        telemetry.retain(&without_web, start + grace / 2);
        assert_eq!(total(&telemetry.scrape().unwrap(), SERIES, &[]), 2);
        telemetry.retain(&without_web, start + grace);
        let metrics = telemetry.scrape().unwrap();
        assert_eq!(total(&metrics, SERIES, &[]), 1);
        assert_eq!(total(&metrics, OPENED, &["source_workload=\"api\""]), 1);
    }

    #[test]
    fn series_with_a_live_connection_and_those_whose_workload_came_back_stay() {
        let telemetry = Telemetry::new();
        let grace = TelemetryOptions::default().series_grace;
        let start = Instant::now();
        let live = telemetry.open(info_from("web"));
        live.established();
        telemetry.open(info_from("api")).close(End::Complete);
        let empty = mesh_of(&[]);
        telemetry.retain(&empty, start);
        telemetry.retain(&mesh_of(&["api", "cart"]), start + grace / 2);
        telemetry.retain(&empty, start + grace);
        assert_eq!(total(&telemetry.scrape().unwrap(), SERIES, &[]), 2);
        telemetry.retain(&empty, start + grace * 2);
        assert_eq!(total(&telemetry.scrape().unwrap(), SERIES, &[]), 1);
        live.close(End::Complete);
        telemetry.retain(&empty, start + grace * 3);
        telemetry.retain(&empty, start + grace * 4);
        assert_eq!(total(&telemetry.scrape().unwrap(), SERIES, &[]), 0);
    }

    #[test]
    fn a_removed_service_and_an_unknown_identity_make_a_series_stale_and_an_unknown_address_does_not()
     {
        let telemetry = Telemetry::new();
        let grace = TelemetryOptions::default().series_grace;
        let address = "192.0.2.1:5000".parse().unwrap();
        let plain = ConnectionInfo {
            direction: Direction::Inbound,
            source: Party::unknown(address),
            security: Security::Plaintext,
            service: None,
            ..info()
        };
        let elsewhere = "spiffe://cluster.local/ns/far/sa/away".parse().unwrap();
        let foreign = ConnectionInfo {
            source: Party::of_identity(&elsewhere, address),
            ..plain.clone()
        };
        telemetry.open(plain).close(End::Complete);
        telemetry.open(foreign).close(End::Complete);
        telemetry.open(info()).close(End::Complete);
        let mut mesh = mesh_of(&["web", "cart"]);
        mesh.remove_service(&ObjectName::new("shop", "cart"));
        let start = Instant::now();
        telemetry.retain(&mesh, start);
        telemetry.retain(&mesh, start + grace);
        let metrics = telemetry.scrape().unwrap();
        assert_eq!(total(&metrics, SERIES, &[]), 1);
        let labels = ["reporter=\"destination\"", "source_workload=\"unknown\""];
        assert_eq!(total(&metrics, OPENED, &labels), 1);
    }

    #[test]
    fn the_table_shows_the_oldest_connections_first_and_no_more_than_asked_for() {
        let telemetry = Telemetry::new();
        let open: Vec<_> = (0..100).map(|_| telemetry.open(info())).collect();
        let shown = telemetry.connections_limited(10);
        let ids: Vec<_> = shown.iter().map(|view| view.id).collect();
        let expected: Vec<_> = open.iter().take(10).map(Connection::id).collect();
        assert_eq!(ids, expected);
        assert_eq!(telemetry.connections().len(), 100);
    }

    #[test]
    fn the_exposition_has_the_build_the_process_and_what_others_registered() {
        let telemetry = Telemetry::new();
        telemetry.register_counter("undermesh_kernel_verdicts", "Verdicts", || {
            vec![Labelled {
                labels: vec![("verdict", "pass \"quoted\"\n".to_owned())],
                value: 7,
            }]
        });
        telemetry.open(info()).close(End::Complete);
        let metrics = telemetry.scrape().unwrap();
        let verdict = "undermesh_kernel_verdicts_total{verdict=\"pass \\\"quoted\\\"\\n\"} 7\n";
        assert!(metrics.contains(verdict), "{metrics}");
        assert!(metrics.contains("undermesh_build_info{version=\""));
        assert!(total(&metrics, "process_resident_memory_bytes", &[]) > 0);
        assert_eq!(total(&metrics, "undermesh_tcp_connections_live", &[]), 0);
        assert!(metrics.ends_with("# EOF\n"));
        let principal = "source_principal=\"spiffe://cluster.local/ns/shop/sa/web\"";
        assert_eq!(total(&metrics, OPENED, &[principal]), 1);
    }

    #[test]
    fn every_metric_label_and_reason_is_documented() {
        let documentation = include_str!("../../../docs/metrics.md");
        let telemetry = Telemetry::new();
        telemetry.open(info()).close(End::Complete);
        telemetry
            .open(info())
            .fail(FailureReason::Denied, &"by policy");
        http::tests::everything_that_requests_count(&telemetry);
        let metrics = telemetry.scrape().unwrap();
        let families = metrics
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
        let labels = metrics
            .lines()
            .filter_map(|line| line.split_once('{')?.1.split_once('}'))
            .flat_map(|(labels, _)| labels.split(','))
            .filter_map(|label| label.split('=').next());
        let values = FailureReason::ALL.map(FailureReason::as_str);
        let ends = CloseReason::ALL.map(CloseReason::as_str);
        let flags = ResponseFlag::ALL.map(ResponseFlag::as_str);
        let names = families.chain(labels).chain(values).chain(ends);
        for name in names.chain(flags) {
            // `le` belongs to histograms as such.
            if name == "le" {
                continue;
            }
            assert!(documentation.contains(&format!("`{name}")), "{name}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn housekeeping_removes_stale_series_and_stops_when_told() {
        let telemetry = Telemetry::new();
        telemetry.open(info()).close(End::Complete);
        let snapshot = SharedSnapshot::default();
        let stop = CancellationToken::new();
        let task = tokio::spawn(housekeep(telemetry.clone(), snapshot, stop.clone()));
        let deadline = TelemetryOptions::default().series_grace + HOUSEKEEPING_INTERVAL * 2;
        tokio::time::sleep(deadline).await;
        assert_eq!(total(&telemetry.scrape().unwrap(), SERIES, &[]), 0);
        stop.cancel();
        task.await.unwrap();
    }
}
