//! What an agent finds is not assumed to be right: a node whose bpffs is empty, with pods in whose namespaces
//! something is left that was never for these programs.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use undermesh_lab::figures::Witness;
use undermesh_lab::traffic::{ClientOptions, ServeOptions};
use undermesh_lab::{Lab, PodHandle, PodSpec, ServiceSpec, Side, wait};

const ECHO: u16 = 7000;
const LIMIT: Duration = Duration::from_secs(30);
/// The table of the agent's routes (docs/architecture.md).
const TABLE: &str = "30061";

fn ip(pod: &PodHandle, arguments: &str) -> Result<String> {
    let arguments: Vec<&str> = arguments.split(' ').collect();
    pod.run("ip", &arguments)
}

/// What capture laid in a pod's namespace, in words of the kernel.
fn laid(pod: &PodHandle) -> Result<[String; 5]> {
    let show = |what: &str| ip(pod, what);
    Ok([
        show("rule show")?,
        show("-6 rule show")?,
        show(&format!("route show table {TABLE}"))?,
        show(&format!("-6 route show table {TABLE}"))?,
        pod.run(
            "sysctl",
            &["net.ipv4.tcp_fwmark_accept", "net.ipv4.fwmark_reflect"],
        )?,
    ])
}

/// Rules, routes and settings that are in the way of capture.
fn spoil(pod: &PodHandle) -> Result<()> {
    ip(
        pod,
        &format!("route add unreachable 10.96.0.0/16 table {TABLE}"),
    )?;
    ip(
        pod,
        &format!("route del local default dev lo table {TABLE}"),
    )?;
    ip(
        pod,
        &format!("route add local default dev lo src 127.0.0.1 metric 1 table {TABLE}"),
    )?;
    ip(
        pod,
        &format!("rule add fwmark 0x1 priority 7 table {TABLE}"),
    )?;
    ip(pod, &format!("-6 route flush table {TABLE}"))?;
    let settings = ["net.ipv4.tcp_fwmark_accept=0", "net.ipv4.fwmark_reflect=0"];
    pod.run("sysctl", &["-w", settings[0], settings[1]])?;
    Ok(())
}

/// Empties the bpffs of a node: links that nothing holds are detached.
fn forget(lab: &Lab, side: Side) -> Result<()> {
    let pins = lab.node(side)?.record().dir.join("bpf/undermesh");
    for layout in fs::read_dir(&pins)? {
        let layout = layout?.path();
        for pin in fs::read_dir(&layout)? {
            fs::remove_file(pin?.path())?;
        }
        fs::remove_dir(layout)?;
    }
    fs::remove_dir(&pins).with_context(|| pins.display().to_string())
}

#[test]
fn after_a_reboot_nothing_is_assumed() -> Result<()> {
    let service = |name: &str| ServiceSpec::new(name).port(80, ECHO);
    let lab = Lab::builder()
        .pod(PodSpec::new("client").on(Side::A).strict())
        .pod(PodSpec::new("near").on(Side::A).strict())
        .pod(PodSpec::new("far").on(Side::B).strict())
        .service(service("near"))
        .service(service("far"))
        .start()?;
    let serve = || ServeOptions::new().echo(ECHO);
    let (client, near) = (lab.pod("client")?, lab.pod("near")?);
    let _servers = (near.serve(serve())?, lab.pod("far")?.serve(serve())?);
    let as_laid = (laid(&client)?, laid(&near)?);

    lab.end_agent(Side::A, Signal::SIGKILL)?;
    forget(&lab, Side::A)?;
    spoil(&client)?;
    spoil(&near)?;
    assert_ne!(as_laid, (laid(&client)?, laid(&near)?));
    // Without the programs nothing holds the pod any more: that is how it is seen that they are gone.
    let to_far = ClientOptions::echo(lab.pod("far")?.v4(ECHO)).connections(1);
    let report = client.traffic(&to_far)?;
    assert_eq!(
        (report.ok, report.failed),
        (0, 1),
        "a STRICT server refuses: {report:?}"
    );

    lab.start_agent(Side::A)?;
    for pod in [&client, &near] {
        lab.wait_enrolled(pod)?;
    }
    assert_eq!(as_laid, (laid(&client)?, laid(&near)?));
    let pods = lab.node(Side::A)?.agent().admin("/pods")?;
    for pod in pods.as_array().context("no list")? {
        assert_eq!(pod["failures"], 0, "{pod}");
    }
    wait::until_true("every pod to be proven", LIMIT, || {
        let pods = lab.node(Side::A)?.agent().admin("/pods")?;
        let pods = pods.as_array().context("no list")?;
        Ok(pods.iter().all(|pod| pod["proof"]["at"].is_string()))
    })?;
    let witness = Witness::start(&lab)?;
    for to in ["near", "far"] {
        for address in [lab.service(to, 80)?, lab.service6(to, 80)?] {
            let report = client.traffic(&ClientOptions::echo(address).connections(5))?;
            assert_eq!((report.ok, report.failed), (5, 0), "{report:?}");
        }
    }
    witness.expect(10, 10)?;
    Ok(())
}
