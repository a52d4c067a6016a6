//! Pods that end while they are asked, as clients and servers see it.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use undermesh_lab::requests::traffic_policy;
use undermesh_lab::stage::{TARGET, ask_steadily, serve_versions, versions};
use undermesh_lab::web::{Behaviour, WebOptions, WebReport};
use undermesh_lab::{Lab, PodSpec, Side, Traffic, wait};

const LIMIT: Duration = Duration::from_secs(60);

/// Requests by which any that was on its way before has come.
const LATER: u64 = 60;

/// Addresses that requests of the client's node go to.
fn endpoints(lab: &Lab) -> Result<Vec<String>> {
    let shown = lab.node(Side::A)?.agent().admin("/breakers")?;
    let rows = shown.as_array().context("no rows")?;
    let web = rows
        .iter()
        .find(|row| row["destination"] == "default/web:80");
    let endpoints = web.and_then(|row| row["endpoints"].as_array());
    let address = |one: &Value| one["endpoint"].as_str().unwrap_or_default().to_owned();
    let mut all: Vec<_> = endpoints.into_iter().flatten().map(address).collect();
    // A Service of both families has each pod twice.
    all.retain(|address| !address.starts_with('['));
    all.sort();
    Ok(all)
}

fn lead_to(lab: &Lab, pods: &[&str]) -> Result<()> {
    let mut wanted = Vec::new();
    for pod in pods {
        wanted.push(lab.pod(pod)?.v4(TARGET).to_string());
    }
    wanted.sort();
    wait::until_true(&format!("requests to lead to {pods:?}"), LIMIT, || {
        Ok(endpoints(lab)? == wanted)
    })
}

fn asked(server: &Traffic<WebReport>, more: u64) -> Result<()> {
    let before = server.report()?.received;
    wait::until_true("a server to be asked", LIMIT, || {
        Ok(server.report()?.received >= before + more)
    })
}

#[test]
fn a_rollout_sends_nothing_new_to_pods_that_terminate_unless_all_do_and_fails_no_request()
-> Result<()> {
    let lab = versions().start()?;
    let [first, second] = serve_versions(&lab)?;
    let slow = Behaviour {
        delay_ms: 500,
        ..Behaviour::default()
    };
    for server in [&first, &second] {
        server.behave(&slow)?;
    }
    lab.put(traffic_policy(
        "web",
        json!({"balancing": {"algorithm": "RoundRobin"}, "slowStart": {"window": "0s"}}),
    ))?;
    let loads = ask_steadily(&lab, 10 * LIMIT)?;
    asked(&first, 20)?;
    asked(&second, 20)?;

    // The new version comes, then the old pods are told to go, one after the other.
    let spec = PodSpec::new("v3").on(Side::B).label("group", "web");
    let third = lab.add_pod(&spec.service_account("web").port("http", TARGET))?;
    let third = third.serve_web(&WebOptions::new("v3", TARGET))?;
    lead_to(&lab, &["v1", "v2", "v3"])?;
    for (name, leaving, others) in [
        ("v1", &first, vec!["v2", "v3"]),
        ("v2", &second, vec!["v3"]),
    ] {
        lab.set_terminating(name)?;
        lead_to(&lab, &others)?;
        asked(&third, LATER)?;
        let received = leaving.report()?.received;
        asked(&third, LATER)?;
        assert_eq!(
            leaving.report()?.received,
            received,
            "{name} is asked no more"
        );
    }
    // When all of them go, those that serve still are better than nothing.
    lab.set_terminating("v3")?;
    lead_to(&lab, &["v1", "v2", "v3"])?;
    asked(&first, 20)?;
    asked(&second, 20)?;
    lab.set_ready("v1", false)?;
    lead_to(&lab, &["v2", "v3"])?;
    asked(&third, LATER)?;
    let received = first.report()?.received;
    asked(&third, LATER)?;
    assert_eq!(first.report()?.received, received, "it does not even serve");
    first.stop(LIMIT)?;
    lab.remove_pod("v1")?;
    asked(&second, 20)?;
    for load in loads {
        let report = load.stop(LIMIT)?;
        assert_eq!(report.failed(), 0, "{report:?}");
        assert_eq!(report.by_server.len(), 3, "{report:?}");
    }
    Ok(())
}
