//! The access log's line of a request.

use std::fmt::{self, Write};
use std::sync::atomic::Ordering;

use super::record::{RequestRecord, Times};
use super::requester::{Requester, Scope};
use super::{AttemptView, RequestEnd, ResponseFlag};
use crate::telemetry::ACCESS_LOG_TARGET;
use crate::telemetry::access_log::ends;
use crate::telemetry::line::Line;

/// How much of a path or a host is written, in bytes.
const TEXT_LIMIT: usize = 1_024;

/// Writes the line.
pub(super) fn write(record: &RequestRecord, scope: &Scope, times: Times, end: RequestEnd) {
    let ended = Ended {
        record,
        scope,
        times,
        end,
    };
    tracing::info!(target: ACCESS_LOG_TARGET, line = ?ended);
}

/// The line of a request.
struct Ended<'a> {
    record: &'a RequestRecord,
    scope: &'a Scope,
    times: Times,
    end: RequestEnd,
}

impl fmt::Debug for Ended<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            record,
            scope,
            times,
            end,
        } = self;
        let requester = &record.requester;
        let info = &record.info;
        let path = info.path.as_ref().map(|path| path.path());
        Line::write(out, "request ended", |line| {
            line.number("connection", Some(requester.connection))
                .text("request_id", info.request_id.as_deref().map(bounded))
                .common(&scope.line, |line| common(line, requester, scope))
                .text("request_protocol", Some(info.protocol.as_str()))
                .text("method", Some(bounded(info.method.as_str())))
                .text("host", info.host.as_deref().map(bounded))
                .text("path", path.map(bounded))
                .number("status", record.status)
                .number("grpc_status", record.grpc_status)
                .text("flag", record.flag.map(ResponseFlag::as_str))
                .number("attempts", Some(record.attempts_total))
                .text("attempt_history", history(&record.attempts).as_deref())
                .number(
                    "sent_bytes",
                    Some(record.bytes.sent.load(Ordering::Relaxed)),
                )
                .number(
                    "received_bytes",
                    Some(record.bytes.received.load(Ordering::Relaxed)),
                )
                .moment("started_at", record.started_at)
                .seconds("queue_seconds", Some(times.queue))
                .seconds("connect_seconds", Some(times.connect))
                .seconds("first_byte_seconds", times.first_byte)
                .seconds("body_seconds", times.body)
                .seconds("duration_seconds", Some(times.total))
                .text("end", Some(end.as_str()))
                .text("detail", record.detail.as_deref());
        })
    }
}

/// Who asked whom for what: the same for all requests of a scope.
fn common(line: &mut Line<'_, '_>, requester: &Requester, scope: &Scope) {
    line.text("direction", Some(requester.direction.as_str()));
    let service = scope.service.as_ref();
    ends(line, &requester.source, &scope.destination, service);
    line.text("route", scope.route.as_deref())
        .text("connection_security_policy", Some(scope.security.as_str()));
}

/// The attempts, if there were several or the only one failed: of others the rest of the line
/// tells all.
fn history(attempts: &[AttemptView]) -> Option<String> {
    if let [
        AttemptView {
            outcome: "success", ..
        },
    ] = attempts
    {
        return None;
    }
    if attempts.is_empty() {
        return None;
    }
    let mut text = String::new();
    for attempt in attempts {
        let separator = if text.is_empty() { "" } else { "; " };
        // Writing to a string does not fail.
        let _ = write!(text, "{separator}{}", Told(attempt));
    }
    Some(text)
}

/// `10.0.2.3:8080 status 503 after 0.012s`, with what came before it.
struct Told<'a>(&'a AttemptView);

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let attempt = self.0;
        match attempt.endpoint {
            Some(endpoint) => write!(f, "{endpoint} ")?,
            None => f.write_str("no endpoint ")?,
        }
        f.write_str(attempt.outcome)?;
        if let Some(status) = attempt.status {
            write!(f, " {status}")?;
        }
        write!(f, " after {:.3}s", attempt.took.as_secs_f64())?;
        if !attempt.waited.is_zero() {
            write!(f, ", waited {:.3}s", attempt.waited.as_secs_f64())?;
        }
        if !attempt.connect.is_zero() {
            write!(f, ", connected in {:.3}s", attempt.connect.as_secs_f64())?;
        }
        Ok(())
    }
}

fn bounded(text: &str) -> &str {
    &text[..text.floor_char_boundary(TEXT_LIMIT)]
}
