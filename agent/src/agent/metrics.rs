//! Counters that the agent's parts keep themselves, for `/metrics`.

use std::sync::Arc;

use crate::capture::{self, Capture};
use crate::http::{HttpCounters, UpstreamPool};
use crate::identity::Certificates;
use crate::telemetry::{Labelled, Telemetry};
use crate::tunnel::Pool;

pub(super) fn labelled(
    label: &'static str,
    counters: Vec<(&'static str, u64)>,
) -> Vec<Labelled<u64>> {
    let sample = |(name, value)| Labelled::one(label, name, value);
    counters.into_iter().map(sample).collect()
}

/// Counters that parts keep themselves.
pub(super) fn count(
    telemetry: &Telemetry,
    capture: &Arc<Capture>,
    certificates: &Arc<Certificates>,
    pool: &Arc<Pool>,
    http: &Arc<HttpCounters>,
) {
    let kernel = capture.clone();
    telemetry.register_counter(
        "undermesh_kernel_verdicts",
        "Verdicts of the kernel programs on connections of enrolled pods",
        move || labelled("verdict", kernel.kernel().counters()),
    );
    capture::metrics::register(telemetry, capture);
    let capture = capture.clone();
    telemetry.register_counter(
        "undermesh_capture_events",
        "What happened at the pods' listeners and enrolments",
        move || labelled("event", capture.counters()),
    );
    let certificates = certificates.clone();
    telemetry.register_counter(
        "undermesh_certificate_events",
        "What happened on the way to certificates",
        move || labelled("event", certificates.counters()),
    );
    let pool = pool.clone();
    telemetry.register_counter(
        "undermesh_tunnel_events",
        "What happened in the pool of tunnels",
        move || labelled("event", pool.counters()),
    );
    let guards = http.clone();
    telemetry.register_counter(
        "undermesh_http_events",
        "What happened on HTTP connections of clients",
        move || labelled("event", guards.by_name()),
    );
    let guards = http.clone();
    telemetry.register_counter(
        "undermesh_http_bad_requests",
        "Requests that the guards of HTTP refused, by why",
        move || labelled("reason", guards.bad_requests()),
    );
    let guards = http.clone();
    telemetry.register_counter(
        "undermesh_http_floods",
        "HTTP connections that were ended because of a flood, by kind",
        move || labelled("kind", guards.floods()),
    );
}

/// What happened to connections that are kept for HTTP requests.
pub(super) fn count_upstreams(telemetry: &Telemetry, upstreams: &Arc<UpstreamPool>) {
    let upstreams = upstreams.clone();
    telemetry.register_counter(
        "undermesh_http_upstream_events",
        "What happened to upstream connections that are kept for HTTP requests",
        move || {
            let counters = upstreams.counters();
            [
                ("created", counters.created),
                ("reused", counters.reused),
                ("overflowed", counters.overflowed),
                ("expired", counters.expired),
                ("found_closed", counters.found_closed),
            ]
            .map(|(event, count)| Labelled::one("event", event, count))
            .into()
        },
    );
}
