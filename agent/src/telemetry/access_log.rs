//! The access log: one line for each connection, at its end.

use std::fmt::{self, Write};

use super::view::{format_rfc3339, rounded_seconds};
use super::{EndedView, FailureReason};

/// Target of the log lines, to filter on: `access=off` silences them.
pub const TARGET: &str = "access";

/// How much of an explanation is written, in bytes: it may hold what a peer said.
const DETAIL_LIMIT: usize = 512;

/// Writes the line. All text goes in as `&str`, never as `Display`: so tracing's text format quotes
/// and escapes it, and what a peer put into a name or an error cannot forge a line.
pub(super) fn write(ended: &EndedView) {
    if !tracing::enabled!(target: TARGET, tracing::Level::INFO) {
        return;
    }
    let view = &ended.connection;
    let (source, destination) = (&view.source, &view.destination);
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
        close_reason = ended.close_reason.as_str(),
        reason = ended.reason.map(FailureReason::as_str),
        detail = ended.detail.as_deref(),
        "connection closed"
    );
}

pub(super) fn shown(value: Option<&impl fmt::Display>) -> Option<String> {
    value.map(ToString::to_string)
}

/// An explanation, cut at the limit.
pub(super) fn truncated(text: &dyn fmt::Display) -> String {
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

#[cfg(test)]
mod tests {
    use super::super::testing::{self, info};
    use super::super::{Connection, End, LogFormat, Telemetry};
    use super::*;

    fn logged(format: LogFormat, filter: &str, end: impl FnOnce(Connection)) -> String {
        testing::logged(format, filter, || end(Telemetry::new().open(info())))
    }

    fn logged_as_json(end: impl FnOnce(Connection)) -> serde_json::Value {
        testing::logged_as_json(|| end(Telemetry::new().open(info())))
    }

    #[test]
    fn a_closed_connection_is_one_line_with_both_identities_bytes_and_its_end() {
        let line = logged_as_json(|connection| {
            connection.bytes().add_sent(12);
            connection.bytes().add_received(3);
            connection.close(End::Complete);
        });
        assert_eq!(line["target"], TARGET);
        let expected = [
            ("source_principal", "spiffe://cluster.local/ns/shop/sa/web"),
            (
                "destination_principal",
                "spiffe://cluster.local/ns/shop/sa/cart",
            ),
            ("source_address", "10.0.1.2:40000"),
            ("destination_address", "10.0.2.3:8080"),
            ("original_destination", "10.96.0.10:80"),
            ("destination_service_name", "cart"),
            ("direction", "outbound"),
            ("connection_security_policy", "mutual_tls"),
            ("close_reason", "complete"),
        ];
        for (field, value) in expected {
            assert_eq!(line[field], value, "{field}");
        }
        assert_eq!(line["sent_bytes"], 12);
        assert_eq!(line["received_bytes"], 3);
        assert!(line["duration_seconds"].is_f64());
        assert!(line.get("reason").is_none());
    }

    #[test]
    fn a_failure_bears_its_reason_and_its_explanation() {
        let line = logged_as_json(|connection| {
            connection.fail(
                FailureReason::Denied,
                &"no rule of policy shop/cart allows it",
            );
        });
        assert_eq!(line["close_reason"], "failed");
        assert_eq!(line["reason"], "denied");
        assert_eq!(line["detail"], "no rule of policy shop/cart allows it");
    }

    #[test]
    fn text_of_a_peer_cannot_forge_a_line_or_a_terminal_sequence() {
        let forged = "no\nINFO access: forged \u{1b}[2J\" close_reason=\"complete";
        let text = logged(LogFormat::Text, "info", |connection| {
            connection.fail(FailureReason::Tls, &forged);
        });
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(!text.contains('\u{1b}'), "{text}");
        assert!(text.contains("close_reason=\\\"complete"), "{text}");
    }

    #[test]
    fn a_long_explanation_is_cut_between_characters() {
        let text = truncated(&"ä".repeat(DETAIL_LIMIT));
        assert_eq!(text.chars().filter(|c| *c == 'ä').count(), DETAIL_LIMIT / 2);
        assert!(text.ends_with('…'));
        assert_eq!(truncated(&"short"), "short");
    }

    #[test]
    fn the_access_log_can_be_silenced_alone() {
        let text = logged(LogFormat::Text, "info,access=off", |connection| {
            tracing::info!("something else");
            drop(connection);
        });
        assert!(text.contains("something else"), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }

    #[test]
    fn an_aborted_connection_is_logged_too() {
        let line = logged_as_json(drop);
        assert_eq!(line["close_reason"], "aborted");
    }
}
