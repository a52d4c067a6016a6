//! HTTP between real programs, unchanged, on both ends.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;
use undermesh_lab::requests::traffic_policy;
use undermesh_lab::stage::{PORT, TARGET, near_and_far};
use undermesh_lab::web::{Behaviour, LoadOptions, WebOptions};
use undermesh_lab::{Lab, PodHandle, PodSpec, ServiceSpec, Side, apps, machine, wait};

const LIMIT: Duration = Duration::from_secs(60);

fn run(pod: &PodHandle, program: &str, args: &[&str]) -> Result<String> {
    let output = pod.place().output(program, args)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text + &String::from_utf8_lossy(&output.stderr))
}

/// Lets every endpoint of Service `both` have its turn: by default the faster one gets more, and one that is new is passed
/// over for a while.
fn in_turn(lab: &Lab) -> Result<()> {
    let in_turn = json!({"balancing": {"algorithm": "RoundRobin"}, "slowStart": {"window": "0s"}});
    lab.put(traffic_policy("both", in_turn))?;
    wait::until_true("the policy", LIMIT, || {
        let policies = lab.node(Side::A)?.agent().admin_text("/policies")?;
        Ok(policies.contains("both"))
    })
}

#[test]
fn grpc_of_another_language_streams_and_keeps_its_deadlines_and_cancellations() -> Result<()> {
    machine::require_module("grpc", "python3-grpcio")?;
    let lab = near_and_far().start()?;
    let client = lab.pod("client")?;
    let port = TARGET.to_string();
    let serve = |name: &str| apps::python_server(&lab.pod(name)?, "grpc_server", &[&port, name]);
    let servers = [serve("near")?, serve("far")?];
    in_turn(&lab)?;
    for service in ["near", "far", "both"] {
        let to = lab.service(service, PORT)?.to_string();
        let seen = apps::python_client(&client, "grpc_client", &[&to])?;
        let expected = match service {
            "both" => json!(["far", "near"]),
            one => json!([one]),
        };
        assert_eq!(
            seen["servers"], expected,
            "calls of one connection go to every endpoint: {seen}"
        );
        for check in ["big", "server_stream", "bidi"] {
            assert_eq!(seen[check], true, "{service}: {check}: {seen}");
        }
        assert_eq!(seen["client_stream"], 500_000, "{service}: {seen}");
        for code in ["NOT_FOUND", "PERMISSION_DENIED", "INVALID_ARGUMENT"] {
            assert_eq!(seen["codes"][code], code, "{service}: {seen}");
        }
        assert_eq!(seen["deadline"], "DEADLINE_EXCEEDED", "{service}: {seen}");
        assert_eq!(seen["cancel"], "CANCELLED", "{service}: {seen}");
    }
    let mut cancelled = 0;
    for server in servers {
        let report = apps::python_report(server)?;
        let deadlines = report["deadlines"].as_array().context("deadlines")?;
        // What the client gave, less what the way took; gRPC's own library rounds a timeout up by as much as 1 %.
        let bounded = |given: &serde_json::Value| given.as_f64().is_some_and(|left| left <= 15.2);
        assert!(deadlines.iter().all(bounded), "{report}");
        cancelled += report["cancelled"].as_u64().unwrap_or_default();
    }
    // One deadline and one cancellation for each of the three Services.
    assert_eq!(cancelled, 6);
    Ok(())
}

#[test]
fn a_websocket_talks_in_both_directions_and_closes_in_order() -> Result<()> {
    machine::require_module("websockets", "python3-websockets")?;
    let lab = near_and_far().start()?;
    let port = TARGET.to_string();
    let serve = |name: &str| apps::python_server(&lab.pod(name)?, "websocket_server", &[&port]);
    let _servers = [serve("near")?, serve("far")?];
    for service in ["near", "far"] {
        let url = format!("ws://{}/chat", lab.service(service, PORT)?);
        let seen = apps::python_client(&lab.pod("client")?, "websocket_client", &[&url])?;
        assert_eq!(
            seen,
            json!({"echoed": 200, "whole": true, "closed": 1000}),
            "{service}"
        );
    }
    Ok(())
}

#[test]
fn load_generators_see_no_failed_request_over_http1_and_http2() -> Result<()> {
    machine::require(&[machine::WRK, machine::H2LOAD])?;
    let lab = near_and_far().start()?;
    let client = lab.pod("client")?;
    let serve = |name: &str| lab.pod(name)?.serve_web(&WebOptions::new(name, TARGET));
    let servers = [serve("near")?, serve("far")?];
    in_turn(&lab)?;
    let to = lab.service("both", PORT)?;
    let url = format!("http://{to}/");
    let wrk = run(&client, "wrk", &["-t1", "-c16", "-d2s", &url])?;
    assert!(wrk.contains("requests in"), "{wrk}");
    assert!(
        !wrk.contains("Non-2xx") && !wrk.contains("Socket errors"),
        "{wrk}"
    );
    let h2load = run(&client, "h2load", &["-n4000", "-c4", "-m16", &url])?;
    assert!(
        h2load.contains("4000 succeeded, 0 failed, 0 errored"),
        "{h2load}"
    );
    for server in &servers {
        let report = server.report()?;
        assert!(report.received > 1_000, "{report:?}");
    }
    Ok(())
}

#[test]
fn ten_thousand_requests_go_through_a_rollout_without_one_failure() -> Result<()> {
    let pod = |name: &str, side: Side| {
        let pod = PodSpec::new(name).on(side).label("app", "api");
        pod.service_account("api").port("http", TARGET)
    };
    let lab = Lab::builder()
        .pod(PodSpec::new("client").on(Side::A))
        .pod(pod("old-1", Side::A))
        .pod(pod("old-2", Side::B))
        .pod(pod("stay-1", Side::A))
        .pod(pod("stay-2", Side::B))
        .service(ServiceSpec::new("api").http(PORT, TARGET))
        .start()?;
    let serve = |name: &str| lab.pod(name)?.serve_web(&WebOptions::new(name, TARGET));
    let mut staying = vec![serve("stay-1")?, serve("stay-2")?];
    let old = [("old-1", serve("old-1")?), ("old-2", serve("old-2")?)];
    let load = LoadOptions::new(lab.service("api", PORT)?)
        .rate(1250)
        .connections(32)
        .during(4 * LIMIT);
    let load = lab.pod("client")?.start_load(&load)?;
    let sent = |least: u64| {
        wait::until_true("requests to be sent", LIMIT, || {
            Ok(load.report()?.sent >= least)
        })
    };
    sent(1_000)?;
    for (index, (name, server)) in old.into_iter().enumerate() {
        let fresh = format!("new-{index}");
        let side = Side::ALL[index];
        let added = lab.add_pod(&pod(&fresh, side).unready())?;
        let new = added.serve_web(&WebOptions::new(&fresh, TARGET))?;
        lab.wait_enrolled(&added)?;
        lab.set_ready(&fresh, true)?;
        wait::until_true("the new pod to get its share", LIMIT, || {
            Ok(new.report()?.received > 50)
        })?;
        // As the kubelet does: no longer an endpoint, and some time to finish before the end.
        lab.set_ready(name, false)?;
        wait::pause(Duration::from_secs(1))?;
        server.stop(LIMIT)?;
        lab.remove_pod(name)?;
        staying.push(new);
    }
    sent(10_000)?;
    let report = load.stop(LIMIT)?;
    assert_eq!(report.failed(), 0, "{report:?}");
    assert_eq!(report.ok, report.sent, "{report:?}");
    Ok(())
}

#[test]
fn a_server_that_misbehaves_is_reported_for_what_it_did_and_never_completed() -> Result<()> {
    let lab = near_and_far().start()?;
    let client = lab.pod("client")?;
    let port = TARGET.to_string();
    let serve = |name: &str| apps::python_server(&lab.pod(name)?, "bad_server", &[&port]);
    let servers = [serve("near")?, serve("far")?];
    let curl = |service: &str, path: &str| -> Result<(String, i32)> {
        let url = format!("http://{}{path}", lab.service(service, PORT)?);
        #[rustfmt::skip]
        let args = [
            "--silent", "--output", "/dev/null", "--max-time", "5",
            "--write-out", "%{http_code} %header{x-undermesh-reason}", &url,
        ];
        let output = client.place().output("curl", &args)?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        Ok((text, output.status.code().unwrap_or(-1)))
    };
    for service in ["near", "far"] {
        let seen = |path: &str| curl(service, path).with_context(|| format!("{service}{path}"));
        assert_eq!(seen("/ok")?, ("200".to_owned(), 0));
        assert_eq!(seen("/until-close")?, ("200".to_owned(), 0));
        assert_eq!(seen("/slow")?, ("200".to_owned(), 0));
        for path in ["/reset", "/close", "/garbage", "/bad-length"] {
            let (answer, exit) = seen(path)?;
            let (status, reason) = answer.split_once(' ').unwrap_or((&answer, ""));
            assert!(
                ["502", "503"].contains(&status),
                "{service}{path}: {answer}"
            );
            assert!(!reason.is_empty(), "{service}{path}: {answer}");
            assert_eq!(exit, 0, "{service}{path}: {answer}");
        }
        // What is cut after it began must not look whole: curl says 18 (partial) or 56 (reset), unless the reset has
        // overtaken the head of the answer on its way, and the mesh says what it was.
        for path in ["/half-then-fin", "/half-then-reset", "/chunked-cut"] {
            let (answer, exit) = seen(path)?;
            let told = answer == "502 upstream_reset" && exit == 0;
            assert!(
                told || [18, 56].contains(&exit),
                "{service}{path}: {answer} {exit}"
            );
        }
        // The client's own patience, curl's 28.
        assert_eq!(seen("/hang")?.1, 28, "{service}");
    }
    for server in servers {
        let report = apps::python_report(server)?;
        // Nothing is retried here by a policy. Only a GET on a connection that had served others before is sent once more
        // when that breaks, since the server may have closed it just then (RFC 9110 section 9.2.2).
        for path in ["/half-then-fin", "/chunked-cut", "/garbage"] {
            let received = report[path].as_u64().unwrap_or_default();
            assert!((1..=2).contains(&received), "{path}: {report}");
        }
    }
    Ok(())
}

#[test]
fn a_slow_server_does_not_slow_another() -> Result<()> {
    let lab = near_and_far().start()?;
    let client = lab.pod("client")?;
    let serve = |name: &str| lab.pod(name)?.serve_web(&WebOptions::new(name, TARGET));
    let (near, _far) = (serve("near")?, serve("far")?);
    near.behave(&Behaviour {
        delay_ms: 2_000,
        ..Behaviour::default()
    })?;
    let slow = LoadOptions::new(lab.service("near", PORT)?)
        .connections(64)
        .during(Duration::from_secs(3));
    let slow = client.start_load(&slow)?;
    let quick = LoadOptions::new(lab.service("far", PORT)?).rate(100);
    let quick = client.start_load(&quick)?.finish(LIMIT)?;
    assert_eq!(quick.failed(), 0, "{quick:?}");
    assert!(quick.latency.p50 < 500.0, "{quick:?}");
    assert_eq!(slow.finish(LIMIT)?.failed(), 0);
    Ok(())
}
