//! The guard of a connection.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::time::Instant;

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
        let view = self
            .entry
            .finish(self.telemetry.series(), reason, failure, lasted);
        access_log::write(&view, reason, failure, detail);
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
    sent: u64,
    received: u64,
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
        self.view_of(&state, now.saturating_duration_since(self.opened))
    }

    fn finish(
        &self,
        table: &SeriesTable,
        reason: CloseReason,
        failure: Option<FailureReason>,
        lasted: Duration,
    ) -> ConnectionView {
        let mut state = self.state.lock();
        state.settle(table);
        state.fold(&self.bytes);
        // A scrape may hold this entry still: without an account it counts nothing more.
        if let Some(account) = state.account.take() {
            account.series.close(reason, failure, lasted);
        }
        state.phase = Phase::Closed;
        self.view_of(&state, lasted)
    }

    fn has_bytes(&self) -> bool {
        self.bytes.sent.load(Ordering::Relaxed) > 0
            || self.bytes.received.load(Ordering::Relaxed) > 0
    }

    fn view_of(&self, state: &State, age: Duration) -> ConnectionView {
        ConnectionView::new(
            self.id,
            &state.info,
            state.phase,
            &self.bytes,
            self.opened_at,
            age,
        )
    }
}

impl State {
    /// Gives the connection its series, once.
    fn settle(&mut self, table: &SeriesTable) {
        if self.account.is_none() {
            self.account = Some(Account {
                series: table.open(Labels::of(&self.info)),
                sent: 0,
                received: 0,
            });
        }
    }

    /// Counts the bytes that were not counted yet.
    fn fold(&mut self, bytes: &ByteCount) {
        if let Some(account) = &mut self.account {
            let sent = bytes.sent.load(Ordering::Relaxed);
            let received = bytes.received.load(Ordering::Relaxed);
            account.series.add_bytes(
                sent.saturating_sub(account.sent),
                received.saturating_sub(account.received),
            );
            (account.sent, account.received) = (sent, received);
        }
    }
}
