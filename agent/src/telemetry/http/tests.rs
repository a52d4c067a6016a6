//! Requests as metrics and the access log tell of them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::uri::PathAndQuery;
use http::{Method, StatusCode};
use tokio::time::Instant;

use super::*;
use crate::mesh::{ObjectName, Service, Snapshot};
use crate::telemetry::testing::{logged, logged_as_json, total, workload};
use crate::telemetry::{Direction, LogFormat, Party, Security, Telemetry, TelemetryOptions};

const REQUESTS: &str = "undermesh_http_requests_total";
const DURATIONS: &str = "undermesh_http_request_duration_seconds_count";
const SERIES: &str = "undermesh_http_series";
const OVERFLOWED: &str = "undermesh_http_series_overflow_total";
const LIVE: &str = "undermesh_http_requests_live";

fn cart() -> ObjectName {
    ObjectName::new("shop", "cart")
}

fn rule() -> Arc<str> {
    "HTTPRoute/shop/cart/main".into()
}

fn endpoint() -> SocketAddr {
    "10.0.2.3:8080".parse().unwrap()
}

fn requester_of(telemetry: &Arc<Telemetry>, source: &str) -> Arc<Requester> {
    let address: SocketAddr = "10.0.1.2:40000".parse().unwrap();
    telemetry.requester(
        Direction::Outbound,
        Party::of(&workload(source, "10.0.1.2"), address),
        "10.96.0.10:80".parse().unwrap(),
        7,
    )
}

fn get(path: &str) -> RequestInfo {
    RequestInfo {
        method: Method::GET,
        protocol: HttpProtocol::Http11,
        host: Some("cart.shop".into()),
        path: Some(PathAndQuery::try_from(path).unwrap()),
        request_id: Some("8b1c".into()),
    }
}

/// A request to cart that was sent to its pod.
fn sent(requester: &Arc<Requester>) -> RequestRecord {
    let mut record = requester.request(get("/items?token=secret"));
    record.route(Some(&cart()), Some(&rule()));
    let pod = workload("cart", "10.0.2.3");
    record.endpoint(endpoint(), Some(&pod), Security::MutualTls);
    record
}

fn attempt(outcome: &'static str, status: Option<u16>) -> AttemptView {
    AttemptView {
        endpoint: Some(endpoint()),
        outcome,
        status,
        waited: Duration::ZERO,
        connect: Duration::ZERO,
        took: Duration::from_millis(12),
    }
}

fn answered(requester: &Arc<Requester>, status: u16) {
    let mut record = sent(requester);
    record.answered(StatusCode::from_u16(status).unwrap());
    record.close(RequestEnd::Complete);
}

/// The mesh that has these workloads, and cart's service.
fn mesh_of(names: &[&str]) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for (number, name) in names.iter().enumerate() {
        snapshot.insert_workload(workload(name, &format!("10.0.0.{}", number + 1)));
    }
    snapshot.insert_service(Arc::new(Service {
        name: cart(),
        vips: Vec::new(),
        ports: Vec::new(),
    }));
    snapshot
}

/// A request with every event.
pub(in crate::telemetry) fn everything_that_requests_count(telemetry: &Arc<Telemetry>) {
    let mut record = sent(&requester_of(telemetry, "web"));
    for event in RequestEvent::ALL {
        record.event(event);
    }
    record.close(RequestEnd::Complete);
}

#[test]
fn every_field_of_a_line_is_documented() {
    let documentation = include_str!("../../../../docs/metrics.md");
    let line = logged_as_json(|| {
        let telemetry = Telemetry::new();
        let mut record = sent(&requester_of(&telemetry, "web"));
        record.attempt(attempt("reset", None));
        record.grpc_status(14);
        record.flag(ResponseFlag::UpstreamReset);
        record.detail(&"reset");
        record.answered(StatusCode::OK);
        record.close(RequestEnd::Complete);
    });
    for field in line.as_object().unwrap().keys() {
        // Of every log line, and of both sides.
        let common = ["timestamp", "level", "target", "message"].contains(&field.as_str());
        let name = field.strip_prefix("source_").unwrap_or(field);
        let name = name.strip_prefix("destination_").unwrap_or(name);
        let named = [field.as_str(), name]
            .iter()
            .any(|name| documentation.contains(&format!("`{name}`")));
        assert!(common || named, "{field}");
    }
}

#[test]
fn a_request_is_counted_once_at_its_end_with_who_asked_whom_and_how_it_was_answered() {
    let telemetry = Telemetry::new();
    let web = requester_of(&telemetry, "web");
    let mut record = sent(&web);
    record.answered(StatusCode::NOT_FOUND);
    let metrics = telemetry.scrape().unwrap();
    assert_eq!(total(&metrics, REQUESTS, &[]), 0);
    assert_eq!(total(&metrics, LIVE, &["direction=\"outbound\""]), 1);
    record.close(RequestEnd::Complete);
    let metrics = telemetry.scrape().unwrap();
    assert_eq!(total(&metrics, LIVE, &[]), 0);
    let labels = [
        "reporter=\"source\"",
        "source_workload=\"web\"",
        "source_version=\"v1\"",
        "destination_workload=\"cart\"",
        "destination_version=\"v1\"",
        "destination_service_name=\"cart\"",
        "connection_security_policy=\"mutual_tls\"",
        "route=\"HTTPRoute/shop/cart/main\"",
        "method=\"GET\"",
        "status_class=\"4xx\"",
        "status=\"404\"",
        "grpc_status=\"none\"",
        "flag=\"none\"",
    ];
    assert_eq!(total(&metrics, REQUESTS, &labels), 1, "{metrics}");
    assert_eq!(total(&metrics, REQUESTS, &[]), 1);
    assert_eq!(total(&metrics, DURATIONS, &[]), 1);
}

#[test]
fn a_dropped_record_counts_as_cancelled_and_an_end_that_says_why_as_that() {
    let telemetry = Telemetry::new();
    let web = requester_of(&telemetry, "web");
    drop(sent(&web));
    sent(&web).close(RequestEnd::ResetBySource);
    let mut flagged = sent(&web);
    flagged.flag(ResponseFlag::RequestTimeout);
    flagged.close(RequestEnd::ResetByDestination);
    let metrics = telemetry.scrape().unwrap();
    for flag in ["cancelled", "client_gone", "request_timeout"] {
        let label = format!("flag=\"{flag}\"");
        let found = total(&metrics, REQUESTS, &[&label, "status=\"none\""]);
        assert_eq!(found, 1, "{flag}");
    }
    assert_eq!(total(&metrics, REQUESTS, &[]), 3);
    assert_eq!(total(&metrics, LIVE, &[]), 0);
}

#[test]
fn a_request_that_no_endpoint_got_counts_under_its_service_with_an_unknown_destination() {
    let telemetry = Telemetry::new();
    let mut record = requester_of(&telemetry, "web").request(get("/"));
    record.route(Some(&cart()), None);
    record.flag(ResponseFlag::CircuitOpen);
    record.answered(StatusCode::SERVICE_UNAVAILABLE);
    record.close(RequestEnd::Complete);
    let labels = [
        "destination_service_name=\"cart\"",
        "destination_workload=\"unknown\"",
        "route=\"none\"",
        "flag=\"circuit_open\"",
    ];
    assert_eq!(total(&telemetry.scrape().unwrap(), REQUESTS, &labels), 1);
}

#[test]
fn events_are_counted_by_service_and_route() {
    let telemetry = Telemetry::new();
    let web = requester_of(&telemetry, "web");
    let mut record = sent(&web);
    for event in [
        RequestEvent::RetryGranted,
        RequestEvent::RetryGranted,
        RequestEvent::RetryBudgetSpent,
        RequestEvent::RateLimitedSource,
        RequestEvent::FaultDelay,
        RequestEvent::MirrorSent,
        RequestEvent::ShedInFlight,
        RequestEvent::FallbackFixed,
    ] {
        record.event(event);
    }
    let metrics = telemetry.scrape().unwrap();
    let route = "route=\"HTTPRoute/shop/cart/main\"";
    for (name, label, expected) in [
        ("undermesh_http_retries_total", "outcome=\"granted\"", 2),
        (
            "undermesh_http_retries_total",
            "outcome=\"budget_spent\"",
            1,
        ),
        ("undermesh_http_rate_limited_total", "axis=\"source\"", 1),
        ("undermesh_http_faults_total", "fault=\"delay\"", 1),
        ("undermesh_http_mirrored_total", "outcome=\"sent\"", 1),
        ("undermesh_http_shed_total", "limit=\"in_flight\"", 1),
        ("undermesh_http_fallbacks_total", "kind=\"fixed\"", 1),
    ] {
        assert_eq!(total(&metrics, name, &[route, label]), expected, "{label}");
    }
}

#[test]
fn series_are_bounded_whatever_servers_answer_and_clients_ask() {
    let telemetry = Telemetry::with_options(&TelemetryOptions {
        max_request_series: 2,
        max_request_outcomes: 10,
        ..TelemetryOptions::default()
    });
    let web = requester_of(&telemetry, "web");
    for status in 100..=599 {
        answered(&web, status);
    }
    for number in 0..10 {
        answered(&requester_of(&telemetry, &format!("web{number}")), 200);
    }
    let metrics = telemetry.scrape().unwrap();
    assert_eq!(total(&metrics, REQUESTS, &[]), 510);
    assert_eq!(total(&metrics, SERIES, &[]), 3);
    let lines = metrics.lines().filter(|line| line.starts_with(REQUESTS));
    // Ten of their own, and one for each class in each of three series.
    assert!(lines.count() <= 10 + 3 * 5);
    let fives = ["status_class=\"5xx\"", "status=\"_overflow\""];
    assert_eq!(total(&metrics, REQUESTS, &fives), 100);
    assert!(total(&metrics, OVERFLOWED, &[]) >= 490);
}

#[test]
fn series_of_who_is_gone_are_removed_and_no_request_is_lost_by_it() {
    let telemetry = Telemetry::new();
    let grace = TelemetryOptions::default().series_grace;
    let start = Instant::now();
    let web = requester_of(&telemetry, "web");
    answered(&web, 200);
    answered(&requester_of(&telemetry, "api"), 200);
    let without_web = mesh_of(&["api", "cart"]);
    telemetry.retain(&without_web, start);
    telemetry.retain(&without_web, start + grace);
    let metrics = telemetry.scrape().unwrap();
    assert_eq!(total(&metrics, SERIES, &[]), 1);
    assert_eq!(total(&metrics, REQUESTS, &["source_workload=\"api\""]), 1);
    // Its connection is still there, and asks again.
    answered(&web, 200);
    let metrics = telemetry.scrape().unwrap();
    assert_eq!(total(&metrics, REQUESTS, &["source_workload=\"web\""]), 1);
}

#[test]
fn requests_that_race_with_scrapes_and_cleaning_are_all_counted() {
    let telemetry = Telemetry::new();
    let each = 2_000;
    let kept = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        for worker in 0..2 {
            let (telemetry, kept) = (&telemetry, &kept);
            scope.spawn(move || {
                let web = requester_of(telemetry, &format!("web{worker}"));
                for _ in 0..each {
                    answered(&web, 200);
                }
                kept.fetch_add(each, std::sync::atomic::Ordering::Relaxed);
            });
        }
        scope.spawn(|| {
            let known = mesh_of(&["web0", "web1", "cart"]);
            let start = Instant::now();
            for second in 0..200 {
                // With everybody known, cleaning only looks.
                telemetry.retain(&known, start + Duration::from_secs(second * 600));
                telemetry.scrape().unwrap();
            }
        });
    });
    let metrics = telemetry.scrape().unwrap();
    assert_eq!(total(&metrics, REQUESTS, &[]), 2 * each);
    assert_eq!(total(&metrics, DURATIONS, &[]), 2 * each);
}

#[test]
fn a_connection_with_many_routes_keeps_a_bounded_number_of_scopes() {
    let telemetry = Telemetry::new();
    let web = requester_of(&telemetry, "web");
    for number in 0..1_000 {
        let rule: Arc<str> = format!("HTTPRoute/shop/cart/{}", number % 200).into();
        let mut record = web.request(get("/"));
        record.route(Some(&cart()), Some(&rule));
        record.close(RequestEnd::Complete);
    }
    assert!(web.scopes() <= 64);
    assert_eq!(total(&telemetry.scrape().unwrap(), REQUESTS, &[]), 1_000);
}

#[test]
fn a_request_is_one_line_with_its_attempts_and_where_its_time_went() {
    let line = logged_as_json(|| {
        let telemetry = Telemetry::new();
        let mut record = sent(&requester_of(&telemetry, "web"));
        record.attempt(AttemptView {
            connect: Duration::from_millis(3),
            ..attempt("status", Some(503))
        });
        record.attempt(AttemptView {
            waited: Duration::from_millis(25),
            ..attempt("success", Some(200))
        });
        record.answered(StatusCode::OK);
        record.bytes().add_sent(12);
        record.close(RequestEnd::Complete);
    });
    for (field, value) in [
        ("message", "request ended"),
        ("target", "access"),
        ("method", "GET"),
        ("path", "/items"),
        ("host", "cart.shop"),
        ("request_id", "8b1c"),
        ("source_principal", "spiffe://cluster.local/ns/shop/sa/web"),
        (
            "destination_principal",
            "spiffe://cluster.local/ns/shop/sa/cart",
        ),
        ("destination_address", "10.0.2.3:8080"),
        ("route", "HTTPRoute/shop/cart/main"),
        ("end", "complete"),
        (
            "attempt_history",
            "10.0.2.3:8080 status 503 after 0.012s, connected in 0.003s; \
             10.0.2.3:8080 success 200 after 0.012s, waited 0.025s",
        ),
    ] {
        assert_eq!(line[field], value, "{field}");
    }
    assert_eq!(line["status"], 200);
    assert_eq!(line["attempts"], 2);
    assert_eq!(line["connection"], 7);
    assert_eq!(line["queue_seconds"], 0.025);
    assert_eq!(line["connect_seconds"], 0.003);
    assert!(line["first_byte_seconds"].is_f64());
    assert!(line["body_seconds"].is_f64());
    assert_eq!(line["sent_bytes"], 12);
    assert!(line.get("flag").is_none());
}

#[test]
fn an_answer_of_our_own_says_why_in_the_log() {
    let line = logged_as_json(|| {
        let telemetry = Telemetry::new();
        let mut record = requester_of(&telemetry, "web").request(get("/"));
        record.route(Some(&cart()), None);
        record.flag(ResponseFlag::CircuitOpen);
        record.detail(&"the circuit breaker is open");
        record.answered(StatusCode::SERVICE_UNAVAILABLE);
        record.close(RequestEnd::Complete);
    });
    assert_eq!(line["flag"], "circuit_open");
    assert_eq!(line["detail"], "the circuit breaker is open");
    assert_eq!(line["status"], 503);
}

#[test]
fn a_query_is_not_logged_and_a_host_cannot_forge_a_line() {
    let text = logged(LogFormat::Text, "info", || {
        let telemetry = Telemetry::new();
        let mut info = get("/login?password=hunter2");
        info.host = Some("x\nINFO access: forged \u{1b}[2J\" status=200".into());
        requester_of(&telemetry, "web")
            .request(info)
            .close(RequestEnd::Complete);
    });
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(!text.contains("hunter2"), "{text}");
    assert!(!text.contains('\u{1b}'), "{text}");
}

#[test]
fn a_long_path_is_cut_and_requests_are_silenced_with_the_access_log() {
    let long = format!("/{}", "a".repeat(8_000));
    let line = logged_as_json(|| {
        let telemetry = Telemetry::new();
        drop(requester_of(&telemetry, "web").request(get(&long)));
    });
    assert_eq!(line["path"].as_str().unwrap().len(), 1_024);
    assert_eq!(line["end"], "cancelled");
    let silent = logged(LogFormat::Text, "info,access=off", || {
        let telemetry = Telemetry::new();
        drop(requester_of(&telemetry, "web").request(get("/")));
    });
    assert_eq!(silent, "");
}
