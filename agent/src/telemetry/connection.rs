//! The guard of a connection.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::history::Ended;
use super::labels::Labels;
use super::series::{Series, SeriesTable};
use super::{
    CloseReason, ConnectionInfo, ConnectionView, End, FailureReason, Phase, Telemetry, access_log,
};

/// After how long a connection that nobody called established counts with the labels that it has,
/// so that it shows in the metrics. Longer than all connect timeouts of one connection together.
const SETTLE_AFTER: Duration = Duration::from_secs(10);

/// Bytes of one connection. All that the path of the bytes touches.
///
/// The directions are Istio's, seen from the client, whichever side the agent stands on.
#[derive(Debug, Default)]
pub struct ByteCount {
    /// Bytes sent to the source: the response.
    pub sent: AtomicU64,
    /// Bytes received from the source: the request.
    pub received: AtomicU64,
}

impl ByteCount {
    /// Counts bytes that were written on to the source.
    pub fn add_sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts bytes from the source that were written on to the destination.
    pub fn add_received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    fn moved(&self) -> Moved {
        Moved {
            sent: self.sent.load(Ordering::Relaxed),
            received: self.received.load(Ordering::Relaxed),
        }
    }
}

/// What a [`ByteCount`] said at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Moved {
    pub sent: u64,
    pub received: u64,
}

/// A connection that the telemetry knows of. Close it with [`Connection::close`] or
/// [`Connection::fail`]; if it is dropped instead, it counts as [`CloseReason::Aborted`].
#[must_use = "dropping the guard counts the connection as aborted"]
pub struct Connection {
    telemetry: Arc<Telemetry>,
    entry: Arc<Entry>,
    ended: bool,
}

impl Connection {
    pub(super) fn new(telemetry: Arc<Telemetry>, entry: Arc<Entry>) -> Self {
        Self {
            telemetry,
            entry,
            ended: false,
        }
    }

    /// Number of the connection in the table, never used again.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.entry.id
    }

    /// Its counters. What is added after the connection was closed is not counted.
    #[must_use]
    pub fn bytes(&self) -> &Arc<ByteCount> {
        &self.entry.bytes
    }

    /// Tells what was learned meanwhile: the endpoint, the security. After
    /// [`Connection::established`] it changes the table and the access log only, because a
    /// connection must be opened, counted and closed under one set of labels.
    pub fn update(&self, change: impl FnOnce(&mut ConnectionInfo)) {
        change(&mut self.entry.state.lock().info);
    }

    /// All that matters is known, and bytes may flow: from now on the connection counts in the
    /// metrics under the labels that it has. One that ends before counts at its end, one that is
    /// neither for 10 s or has bytes counts at the next scrape.
    pub fn established(&self) {
        let mut state = self.entry.state.lock();
        state.phase = Phase::Established;
        state.settle(self.telemetry.series());
    }

    /// Ends it.
    pub fn close(mut self, end: End) {
        self.end(Some(end), None);
    }

    /// Ends it as failed, with an explanation for the access log (at most 512 bytes of it).
    pub fn fail(mut self, reason: FailureReason, detail: &dyn fmt::Display) {
        self.end(Some(End::Failed(reason)), Some(detail));
    }

    fn end(&mut self, end: Option<End>, detail: Option<&dyn fmt::Display>) {
        self.ended = true;
        let reason = end.map_or(CloseReason::Aborted, CloseReason::from);
        let failure = match end {
            Some(End::Failed(failure)) => Some(failure),
            _ => None,
        };
        self.telemetry.forget_connection(self.entry.id);
        let lasted = self.entry.opened.elapsed();
        let (info, moved) = self
            .entry
            .finish(self.telemetry.series(), reason, failure, lasted);
        let ended = Ended {
            id: self.entry.id,
            info,
            moved,
            opened_at: self.entry.opened_at,
            lasted,
            close_reason: reason,
            reason: failure,
            detail: detail.map(|detail| access_log::truncated(detail).into()),
        };
        access_log::write(&ended);
        self.telemetry.remember(ended);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.ended {
            self.end(None, None);
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("id", &self.entry.id)
            .finish_non_exhaustive()
    }
}

/// A connection in the table.
pub(super) struct Entry {
    pub id: u64,
    opened: Instant,
    opened_at: SystemTime,
    bytes: Arc<ByteCount>,
    state: Mutex<State>,
}

struct State {
    info: ConnectionInfo,
    phase: Phase,
    account: Option<Account>,
}

/// What was counted of a connection so far, and where.
struct Account {
    series: Arc<Series>,
    counted: Moved,
}

impl Entry {
    pub fn new(id: u64, info: ConnectionInfo) -> Self {
        Self {
            id,
            opened: Instant::now(),
            opened_at: SystemTime::now(),
            bytes: Arc::default(),
            state: Mutex::new(State {
                info,
                phase: Phase::Connecting,
                account: None,
            }),
        }
    }

    /// Brings the metrics up to date with a live connection.
    pub fn fold(&self, table: &SeriesTable, now: Instant) {
        let mut state = self.state.lock();
        let late = now.saturating_duration_since(self.opened) >= SETTLE_AFTER;
        if state.phase != Phase::Closed && (late || self.has_bytes()) {
            state.settle(table);
        }
        state.fold(&self.bytes);
    }

    pub fn view(&self, now: Instant) -> ConnectionView {
        let state = self.state.lock();
        ConnectionView::new(
            self.id,
            &state.info,
            state.phase,
            self.bytes.moved(),
            self.opened_at,
            now.saturating_duration_since(self.opened),
        )
    }

    fn finish(
        &self,
        table: &SeriesTable,
        reason: CloseReason,
        failure: Option<FailureReason>,
        lasted: Duration,
    ) -> (ConnectionInfo, Moved) {
        let mut state = self.state.lock();
        state.settle(table);
        state.fold(&self.bytes);
        // A scrape may hold this entry still: without an account it counts nothing more.
        if let Some(account) = state.account.take() {
            account.series.close(reason, failure, lasted);
        }
        state.phase = Phase::Closed;
        (state.info.clone(), self.bytes.moved())
    }

    fn has_bytes(&self) -> bool {
        self.bytes.moved() != Moved::default()
    }
}

impl State {
    /// Gives the connection its series, once.
    fn settle(&mut self, table: &SeriesTable) {
        if self.account.is_none() {
            self.account = Some(Account {
                series: table.open(Labels::of(&self.info)),
                counted: Moved::default(),
            });
        }
    }

    /// Counts the bytes that were not counted yet.
    fn fold(&mut self, bytes: &ByteCount) {
        if let Some(account) = &mut self.account {
            let moved = bytes.moved();
            account.series.add_bytes(
                moved.sent.saturating_sub(account.counted.sent),
                moved.received.saturating_sub(account.counted.received),
            );
            account.counted = moved;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{info, total};
    use super::super::{Security, Side, TelemetryOptions};
    use super::*;

    const OPENED: &str = "undermesh_tcp_connections_opened_total";
    const CLOSED: &str = "undermesh_tcp_connections_closed_total";
    const FAILED: &str = "undermesh_tcp_connections_failed_total";
    const SENT: &str = "undermesh_tcp_sent_bytes_total";
    const RECEIVED: &str = "undermesh_tcp_received_bytes_total";

    #[test]
    fn each_end_is_counted_once_under_its_reason() {
        let telemetry = Telemetry::new();
        telemetry.open(info()).close(End::Complete);
        telemetry
            .open(info())
            .close(End::Reset { by: Side::Source });
        telemetry.open(info()).close(End::Reset {
            by: Side::Destination,
        });
        telemetry
            .open(info())
            .fail(FailureReason::NoEndpoint, &"cart has none");
        let metrics = telemetry.scrape().unwrap();
        assert_eq!(total(&metrics, OPENED, &[]), 4);
        for reason in [
            "complete",
            "reset_by_source",
            "reset_by_destination",
            "failed",
        ] {
            let label = format!("close_reason=\"{reason}\"");
            assert_eq!(total(&metrics, CLOSED, &[&label]), 1, "{reason}");
        }
        assert_eq!(total(&metrics, CLOSED, &[]), 4);
        assert_eq!(total(&metrics, FAILED, &["reason=\"no_endpoint\""]), 1);
        assert_eq!(total(&metrics, FAILED, &[]), 1);
    }

    #[test]
    fn ended_connections_are_remembered_newest_first_up_to_a_bound() {
        let options = TelemetryOptions {
            max_ended: 2,
            ..TelemetryOptions::default()
        };
        let telemetry = Telemetry::with_options(&options);
        telemetry.open(info()).close(End::Complete);
        drop(telemetry.open(info()));
        telemetry
            .open(info())
            .fail(FailureReason::Denied, &"by policy");
        let ended = telemetry.ended();
        let ids: Vec<_> = ended.iter().map(|view| view.connection.id).collect();
        assert_eq!(ids, [3, 2]);
        assert_eq!(ended[0].reason, Some(FailureReason::Denied));
        assert_eq!(ended[0].detail.as_deref(), Some("by policy"));
        assert_eq!(ended[0].connection.phase, Phase::Closed);
        assert_eq!(ended[1].close_reason, CloseReason::Aborted);
    }

    #[test]
    fn a_dropped_guard_counts_as_aborted_and_leaves_the_table() {
        let telemetry = Telemetry::new();
        let connection = telemetry.open(info());
        assert_eq!(telemetry.live(), 1);
        drop(connection);
        assert_eq!(telemetry.live(), 0);
        let metrics = telemetry.scrape().unwrap();
        assert_eq!(total(&metrics, OPENED, &[]), 1);
        assert_eq!(total(&metrics, CLOSED, &["close_reason=\"aborted\""]), 1);
        assert_eq!(total(&metrics, CLOSED, &[]), 1);
    }

    #[test]
    fn a_cancelled_task_leaves_no_connection_behind() {
        let telemetry = Telemetry::new();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(async {
            let connection = telemetry.open(info());
            let task = tokio::spawn(async move {
                let _connection = connection;
                std::future::pending::<()>().await;
            });
            tokio::task::yield_now().await;
            task.abort();
            assert!(task.await.unwrap_err().is_cancelled());
        });
        assert_eq!(telemetry.live(), 0);
        assert_eq!(total(&telemetry.scrape().unwrap(), CLOSED, &[]), 1);
    }

    #[test]
    fn bytes_of_a_live_connection_are_exact_at_each_scrape_and_counted_once() {
        let telemetry = Telemetry::new();
        let connection = telemetry.open(info());
        connection.established();
        connection.bytes().add_sent(1_000);
        connection.bytes().add_received(10);
        for _ in 0..3 {
            let metrics = telemetry.scrape().unwrap();
            assert_eq!(total(&metrics, SENT, &[]), 1_000);
            assert_eq!(total(&metrics, RECEIVED, &[]), 10);
            assert_eq!(total(&metrics, CLOSED, &[]), 0);
        }
        connection.bytes().add_sent(500);
        assert_eq!(total(&telemetry.scrape().unwrap(), SENT, &[]), 1_500);
        connection.bytes().add_sent(7);
        connection.close(End::Complete);
        let metrics = telemetry.scrape().unwrap();
        assert_eq!(total(&metrics, SENT, &[]), 1_507);
        assert_eq!(total(&metrics, RECEIVED, &[]), 10);
        assert_eq!(total(&metrics, OPENED, &[]), 1);
    }

    #[test]
    fn scrapes_that_race_with_closing_lose_and_double_nothing() {
        let telemetry = Telemetry::new();
        let connections = 2_000;
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..connections / 2 {
                        let connection = telemetry.open(info());
                        connection.bytes().add_sent(3);
                        connection.established();
                        connection.bytes().add_received(5);
                        connection.close(End::Complete);
                    }
                });
            }
            scope.spawn(|| {
                let mut last = 0;
                for _ in 0..50 {
                    let now = total(&telemetry.scrape().unwrap(), SENT, &[]);
                    assert!(now >= last, "a counter went back from {last} to {now}");
                    last = now;
                }
            });
        });
        let metrics = telemetry.scrape().unwrap();
        assert_eq!(total(&metrics, OPENED, &[]), connections);
        assert_eq!(total(&metrics, CLOSED, &[]), connections);
        assert_eq!(total(&metrics, SENT, &[]), 3 * connections);
        assert_eq!(total(&metrics, RECEIVED, &[]), 5 * connections);
    }

    #[test]
    fn a_connection_counts_under_the_labels_that_it_was_established_with() {
        let telemetry = Telemetry::new();
        let mut unknown = info();
        unknown.security = Security::Unknown;
        let connection = telemetry.open(unknown);
        assert_eq!(total(&telemetry.scrape().unwrap(), OPENED, &[]), 0);
        connection.update(|info| info.security = Security::SameNode);
        connection.established();
        connection.update(|info| info.security = Security::Plaintext);
        let shown = &telemetry.connections()[0];
        assert_eq!(shown.connection_security_policy, Security::Plaintext);
        connection.close(End::Complete);
        let metrics = telemetry.scrape().unwrap();
        let label = ["connection_security_policy=\"same_node\""];
        assert_eq!(total(&metrics, OPENED, &label), 1);
        assert_eq!(total(&metrics, CLOSED, &label), 1);
        assert_eq!(total(&metrics, OPENED, &[]), 1);
        assert_eq!(total(&metrics, CLOSED, &[]), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_nobody_called_established_shows_in_the_metrics_after_a_while() {
        let telemetry = Telemetry::new();
        let connection = telemetry.open(info());
        assert_eq!(total(&telemetry.scrape().unwrap(), OPENED, &[]), 0);
        tokio::time::advance(SETTLE_AFTER).await;
        assert_eq!(total(&telemetry.scrape().unwrap(), OPENED, &[]), 1);
        connection.close(End::Complete);
        assert_eq!(total(&telemetry.scrape().unwrap(), OPENED, &[]), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn durations_go_to_the_bucket_that_they_belong_to() {
        let telemetry = Telemetry::new();
        let connection = telemetry.open(info());
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(telemetry.connections()[0].age, Duration::from_secs(5));
        connection.close(End::Complete);
        let metrics = telemetry.scrape().unwrap();
        let bucket = "undermesh_tcp_connection_duration_seconds_bucket";
        assert_eq!(total(&metrics, bucket, &["le=\"1.0\""]), 0);
        assert_eq!(total(&metrics, bucket, &["le=\"10.0\""]), 1);
        assert_eq!(
            total(
                &metrics,
                "undermesh_tcp_connection_duration_seconds_sum",
                &[]
            ),
            5
        );
    }
}
