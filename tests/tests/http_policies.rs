//! Policies for requests, as clients and servers see them.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use serde_json::json;
use undermesh_lab::curl::{Answer, ask, ask_often};
use undermesh_lab::metrics::Metrics;
use undermesh_lab::requests::traffic_policy;
use undermesh_lab::stage::{PORT, TARGET, ask_steadily, serve_versions, versions};
use undermesh_lab::web::{Behaviour, WebOptions};
use undermesh_lab::{Lab, PodSpec, Side, apps, machine, wait};

const LIMIT: Duration = Duration::from_secs(30);

fn url(lab: &Lab, service: &str) -> Result<String> {
    Ok(format!("http://{}/", lab.service(service, PORT)?))
}

fn counted(lab: &Lab, name: &str, labels: &[(&str, &str)]) -> Result<u64> {
    let metrics = lab.node(Side::A)?.agent().metrics()?;
    Ok(Metrics::parse(&metrics).count(name, labels))
}

fn statuses(answers: &[Answer]) -> BTreeMap<(u16, &str), usize> {
    let mut counts = BTreeMap::new();
    for answer in answers {
        *counts.entry((answer.status, answer.reason())).or_default() += 1;
    }
    counts
}

#[test]
fn a_breaker_that_is_forced_open_rejects_and_one_forced_closed_does_not_open() -> Result<()> {
    let lab = versions().start()?;
    let client = lab.pod("client")?;
    let [_first, second] = serve_versions(&lab)?;
    let url = url(&lab, "v2")?;
    let node = lab.node(Side::A)?;
    let program = lab.state().binaries.agent.display().to_string();
    let arguments = node.agent().arguments();
    let socket = arguments
        .windows(2)
        .find(|pair| pair[0] == "--admin-socket")
        .map(|pair| pair[1].clone())
        .context("no socket")?;
    lab.put(traffic_policy(
        "v2",
        json!({"breaker": {"minimumRequests": 5, "window": "30s"}}),
    ))?;
    let force = |how: &str| {
        let words = [
            "breakers",
            "--admin-socket",
            &socket,
            "--force",
            how,
            "default/v2:80",
        ];
        node.place().run(&program, &words)
    };
    assert_eq!(ask(&client, &url, &[])?.status, 200);

    assert!(force("open")?.contains("held open"));
    let before = second.report()?.received;
    for answer in ask_often(&client, &url, 10, &[])? {
        assert_eq!(
            (answer.status, answer.reason()),
            (503, "circuit_open"),
            "{answer:?}"
        );
        assert!(
            answer.header("retry-after").is_none(),
            "nobody knows when: {answer:?}"
        );
    }
    assert_eq!(second.report()?.received, before, "nothing gets through");
    let shown = node.agent().admin("/breakers")?;
    assert_eq!(
        (&shown[0]["forced"], &shown[0]["state"]),
        (&json!("open"), &json!("open")),
        "{shown}"
    );

    assert!(force("closed")?.contains("held closed"));
    second.behave(&Behaviour::failing(500))?;
    let answers = ask_often(&client, &url, 60, &[])?;
    // Every one is the server's own: the breaker would have opened after twenty.
    assert_eq!(statuses(&answers), BTreeMap::from([((500, ""), 60)]));

    assert!(force("none")?.contains("released"));
    wait::until_true("it to open by itself", LIMIT, || {
        Ok(ask(&client, &url, &[])?.reason() == "circuit_open")
    })?;
    second.behave(&Behaviour::default())?;
    wait::until_true("it to close by itself", LIMIT, || {
        Ok(ask(&client, &url, &[])?.status == 200)
    })
}

#[test]
fn a_pod_that_leaves_answers_what_it_was_asked_and_nothing_more() -> Result<()> {
    let lab = versions().start()?;
    let [first, second] = serve_versions(&lab)?;
    let slow = Behaviour {
        delay_ms: 1_500,
        ..Behaviour::default()
    };
    for server in [&first, &second] {
        server.behave(&slow)?;
    }
    lab.put(traffic_policy(
        "web",
        json!({"balancing": {"algorithm": "RoundRobin"}}),
    ))?;
    let loads = ask_steadily(&lab, 4 * LIMIT)?;
    wait::until_true("requests to be under way at both", LIMIT, || {
        Ok(first.report()?.received > 20 && second.report()?.received > 20)
    })?;
    // Both ways to leave: from this node and from the other one; as the kubelet does, no endpoint first.
    lab.set_ready("v2", false)?;
    wait::until_true("requests to go elsewhere", LIMIT, || {
        let before = second.report()?.received;
        wait::pause(Duration::from_millis(500))?;
        Ok(second.report()?.received == before)
    })?;
    wait::pause(Duration::from_millis(1_500))?;
    second.stop(LIMIT)?;
    lab.remove_pod("v2")?;
    wait::pause(Duration::from_secs(1))?;
    for load in loads {
        let report = load.stop(LIMIT)?;
        assert_eq!(report.failed(), 0, "{report:?}");
        assert_eq!(report.by_server.len(), 2, "{report:?}");
    }
    Ok(())
}

#[test]
fn who_asks_too_often_is_told_how_long_to_wait() -> Result<()> {
    machine::require_module("grpc", "python3-grpcio")?;
    let lab = versions().pod(PodSpec::new("other").on(Side::A)).start()?;
    let client = lab.pod("client")?;
    let port = TARGET.to_string();
    let _grpc = apps::python_server(&lab.pod("v1")?, "grpc_server", &[&port, "v1"])?;
    let second = lab.pod("v2")?.serve_web(&WebOptions::new("v2", TARGET))?;
    let limit = json!({"rateLimit": {"perSource": {"requestsPerSecond": 0.1, "burst": 5}}});
    for service in ["v1", "v2"] {
        lab.put(traffic_policy(service, limit.clone()))?;
    }
    let url = url(&lab, "v2")?;
    wait::until_true("the policy", LIMIT, || {
        Ok(ask(&client, &url, &[])?.status == 429)
    })?;
    let received = second.report()?.received;
    let answer = ask(&client, &url, &[])?;
    assert_eq!(
        (answer.status, answer.reason()),
        (429, "rate_limited"),
        "{answer:?}"
    );
    let after: u64 = answer
        .header("retry-after")
        .context("retry-after")?
        .parse()?;
    assert!((1..=10).contains(&after), "{answer:?}");
    assert_eq!(
        answer.header("ratelimit-policy"),
        Some("\"source\";q=5;w=50"),
        "{answer:?}"
    );
    let left = answer.header("ratelimit").context("ratelimit")?;
    assert!(left.starts_with("\"source\";r=0;t="), "{answer:?}");
    assert_eq!(second.report()?.received, received, "refused on the way");
    // Another identity has a bucket of its own.
    assert_eq!(ask(&lab.pod("other")?, &url, &[])?.status, 200);
    let limited = counted(
        &lab,
        "undermesh_http_rate_limited_total",
        &[("axis", "source")],
    )?;
    assert!(limited >= 2, "{limited} counted");

    let to = lab.service("v1", PORT)?.to_string();
    let calls = json!([{"method": "Unary", "times": 20}]).to_string();
    let seen = apps::python_client(&client, "grpc_route_client", &[&to, &calls])?;
    let codes = &seen["calls"][0]["codes"];
    assert_eq!(codes["OK"], 5, "{seen}");
    assert_eq!(codes["RESOURCE_EXHAUSTED"], 15, "{seen}");
    assert_eq!(seen["calls"][0]["details"], "rate_limited", "{seen}");
    Ok(())
}

#[test]
fn faults_on_purpose_hit_whom_they_are_meant_for() -> Result<()> {
    let lab = versions().start()?;
    let client = lab.pod("client")?;
    let [_first, second] = serve_versions(&lab)?;
    lab.put(traffic_policy(
        "v2",
        json!({"fault": {
            "headers": [{"name": "x-chaos", "value": "on"}],
            "delay": {"percentage": 100, "time": "400ms"},
            "abort": {"percentage": 100, "httpStatus": 418},
        }}),
    ))?;
    let url = url(&lab, "v2")?;
    let chaos = ["--header", "x-chaos: on"];
    wait::until_true("the policy", LIMIT, || {
        Ok(ask(&client, &url, &chaos)?.status == 418)
    })?;
    let received = second.report()?.received;
    let start = Instant::now();
    let answer = ask(&client, &url, &chaos)?;
    assert!(
        start.elapsed() >= Duration::from_millis(400),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(
        (answer.status, answer.reason()),
        (418, "fault_injected"),
        "{answer:?}"
    );
    assert_eq!(
        second.report()?.received,
        received,
        "the server has nothing to do with it"
    );
    let grpc = [
        &chaos[..],
        &["--header", "content-type: application/grpc", "--data", ""],
    ]
    .concat();
    let answer = ask(&client, &url, &grpc)?;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(
        answer
            .header("grpc-status")
            .is_some_and(|status| status != "0"),
        "{answer:?}"
    );
    // Others see none of it.
    for answer in ask_often(&client, &url, 20, &[])? {
        assert_eq!((answer.status, answer.server()), (200, "v2"), "{answer:?}");
    }
    lab.put(traffic_policy(
        "v2",
        json!({"fault": {"abort": {"percentage": 50, "httpStatus": 418}}}),
    ))?;
    wait::until_true("half of them", LIMIT, || {
        let answers = ask_often(&client, &url, 10, &[])?;
        Ok(statuses(&answers).len() == 2)
    })?;
    let answers = ask_often(&client, &url, 100, &[])?;
    let hit = statuses(&answers)
        .get(&(418, "fault_injected"))
        .copied()
        .unwrap_or(0);
    // Five standard deviations around 50.
    assert!((25..=75).contains(&hit), "{hit} of 100");
    let breaker = lab.node(Side::A)?.agent().admin("/breakers")?;
    assert!(
        breaker.to_string().contains("closed") && !breaker.to_string().contains("\"open\""),
        "{breaker}"
    );
    Ok(())
}

#[test]
fn what_cannot_be_had_comes_from_where_the_policy_says() -> Result<()> {
    let lab = versions().start()?;
    let client = lab.pod("client")?;
    let [first, second] = serve_versions(&lab)?;
    second.behave(&Behaviour::failing(503))?;
    let url = url(&lab, "v2")?;
    assert_eq!(ask(&client, &url, &[])?.status, 503);
    let retries = json!({"attempts": 1, "httpStatuses": [503]});
    let backend = json!({"backend": {"name": "v1", "port": PORT}});
    lab.put(traffic_policy(
        "v2",
        json!({"retries": retries, "fallback": backend}),
    ))?;
    wait::until_true("the policy", LIMIT, || {
        Ok(ask(&client, &url, &[])?.status == 200)
    })?;
    let before = first.report()?.received;
    // The breaker opens on the way, which the client does not see.
    for answer in ask_often(&client, &url, 40, &[])? {
        assert_eq!((answer.status, answer.server()), (200, "v1"), "{answer:?}");
    }
    assert_eq!(first.report()?.received - before, 40);
    let kinds = counted(
        &lab,
        "undermesh_http_fallbacks_total",
        &[("kind", "backend")],
    )?;
    assert!(kinds >= 40, "{kinds}");
    let response = json!({"response": {"status": 299, "body": "back soon"}});
    lab.put(traffic_policy(
        "v2",
        json!({"retries": retries, "fallback": response}),
    ))?;
    wait::until_true("a fixed response", LIMIT, || {
        Ok(ask(&client, &url, &[])?.status == 299)
    })?;
    let answer = ask(&client, &url, &[])?;
    assert_eq!(
        (answer.reason(), &*answer.body),
        ("fallback", "back soon"),
        "{answer:?}"
    );
    // No endpoint at all is one of the reasons.
    lab.set_ready("v2", false)?;
    assert_eq!(ask(&client, &url, &[])?.status, 299);
    Ok(())
}

#[test]
fn requests_above_the_bounds_of_a_policy_wait_in_turn_or_are_shed() -> Result<()> {
    let lab = versions().start()?;
    let client = lab.pod("client")?;
    let [_first, second] = serve_versions(&lab)?;
    second.behave(&Behaviour {
        delay_ms: 1_000,
        ..Behaviour::default()
    })?;
    lab.put(traffic_policy("v2", json!({"limits": {"inFlight": 2}})))?;
    let url = url(&lab, "v2")?;
    let at_once = || -> Result<Vec<Answer>> {
        thread::scope(|scope| {
            let asks: Vec<_> = (0..6)
                .map(|_| scope.spawn(|| ask(&client, &url, &[])))
                .collect();
            let answers = asks
                .into_iter()
                .map(|one| one.join().map_err(|_| anyhow!("panicked"))?);
            answers.collect()
        })
    };
    wait::until_true("the policy", LIMIT, || {
        let answers = at_once()?;
        Ok(statuses(&answers) == BTreeMap::from([((200, ""), 2), ((503, "overload"), 4)]))
    })?;
    lab.put(traffic_policy("v2", json!({"limits": {"connections": 2}})))?;
    wait::until_true("those without a connection to wait", LIMIT, || {
        let answers = at_once()?;
        Ok(statuses(&answers) == BTreeMap::from([((200, ""), 6)]))
    })
}

#[test]
fn opaque_connections_and_requests_to_a_port_share_the_limit_of_its_connections() -> Result<()> {
    const MIXED: u16 = 9000;
    // A port that nobody says the protocol of: what comes first tells.
    let mixed = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "mixed", "namespace": "default"},
        "spec": {"selector": {"app": "v2"}, "ports": [
            {"name": "mixed", "port": MIXED, "targetPort": MIXED, "protocol": "TCP"},
        ]},
    });
    machine::require(&[machine::PYTHON])?;
    let lab = versions().document(mixed).start()?;
    let client = lab.pod("client")?;
    let server = WebOptions::new("v2", MIXED);
    let server = lab.pod("v2")?.serve_web(&server)?;
    let address = lab.service("mixed", MIXED)?;
    let url = format!("http://{address}/");
    let limits = json!({
        "limits": {"connections": 2},
        // So long an opaque connection waits for its place.
        "timeouts": {"connect": "2s", "attempt": "500ms"},
    });
    lab.put(traffic_policy("mixed", limits))?;
    let name = "undermesh_upstream_connections";
    let destination = format!("default/mixed:{MIXED}");
    let labels = [("destination", &*destination)];
    let open = || counted(&lab, name, &labels);
    wait::until_true("the policy", LIMIT, || {
        ask(&client, &url, &[])?;
        Ok(open()? == 1)
    })?;

    // A client that says nothing has an opaque connection. What idles makes room for two of them.
    let (host, port) = (address.ip().to_string(), address.port().to_string());
    let silent = |title: &str| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/programs/silent_client.py");
        client.spawn(title, "python3", &[script, &*host, &*port])
    };
    let connections = || Ok::<_, anyhow::Error>(server.report()?.connections);
    let before = connections()?;
    let held = [silent("first")?, silent("second")?];
    wait::until_true("both to be open", LIMIT, || {
        Ok(connections()? == before + 2 && open()? == 2)
    })?;
    let answer = ask(&client, &url, &[])?;
    assert_eq!(
        (answer.status, answer.reason()),
        (503, "overload"),
        "{answer:?}"
    );
    // One that is opaque too gets none either, and is reset when its time is over.
    let mut third = silent("third")?;
    third.wait(LIMIT)?;
    let seen: serde_json::Value = serde_json::from_str(third.output().trim())?;
    assert_eq!(seen["end"], "reset", "{seen}");
    assert!(seen["seconds"].as_f64() > Some(1.9), "{seen}");
    let shed = counted(&lab, "undermesh_upstream_connections_shed_total", &labels)?;
    assert!(shed >= 2, "{shed} shed");
    assert_eq!((open()?, connections()?), (2, before + 2));
    // With one of them gone there is room for requests.
    let [first, _second] = held;
    drop(first);
    wait::until_true("a request to get its place", LIMIT, || {
        Ok(ask(&client, &url, &[])?.status == 200)
    })
}
