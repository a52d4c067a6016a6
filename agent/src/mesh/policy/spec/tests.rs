//! What is written and what it makes.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::mesh::policy::{FallbackBackend, Locality};
use crate::mesh::{MeshConfig, ObjectName};
use crate::resilience::fallback::Fallback;
use crate::resilience::outcome::Code;
use crate::resilience::retry::Condition;
use crate::resilience::{Algorithm, Policy};

/// A policy for the Service cart with these fields.
fn spec(fields: Value) -> Result<TrafficPolicySpec, String> {
    let mut spec = json!({ "targetRefs": [{ "kind": "Service", "name": "cart" }] });
    for (name, value) in fields.as_object().unwrap() {
        spec[name] = value.clone();
    }
    serde_json::from_value(spec).map_err(|error| error.to_string())
}

fn layer(name: &str, fields: Value) -> Layer {
    Layer {
        name: ObjectName::new("shop", name),
        spec: Arc::new(spec(fields).unwrap()),
    }
}

fn policy(fields: Value) -> TrafficPolicy {
    TrafficPolicy::of(&[layer("one", fields)])
}

/// What is wrong with these fields, when they are read or when they are checked.
fn refusals(fields: Value) -> Vec<String> {
    match spec(fields) {
        Ok(spec) => spec.faults().iter().map(ToString::to_string).collect(),
        Err(error) => vec![error],
    }
}

#[test]
fn what_is_left_out_has_its_default() {
    let mut empty = policy(json!({}));
    assert_eq!(empty.sources, [ObjectName::new("shop", "one")]);
    empty.sources.clear();
    assert_eq!(empty, TrafficPolicy::default());
    // Parts without fields say nothing either, but that retries are asked for.
    let mut hollow = policy(json!({
        "balancing": {}, "locality": {}, "slowStart": {}, "retries": {}, "retryBudget": {},
        "failures": {}, "breaker": {}, "outlierEjection": {}, "limits": {}, "rateLimit": {},
        "fault": {}, "timeouts": {}
    }));
    hollow.sources.clear();
    assert_eq!(hollow, TrafficPolicy::default());
}

#[test]
fn every_part_reaches_the_settings() {
    let policy = policy(json!({
        "balancing": { "algorithm": "Maglev", "hash": [{ "header": "x-user" }, { "source": "Pod" }],
                       "boundedLoad": 1.5, "ringPoints": 10, "maglevTable": 1000 },
        "locality": { "prefer": "Zone", "overprovisioning": 2 },
        "slowStart": { "window": "30s", "minimum": 0.2 },
        "retries": { "attempts": 3, "conditions": ["Reset"], "httpStatuses": [503], "grpcStatuses": [14],
                     "backoff": { "base": "10ms", "cap": "1s", "jitter": 0.5 },
                     "retryAfterCap": "5s", "methods": "Any", "replayBytes": 1024 },
        "retryBudget": { "ratio": 0.1, "minimumRate": 1, "window": "5s" },
        "failures": { "httpStatuses": ["500-503", "429"], "grpcStatuses": [14] },
        "breaker": { "failureRatio": 0.5, "minimumRequests": 5, "consecutiveFailures": 7,
                     "window": "10s", "openTime": { "base": "1s", "cap": "2s" }, "probes": 2,
                     "successesToClose": 4 },
        "outlierEjection": { "consecutiveFailures": 3, "failureRatio": { "ratio": 0.3 },
                             "successRate": { "mode": "Disabled" }, "window": "20s",
                             "ejectionTime": { "base": "2s" }, "maxEjected": 0.2, "floor": 2,
                             "panicThreshold": 0.1 },
        "limits": { "connections": 10, "pending": 0, "inFlight": 20, "requestsPerConnection": 100,
                    "adaptive": { "most": 50, "initial": 20 } },
        "rateLimit": { "perSource": { "requestsPerSecond": 5 },
                       "perRoute": { "requestsPerSecond": 0.5 },
                       "total": { "requestsPerSecond": 50, "burst": 7 } },
        "fault": { "delay": { "percentage": 50, "time": "1s" },
                   "abort": { "percentage": 0.5, "grpcStatus": 14 },
                   "headers": [{ "name": "x-test", "value": "chaos" }] },
        "timeouts": { "connect": "2s", "request": "0s", "attempt": "3s", "idle": "1m",
                      "streamIdle": "0s", "maxDuration": "1h" },
        "fallback": { "backend": { "name": "cart-v1", "port": 80 } }
    }));
    let settings = &policy.settings;
    assert_eq!(settings.balance.algorithm, Algorithm::Maglev);
    assert_eq!(policy.hash.len(), 2);
    assert_eq!(settings.balance.maglev_table, 1000);
    assert_eq!(policy.locality, Locality::Zone);
    assert_eq!(settings.balance.overprovisioning, 2.0);
    assert_eq!(settings.balance.slow_start, Duration::from_secs(30));
    assert_eq!(settings.retry.retries, 3);
    let expected = [
        Condition::Reset,
        Condition::Code(Code::Http(503)),
        Condition::Code(Code::Grpc(14)),
    ];
    assert_eq!(settings.retry.conditions, expected);
    assert_eq!(settings.retry.replay_bytes, 1024);
    assert_eq!(settings.budget.ratio, 0.1);
    assert_eq!(settings.http.failures, [500..=503, 429..=429]);
    assert_eq!(settings.grpc.failures, [14]);
    assert_eq!(settings.breaker.consecutive, Some(7));
    assert_eq!(settings.breaker.open_time.jitter, 0.5);
    assert_eq!(settings.ejection.failure_ratio.unwrap().ratio, 0.3);
    assert_eq!(
        settings.ejection.failure_ratio.unwrap().minimum_requests,
        10
    );
    assert_eq!(settings.ejection.success_rate, None);
    assert_eq!(settings.limits.concurrency, Some(20));
    assert_eq!(policy.connections.connections, Some(10));
    assert_eq!(policy.connections.pending, 0);
    assert_eq!(settings.limits.adaptive.unwrap().most, 50);
    let rates = settings.limits.rates;
    assert_eq!(rates.source.unwrap().burst, 5);
    assert_eq!(rates.route.unwrap().burst, 1);
    assert_eq!(rates.total.unwrap().burst, 7);
    assert_eq!(settings.fault.delay.unwrap().share, 0.5);
    assert_eq!(settings.fault.abort.unwrap().share, 0.005);
    assert_eq!(policy.fault_match.len(), 1);
    assert_eq!(settings.timeouts.request, None);
    assert_eq!(settings.timeouts.attempt, Some(Duration::from_secs(3)));
    assert_eq!(policy.streams.connect, Some(Duration::from_secs(2)));
    assert_eq!(policy.streams.idle, Some(Duration::from_secs(60)));
    assert_eq!(policy.streams.stream_idle, None);
    let backend = FallbackBackend {
        service: ObjectName::new("shop", "cart-v1"),
        port: 80,
    };
    assert_eq!(settings.fallback, Fallback::Backend(backend));
}

#[test]
fn a_number_of_retries_alone_stands_for_the_usual_conditions() {
    let usual = policy(json!({ "retries": { "attempts": 1 } }));
    assert_eq!(usual.settings.retry.conditions, Condition::usual());
    let weaker = layer("service", json!({ "retries": { "httpStatuses": [503] } }));
    let stronger = layer("route", json!({ "retries": { "attempts": 1 } }));
    let both = TrafficPolicy::of(&[weaker, stronger]);
    let only = [Condition::Code(Code::Http(503))];
    assert_eq!(both.settings.retry.conditions, only);
}

#[test]
fn a_stronger_policy_is_laid_over_a_weaker_one_field_by_field() {
    let service = layer(
        "service",
        json!({
            "breaker": { "failureRatio": 0.5, "minimumRequests": 5 },
            "timeouts": { "request": "5s" },
            "fallback": { "response": { "status": 503, "body": "sorry" } }
        }),
    );
    let route = layer(
        "route",
        json!({
            "breaker": { "minimumRequests": 50 },
            "fallback": { "backend": { "name": "cart-v1", "port": 80 } }
        }),
    );
    let both = TrafficPolicy::of(&[service, route]);
    assert_eq!(both.settings.breaker.failure_ratio, 0.5);
    assert_eq!(both.settings.breaker.minimum_requests, 50);
    assert_eq!(both.settings.timeouts.request, Some(Duration::from_secs(5)));
    assert!(matches!(both.settings.fallback, Fallback::Backend(_)));
    let names: Vec<_> = both.sources.iter().map(|source| &*source.name).collect();
    assert_eq!(names, ["route", "service"]);
}

#[test]
fn what_layers_say_of_things_that_depend_on_one_another_is_brought_together() {
    let service = layer(
        "service",
        json!({ "timeouts": { "request": "2s" }, "limits": { "adaptive": { "most": 50 } } }),
    );
    let port = layer(
        "port",
        json!({ "timeouts": { "attempt": "5s" }, "limits": { "adaptive": { "least": 80 } },
                "breaker": { "openTime": { "base": "10s" } } }),
    );
    let both = TrafficPolicy::of(&[service, port]);
    let attempt = both.settings.timeouts.attempt;
    assert_eq!(attempt, Some(Duration::from_secs(2)));
    let adaptive = both.settings.limits.adaptive.unwrap();
    assert_eq!(
        (adaptive.least, adaptive.initial, adaptive.most),
        (80, 80, 80)
    );
    let open_time = both.settings.breaker.open_time;
    assert_eq!(open_time.cap, Duration::from_secs(10));
    assert_eq!(both.settings.validate(), Ok(()));
}

#[test]
fn mechanisms_can_be_switched_off_and_on_again() {
    let off = json!({ "breaker": { "mode": "Disabled" }, "outlierEjection": { "mode": "Disabled" },
                      "limits": { "adaptive": { "mode": "Disabled" } } });
    let service = policy(off.clone());
    assert_eq!(service.settings.breaker.minimum_requests, u32::MAX);
    assert_eq!(service.settings.breaker.consecutive, None);
    assert_eq!(service.settings.ejection.consecutive_failures, None);
    assert_eq!(service.settings.limits.adaptive, None);
    let on = json!({ "breaker": { "mode": "Enabled" }, "outlierEjection": { "mode": "Enabled" } });
    let both = TrafficPolicy::of(&[layer("service", off), layer("port", on)]);
    let default = Policy::<FallbackBackend>::default();
    assert_eq!(both.settings.breaker, default.breaker);
    assert_eq!(both.settings.ejection, default.ejection);
}

#[test]
fn what_is_wrong_is_refused_with_its_field_and_the_reason() {
    for (fields, expected) in [
        (
            json!({ "fault": { "delay": { "percentage": 200, "time": "1s" } } }),
            "200 is not a percentage: must be from 0 to 100",
        ),
        (
            json!({ "timeouts": { "request": 5 } }),
            "\"5\" is not a duration: numbers with units h, m, s, ms",
        ),
        (
            json!({ "breaker": { "failureRatio": 2 } }),
            "breaker.failureRatio: must be from 0.01 to 1, is 2",
        ),
        (
            json!({ "breaker": { "mode": "Disabled", "probes": 0 } }),
            "breaker.probes: must be from 1 to 1000, is 0",
        ),
        (
            json!({ "breaker": { "openTime": { "base": "2s", "cap": "1s" } } }),
            "breaker.openTime.cap: must be at least base, 2s, is 1s",
        ),
        (
            json!({ "outlierEjection": { "maxEjected": 1.5 } }),
            "outlierEjection.maxEjected: must be from 0 to 1, is 1.5",
        ),
        (
            json!({ "slowStart": { "minimum": 0 } }),
            "slowStart.minimum: must be from 0.01 to 1, is 0",
        ),
        (
            json!({ "retries": { "attempts": 11 } }),
            "retries.attempts: must be from 0 to 10, is 11",
        ),
        (
            json!({ "retries": { "httpStatuses": [200] } }),
            "retries.httpStatuses: ",
        ),
        (
            json!({ "retryBudget": { "window": "100ms" } }),
            "retryBudget.window: must be from 1s to 3600s, is 100ms",
        ),
        (
            json!({ "timeouts": { "request": "1s", "attempt": "2s" } }),
            "timeouts.attempt: must be at most `request`, 1s, is 2s",
        ),
        (
            json!({ "timeouts": { "idle": "25h" } }),
            "timeouts.idle: must be from 1ms to 86400s, is 90000s",
        ),
        (
            json!({ "limits": { "inFlight": 0 } }),
            "limits.inFlight: must be from 1 to 1000000, is 0",
        ),
        (
            json!({ "rateLimit": { "perSource": { "requestsPerSecond": 0 } } }),
            "rateLimit.perSource.requestsPerSecond: must be from 0.001 to 1000000000, is 0",
        ),
        (
            json!({ "fault": { "abort": { "percentage": 1 } } }),
            "fault.abort: must have one of httpStatus and grpcStatus",
        ),
        (
            json!({ "fault": { "headers": [{ "name": "x y", "value": "1" }] } }),
            "fault.headers[0]: \"x y\" is not a header's name",
        ),
        (
            json!({ "balancing": { "hash": [{ "header": "a", "cookie": "b" }] } }),
            "balancing.hash[0]: must be one of header, cookie and source",
        ),
        (
            json!({ "failures": { "httpStatuses": ["5xx"] } }),
            "failures.httpStatuses[0]: must be like 503 or 500-599, is \"5xx\"",
        ),
        (
            json!({ "fallback": {} }),
            "fallback: must have one of backend and response",
        ),
        (
            json!({ "fallback": { "response": { "status": 503, "body": "a".repeat(65_537) } } }),
            "fallback.response.body: must be at most 65536 bytes, are 65537",
        ),
        (
            json!({ "fallback": { "response": { "status": 99 } } }),
            "fallback.response.status: must be from 200 to 599, is 99",
        ),
        (
            json!({ "breaker": { "failureRation": 0.5 } }),
            "unknown field `failureRation`",
        ),
        (json!({ "breakers": {} }), "unknown field `breakers`"),
    ] {
        let found = refusals(fields);
        assert_eq!(found.len(), 1, "{expected}: {found:?}");
        assert!(
            found[0].starts_with(expected),
            "{} is not {expected}",
            found[0]
        );
    }
}

#[test]
fn all_that_is_wrong_is_told_at_once() {
    let found = refusals(json!({ "breaker": { "failureRatio": 2, "probes": 0 },
                                 "limits": { "connections": 0 } }));
    assert_eq!(found.len(), 3, "{found:?}");
}

#[test]
fn fields_of_a_whole_service_are_known() {
    let route = spec(
        json!({ "retries": {}, "breaker": {}, "fault": {}, "fallback": {},
                             "limits": { "inFlight": 1 }, "timeouts": { "request": "1s" } }),
    );
    assert_eq!(route.unwrap().service_only(), [""; 0]);
    let service = spec(json!({ "retryBudget": {}, "limits": { "connections": 1 },
                               "timeouts": { "idle": "1s" } }));
    let fields = ["retryBudget", "limits.connections", "timeouts.idle"];
    assert_eq!(service.unwrap().service_only(), fields);
}

#[test]
fn a_policy_is_written_as_it_was_read() {
    let written = json!({
        "targetRefs": [{ "group": "", "kind": "Service", "name": "cart" }],
        "retries": { "attempts": 1, "backoff": { "base": "10ms" } },
        "fault": { "delay": { "percentage": 12.5, "time": "1m30s" } }
    });
    let spec: TrafficPolicySpec = serde_json::from_value(written.clone()).unwrap();
    assert_eq!(serde_json::to_value(&spec).unwrap(), written);
}

#[test]
fn every_example_of_the_documentation_is_a_policy() {
    let documentation = include_str!("../../../../../docs/policy.md");
    let examples: Vec<&str> = documentation
        .split("```yaml\n")
        .skip(1)
        .filter_map(|rest| rest.split_once("```"))
        .map(|(example, _)| example)
        .collect();
    assert!(examples.len() > 12, "{} examples", examples.len());
    for example in examples {
        let mut value: Value = serde_saphyr::from_str(example).unwrap();
        let fields = match value.get_mut("spec") {
            Some(whole) => whole.take(),
            None => value,
        };
        assert_eq!(refusals(fields), [""; 0], "{example}");
    }
}

#[test]
fn every_field_is_documented() {
    let documentation = include_str!("../../../../../docs/policy.md");
    let schema = schemars::generate::SchemaSettings::openapi3()
        .with(|settings| settings.inline_subschemas = true)
        .into_generator()
        .into_root_schema_for::<TrafficPolicySpec>();
    let mut schemas = vec![schema.to_value()];
    while let Some(schema) = schemas.pop() {
        let fields = schema["properties"].as_object().into_iter().flatten();
        for (name, field) in fields {
            assert!(documentation.contains(name.as_str()), "{name}");
            schemas.push(field.clone());
            schemas.extend(field.get("items").cloned());
        }
    }
}

#[test]
fn who_says_nothing_of_connecting_gets_the_time_of_the_mesh() {
    let config = MeshConfig {
        connect_timeout: Duration::from_secs(7),
        ..MeshConfig::default()
    };
    let silent = policy(json!({"timeouts": {"attempt": "3s"}}));
    assert_eq!(silent.connect_limit(&config), config.connect_timeout);
    assert_eq!(
        silent.last_connect_limit(&config),
        config.last_connect_timeout
    );
    let own = policy(json!({"timeouts": {"connect": "2s"}}));
    assert_eq!(own.connect_limit(&config), Duration::from_secs(2));
    assert_eq!(own.last_connect_limit(&config), Duration::from_secs(2));
}
