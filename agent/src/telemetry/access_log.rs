//! The access log: one line for each connection, at its end.

use std::fmt::{self, Write};

use super::history::Ended;
use super::line::Line;
use super::{FailureReason, Party};
use crate::mesh::ObjectName;

/// Target of the log lines, to filter on: `access=off` silences them.
pub const TARGET: &str = "access";

/// How much of an explanation is written, in bytes: it may hold what a peer said.
const DETAIL_LIMIT: usize = 512;

/// Writes the line.
pub(super) fn write(ended: &Ended) {
    tracing::info!(target: TARGET, line = ?Closed(ended));
}

/// The line of a connection.
struct Closed<'a>(&'a Ended);

impl fmt::Debug for Closed<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ended = self.0;
        let info = &ended.info;
        let (source, destination) = (&info.source, &info.destination);
        Line::write(out, "connection closed", |line| {
            line.number("id", Some(ended.id))
                .text("direction", Some(info.direction.as_str()));
            ends(line, source, destination, info.service.as_ref());
            line.text("source_service_account", source.service_account())
                .text("destination_service_account", destination.service_account())
                .shown("original_destination", Some(&info.original_destination))
                .text("connection_security_policy", Some(info.security.as_str()))
                .number("sent_bytes", Some(ended.moved.sent))
                .number("received_bytes", Some(ended.moved.received))
                .moment("opened_at", ended.opened_at)
                .seconds("duration_seconds", Some(ended.lasted))
                .text("close_reason", Some(ended.close_reason.as_str()))
                .text("reason", ended.reason.map(FailureReason::as_str))
                .text("detail", ended.detail.as_deref());
        })
    }
}

/// Who talks to whom, and what was asked for.
pub(super) fn ends(
    line: &mut Line<'_, '_>,
    source: &Party,
    destination: &Party,
    service: Option<&ObjectName>,
) {
    line.text("source_workload", source.workload())
        .text("source_workload_namespace", source.namespace())
        .text("source_version", source.version())
        .shown("source_pod", source.pod())
        .shown("source_principal", source.identity())
        .shown("source_address", Some(&source.address))
        .text("destination_workload", destination.workload())
        .text("destination_workload_namespace", destination.namespace())
        .text("destination_version", destination.version())
        .shown("destination_pod", destination.pod())
        .shown("destination_principal", destination.identity())
        .shown("destination_address", Some(&destination.address))
        .text(
            "destination_service_name",
            service.map(|service| &*service.name),
        )
        .text(
            "destination_service_namespace",
            service.map(|service| &*service.namespace),
        );
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
