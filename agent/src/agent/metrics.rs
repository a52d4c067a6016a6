//! Counters that the agent's parts keep themselves, for `/metrics`.

use std::sync::Arc;

use crate::capture::{self, Capture};
use crate::fairness::{Fairness, Quotas};
use crate::http::{HttpCounters, UpstreamPool};
use crate::identity::Certificates;
use crate::telemetry::{Labelled, Telemetry};
use crate::tunnel::Pool;

/// Registers a counter of which a part keeps the values itself, by the names of what it counts.
fn register(
    telemetry: &Telemetry,
    name: &'static str,
    help: &'static str,
    label: &'static str,
    read: impl Fn() -> Vec<(&'static str, u64)> + Send + Sync + 'static,
) {
    telemetry.register_counter(name, help, move || {
        let sample = |(name, value)| Labelled::one(label, name, value);
        read().into_iter().map(sample).collect()
    });
}

/// What the kernel, capture, certificates, tunnels and clients' HTTP connections count.
pub(super) fn count(
    telemetry: &Telemetry,
    capture: &Arc<Capture>,
    certificates: &Arc<Certificates>,
    pool: &Arc<Pool>,
    http: &Arc<HttpCounters>,
) {
    let kernel = capture.clone();
    register(
        telemetry,
        "undermesh_kernel_verdicts",
        "Verdicts of the kernel programs on connections of enrolled pods",
        "verdict",
        move || kernel.kernel().counters(),
    );
    capture::metrics::register(telemetry, capture);
    let capture = capture.clone();
    register(
        telemetry,
        "undermesh_capture_events",
        "What happened at the pods' listeners and enrolments",
        "event",
        move || capture.counters(),
    );
    let certificates = certificates.clone();
    register(
        telemetry,
        "undermesh_certificate_events",
        "What happened on the way to certificates",
        "event",
        move || certificates.counters(),
    );
    let pool = pool.clone();
    register(
        telemetry,
        "undermesh_tunnel_events",
        "What happened in the pool of tunnels",
        "event",
        move || pool.counters(),
    );
    let guards = http.clone();
    register(
        telemetry,
        "undermesh_http_events",
        "What happened on HTTP connections of clients",
        "event",
        move || guards.by_name(),
    );
    let guards = http.clone();
    register(
        telemetry,
        "undermesh_http_bad_requests",
        "Requests that the guards of HTTP refused, by why",
        "reason",
        move || guards.bad_requests(),
    );
    let guards = http.clone();
    register(
        telemetry,
        "undermesh_http_floods",
        "HTTP connections that were ended because of a flood, by kind",
        "kind",
        move || guards.floods(),
    );
}

/// What the bounds of each pod's part of the agent did; one `fairness` for each worker.
pub(super) fn count_parts(
    telemetry: &Telemetry,
    fairness: Arc<[Arc<Fairness>]>,
    quotas: Arc<Quotas>,
) {
    telemetry.register_counter(
        "undermesh_fairness_parked",
        "Times that a task waited because its pod had used up its quantum while others were busy",
        move || {
            let each = fairness.iter().map(|fairness| fairness.parked());
            vec![Labelled::bare(each.sum())]
        },
    );
    register(
        telemetry,
        "undermesh_pod_quota_events",
        "How often a pod met a bound of what its requests may hold of the agent",
        "event",
        move || quotas.counters(),
    );
}

/// What happened to connections that are kept for HTTP requests.
pub(super) fn count_upstreams(telemetry: &Telemetry, upstreams: &Arc<UpstreamPool>) {
    let upstreams = upstreams.clone();
    register(
        telemetry,
        "undermesh_http_upstream_events",
        "What happened to upstream connections that are kept for HTTP requests",
        "event",
        move || {
            let counters = upstreams.counters();
            vec![
                ("created", counters.created),
                ("reused", counters.reused),
                ("overflowed", counters.overflowed),
                ("expired", counters.expired),
                ("found_closed", counters.found_closed),
            ]
        },
    );
}
