//! What an agent owes its node: the kubelet's probes pass, and nothing else does.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use undermesh_lab::cgroup::Cgroup;
use undermesh_lab::metrics::Metrics;
use undermesh_lab::process::{Place, Process};
use undermesh_lab::traffic::{ClientOptions, ClientReport, ServeOptions};
use undermesh_lab::{Lab, NodeHandle, PodSpec, Side, wait};

const APP: u16 = 7000;
const HEALTH: u16 = 7001;
const SETTLE: Duration = Duration::from_secs(15);
const VERDICTS: &str = "undermesh_kernel_verdicts_total";

/// An agent with more arguments in place of the one that runs.
fn restart(node: &NodeHandle, more: &[String]) -> Result<Process> {
    let agent = node.agent();
    agent.end(Signal::SIGTERM)?;
    let mut process = agent.spawn(more, &[])?;
    agent.wait_ready(&mut process)?;
    Ok(process)
}

/// Beside the pods, in the node's network.
fn place(node: &NodeHandle, cgroup: &str) -> Result<Place> {
    let path = node.record().cgroup.join(cgroup);
    Ok(Place {
        cgroup: Cgroup::create(&path)?,
        ..node.place()
    })
}

fn traffic(lab: &Lab, place: &Place, options: &ClientOptions) -> Result<ClientReport> {
    let program = lab.state().binaries.traffic.display().to_string();
    let output = place.output(&program, &options.to_args())?;
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text).with_context(|| text.into_owned())
}

fn verdicts(node: &NodeHandle, verdict: &str) -> Result<u64> {
    let metrics = Metrics::parse(&node.agent().metrics()?);
    Ok(metrics.count(VERDICTS, &[("verdict", verdict)]))
}

#[test]
fn a_strict_pod_answers_the_kubelets_probes_on_declared_ports_and_nobody_elses() -> Result<()> {
    let lab = Lab::builder()
        .pod(
            PodSpec::new("web")
                .on(Side::A)
                .strict()
                .probe("readinessProbe", json!({"tcpSocket": {"port": "health"}}))
                .port("health", HEALTH),
        )
        .start()?;
    let (node, web) = (lab.node(Side::A)?, lab.pod("web")?);
    let _server = web.serve(ServeOptions::new().echo(APP).echo(HEALTH))?;
    let path = node.record().cgroup.join("kubelet.service");
    let option = ["--probe-cgroup".to_owned(), path.display().to_string()];
    let _agent = restart(&node, &option)?;
    node.agent().wait_enrolled(&web.full_name())?;
    let state = || -> Result<String> {
        let kernel = node.agent().admin("/kernel")?;
        Ok(kernel["probe_cgroups"][0]["state"].to_string())
    };
    ensure!(state()?.contains("absent"), "{}", state()?);
    let pods = node.agent().admin("/pods")?;
    ensure!(pods[0]["probe_ports"] == json!([HEALTH]), "{pods}");

    let other = node.place();
    let mut admitted = 0;
    for round in 0..2 {
        // The kubelet comes later than the agent, and once more after its service was started again.
        let kubelet = place(&node, "kubelet.service")?;
        wait::until_true("the kubelet's cgroup to be known", SETTLE, || {
            Ok(state()?.contains("known"))
        })?;
        for (health, app) in [
            (web.v4(HEALTH), web.v4(APP)),
            (web.v6(HEALTH)?, web.v6(APP)?),
        ] {
            let probe = ClientOptions::echo(health).connections(20).concurrency(4);
            let report = traffic(&lab, &kubelet, &probe)?;
            ensure!(
                (report.ok, report.failed) == (20, 0),
                "{health} {round}: {report:?}"
            );
            admitted += 20;
            for (place, to) in [(&kubelet, app), (&other, health), (&other, app)] {
                let report = traffic(&lab, place, &ClientOptions::echo(to).connections(5))?;
                ensure!(
                    (report.ok, report.failed) == (0, 5),
                    "{to} {round}: {report:?}"
                );
            }
        }
        // io_uring connects in the kubelet's name too.
        let connects = lab
            .state()
            .binaries
            .traffic
            .with_file_name("undermesh-connects");
        let line = ["connect", "--kind", "io_uring", "--attempts", "5", "--to"];
        for (place, right) in [(&kubelet, 5), (&other, 0)] {
            let mut line: Vec<String> = line.iter().map(|&word| word.to_owned()).collect();
            line.push(web.v4(HEALTH).to_string());
            let output = place.run(&connects.display().to_string(), &line)?;
            let report: serde_json::Value = serde_json::from_str(&output)?;
            ensure!(report["right"] == right, "io_uring {round}: {report}");
            admitted += right;
        }
        ensure!(verdicts(&node, "connect_probe")? == admitted);
        ensure!(verdicts(&node, "lookup_admitted")? >= admitted);
        ensure!(verdicts(&node, "connect_probe_foreign")? > 0);
        ensure!(verdicts(&node, "connect_probe_undeclared")? > 0);
        kubelet.cgroup.wait_empty(SETTLE)?;
        fs::remove_dir(kubelet.cgroup.path())?;
        wait::until_true("the kubelet's cgroup to be gone", SETTLE, || {
            Ok(state()?.contains("absent"))
        })?;
    }

    // Nobody needs the agent for it.
    let kubelet = place(&node, "kubelet.service")?;
    wait::until_true("the kubelet's cgroup to be known", SETTLE, || {
        Ok(state()?.contains("known"))
    })?;
    node.agent().end(Signal::SIGKILL)?;
    for (place, to, ok) in [
        (&kubelet, HEALTH, 5),
        (&kubelet, APP, 0),
        (&other, HEALTH, 0),
    ] {
        let report = traffic(&lab, place, &ClientOptions::echo(web.v4(to)).connections(5))?;
        ensure!(
            (report.ok, report.failed) == (ok, 5 - ok),
            "{to}: {report:?}"
        );
    }
    Ok(())
}
