//! The access log's line of a request.

use std::fmt::{self, Write};
use std::sync::atomic::Ordering;

use super::record::{RequestRecord, Times};
use super::requester::Scope;
use super::{AttemptView, RequestEnd, ResponseFlag};
use crate::telemetry::ACCESS_LOG_TARGET;
use crate::telemetry::access_log::shown;
use crate::telemetry::view::{format_rfc3339, rounded_seconds};

/// How much of a path or a host is written, in bytes.
const TEXT_LIMIT: usize = 1_024;

/// Writes the line. As in that of a connection all text goes in as `&str`, so that it is quoted and
/// escaped: what a peer put into a path or a host cannot forge a line.
pub(super) fn write(record: &RequestRecord, scope: &Scope, times: Times, end: RequestEnd) {
    if !tracing::enabled!(target: ACCESS_LOG_TARGET, tracing::Level::INFO) {
        return;
    }
    let requester = &record.requester;
    let (source, destination) = (&requester.source, &scope.destination);
    let service = scope.service.as_ref();
    let path = record.info.path.as_ref().map(|path| path.path());
    tracing::info!(
        target: ACCESS_LOG_TARGET,
        connection = requester.connection,
        request_id = record.info.request_id.as_deref().map(bounded),
        direction = requester.direction.as_str(),
        source_workload = source.workload.as_deref(),
        source_workload_namespace = source.namespace.as_deref(),
        source_version = source.version.as_deref(),
        source_pod = shown(source.pod.as_ref()).as_deref(),
        source_principal = shown(source.identity.as_ref()).as_deref(),
        source_address = source.address.to_string().as_str(),
        destination_workload = destination.workload.as_deref(),
        destination_workload_namespace = destination.namespace.as_deref(),
        destination_version = destination.version.as_deref(),
        destination_pod = shown(destination.pod.as_ref()).as_deref(),
        destination_principal = shown(destination.identity.as_ref()).as_deref(),
        destination_address = destination.address.to_string().as_str(),
        destination_service_name = service.map(|service| &*service.name),
        destination_service_namespace = service.map(|service| &*service.namespace),
        route = scope.route.as_deref(),
        connection_security_policy = scope.security.as_str(),
        request_protocol = record.info.protocol.as_str(),
        method = bounded(record.info.method.as_str()),
        host = record.info.host.as_deref().map(bounded),
        path = path.map(bounded),
        status = record.status,
        grpc_status = record.grpc_status,
        flag = record.flag.map(ResponseFlag::as_str),
        attempts = record.attempts_total,
        attempt_history = history(&record.attempts).as_deref(),
        sent_bytes = record.bytes.sent.load(Ordering::Relaxed),
        received_bytes = record.bytes.received.load(Ordering::Relaxed),
        started_at = format_rfc3339(record.started_at).as_str(),
        queue_seconds = rounded_seconds(times.queue),
        connect_seconds = rounded_seconds(times.connect),
        first_byte_seconds = times.first_byte.map(rounded_seconds),
        body_seconds = times.body.map(rounded_seconds),
        duration_seconds = rounded_seconds(times.total),
        end = end.as_str(),
        detail = record.detail.as_deref(),
        "request ended"
    );
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
