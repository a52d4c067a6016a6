//! The access log: one line for each connection, at its end.

use std::fmt::{self, Write};

use super::view::{format_rfc3339, rounded_seconds};
use super::{CloseReason, ConnectionView, FailureReason};

/// Target of the log lines, to filter on: `access=off` silences them.
pub const TARGET: &str = "access";

/// How much of an explanation is written, in bytes: it may hold what a peer said.
const DETAIL_LIMIT: usize = 512;

/// Writes the line. All text goes in as `&str`, never as `Display`: so tracing's text format quotes
/// and escapes it, and what a peer put into a name or an error cannot forge a line.
pub(super) fn write(
    view: &ConnectionView,
    reason: CloseReason,
    failure: Option<FailureReason>,
    detail: Option<&dyn fmt::Display>,
) {
    if !tracing::enabled!(target: TARGET, tracing::Level::INFO) {
        return;
    }
    let (source, destination) = (&view.source, &view.destination);
    let detail = detail.map(truncated);
    tracing::info!(
        target: TARGET,
        id = view.id,
        direction = view.direction.as_str(),
        source_workload = source.source_workload.as_deref(),
        source_workload_namespace = source.source_workload_namespace.as_deref(),
        source_version = source.source_version.as_deref(),
        source_pod = shown(source.source_pod.as_ref()).as_deref(),
        source_service_account = source.source_service_account.as_deref(),
        source_principal = shown(source.source_principal.as_ref()).as_deref(),
        source_address = source.source_address.to_string().as_str(),
        destination_workload = destination.destination_workload.as_deref(),
        destination_workload_namespace = destination.destination_workload_namespace.as_deref(),
        destination_version = destination.destination_version.as_deref(),
        destination_pod = shown(destination.destination_pod.as_ref()).as_deref(),
        destination_service_account = destination.destination_service_account.as_deref(),
        destination_principal = shown(destination.destination_principal.as_ref()).as_deref(),
        destination_address = destination.destination_address.to_string().as_str(),
        destination_service_name = view.destination_service_name.as_deref(),
        destination_service_namespace = view.destination_service_namespace.as_deref(),
        original_destination = view.original_destination.to_string().as_str(),
        connection_security_policy = view.connection_security_policy.as_str(),
        sent_bytes = view.sent_bytes,
        received_bytes = view.received_bytes,
        opened_at = format_rfc3339(view.opened_at).as_str(),
        duration_seconds = rounded_seconds(view.age),
        close_reason = reason.as_str(),
        reason = failure.map(FailureReason::as_str),
        detail = detail.as_deref(),
        "connection closed"
    );
}

fn shown(value: Option<&impl fmt::Display>) -> Option<String> {
    value.map(ToString::to_string)
}

/// The text, cut at the limit.
fn truncated(text: &dyn fmt::Display) -> String {
    let mut kept = Bounded(String::new());
    // An error here says that the limit was reached.
    let whole = write!(kept, "{text}").is_ok();
    if !whole {
        kept.0.push('…');
    }
    kept.0
}

struct Bounded(String);

impl Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = DETAIL_LIMIT - self.0.len();
        if text.len() <= room {
            self.0.push_str(text);
            return Ok(());
        }
        self.0.push_str(&text[..text.floor_char_boundary(room)]);
        Err(fmt::Error)
    }
}
