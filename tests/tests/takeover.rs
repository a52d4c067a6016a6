//! A successor takes over from a running agent, and what is left if either of them dies meanwhile.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use undermesh_lab::figures::Witness;
use undermesh_lab::process::Process;
use undermesh_lab::traffic::{ClientOptions, Failure, Kind, ServeOptions};
use undermesh_lab::{Lab, LabBuilder, PodSpec, ServiceSpec, Side, wait};

const ECHO: u16 = 7000;
const ORIGIN: u16 = 7001;
const LIMIT: Duration = Duration::from_secs(60);

fn pods() -> LabBuilder {
    let service = |name: &str| ServiceSpec::new(name).port(80, ECHO).port(81, ORIGIN);
    Lab::builder()
        .pod(PodSpec::new("client").on(Side::A).strict())
        .pod(PodSpec::new("near").on(Side::A).strict())
        .pod(PodSpec::new("far").on(Side::B).strict())
        .service(service("near"))
        .service(service("far"))
}

fn serve() -> ServeOptions {
    ServeOptions::new().echo(ECHO).origin(ORIGIN)
}

fn storm(lab: &Lab) -> Result<ClientOptions> {
    Ok(ClientOptions::new(Kind::Origin, lab.service("near", 81)?)
        .and_to(lab.service("far", 81)?)
        .during(Duration::from_secs(3600))
        .concurrency(4)
        .pause(Duration::from_millis(5)))
}

#[test]
fn agents_follow_each_other_on_both_nodes_and_no_connection_fails() -> Result<()> {
    let lab = pods().start()?;
    let (near, far) = (
        lab.pod("near")?.serve(serve())?,
        lab.pod("far")?.serve(serve())?,
    );
    let client = lab.pod("client")?;
    let running = client.start_traffic(&storm(&lab)?)?;
    // Streams that last through all of it, each with the agent that accepted it.
    let streams = ClientOptions::echo(lab.service("far", 80)?)
        .connections(4)
        .concurrency(4)
        .requests(500)
        .think(Duration::from_millis(20))
        .timeout(LIMIT);
    let streams = client.start_traffic(&streams)?;
    wait::until_true("the streams to flow", LIMIT, || {
        Ok(streams.report()?.bytes_received > 4 * 4096)
    })?;
    let mut old = Vec::new();
    for side in [Side::A, Side::B, Side::A] {
        old.push(lab.take_over(side)?);
    }
    let streams = streams.finish(LIMIT)?;
    assert_eq!((streams.ok, streams.failed), (4, 0), "{streams:?}");
    wait::until_true("the storm to go on", LIMIT, || {
        Ok(running.report()?.proxied > 100)
    })?;
    let report = running.stop(LIMIT)?;
    assert_eq!((report.failed, report.direct), (0, 0), "{report:?}");
    assert_eq!((near.report()?.direct, far.report()?.direct), (0, 0));
    for mut old in old {
        assert!(old.wait(LIMIT)?.success(), "{}", old.output());
    }
    let witness = Witness::start(&lab)?;
    let report = client.traffic(&ClientOptions::echo(lab.service("far", 80)?).connections(10))?;
    assert_eq!((report.ok, report.failed), (10, 0), "{report:?}");
    witness.expect(10, 0)?;
    Ok(())
}

/// A successor that stops right where it stands: after `line` in the agents' log, which both write.
fn stop_after(process: &Process, line: &str) -> Result<()> {
    for _ in 0..20_000 {
        if process.output().contains(line) {
            return process.signal(Signal::SIGSTOP);
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    bail!("no {line:?} in {}", process.log().display())
}

#[test]
fn a_successor_that_dies_midway_leaves_the_running_agent_at_work() -> Result<()> {
    let lab = pods().start()?;
    let (_near, _far) = (
        lab.pod("near")?.serve(serve())?,
        lab.pod("far")?.serve(serve())?,
    );
    let client = lab.pod("client")?;
    let running = client.start_traffic(&storm(&lab)?)?;
    let agent = lab.node(Side::A)?.agent();
    let before = agent.pid()?.context("no agent")?;
    for _ in 0..3 {
        let mut successor = agent.spawn_successor(&[], &[])?;
        stop_after(&successor, "taking over the running agent's listeners")?;
        successor.stop(Signal::SIGKILL, LIMIT)?;
        wait::until_true("the successor to be gone", LIMIT, || {
            Ok(agent.pid()? == Some(before))
        })?;
        let to = lab.service("far", 80)?;
        let report = client.traffic(&ClientOptions::echo(to).connections(10))?;
        assert_eq!((report.ok, report.failed), (10, 0), "{report:?}");
    }
    let report = running.stop(LIMIT)?;
    // It had accepted nothing that could die with it.
    assert_eq!((report.failed, report.direct), (0, 0), "{report:?}");
    drop(lab.take_over(Side::A)?);
    Ok(())
}

/// Makes what the agent of a node has pinned that of an agent of another layout. A running agent clears away what another
/// layout has left, now and then: right after it did, so that it does not find its own.
fn call_former(lab: &Lab, side: Side) -> Result<()> {
    let pins = pins(lab, side)?;
    if lab.node(side)?.agent().pid()?.is_some() {
        let left_behind = pins.join("00000000000000aa");
        fs::create_dir(&left_behind)?;
        wait::until_true("the agent to clear away", LIMIT, || {
            Ok(!left_behind.exists())
        })?;
    }
    let [own] = &layouts(&pins)?[..] else {
        bail!("more than one layout in {}", pins.display());
    };
    Ok(fs::rename(pins.join(own), pins.join("00000000deadbeef"))?)
}

fn pins(lab: &Lab, side: Side) -> Result<PathBuf> {
    Ok(lab.node(side)?.record().dir.join("bpf/undermesh"))
}

fn layouts(pins: &Path) -> Result<Vec<OsString>> {
    let entries = fs::read_dir(pins)?;
    Ok(entries
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<Result<_, _>>()?)
}

/// Whether exactly one layout is left, and it is not the former.
fn is_cleared(lab: &Lab, side: Side) -> Result<bool> {
    let left = layouts(&pins(lab, side)?)?;
    Ok(left.len() == 1 && left[0] != "00000000deadbeef")
}

#[test]
fn an_agent_of_another_layout_takes_over_or_follows_and_nothing_goes_past_the_mesh() -> Result<()> {
    let lab = pods().start()?;
    let (near, _far) = (
        lab.pod("near")?.serve(serve())?,
        lab.pod("far")?.serve(serve())?,
    );
    let client = lab.pod("client")?;
    let running = client.start_traffic(&storm(&lab)?)?;
    wait::until_true("the storm", LIMIT, || Ok(running.report()?.proxied > 20))?;
    call_former(&lab, Side::A)?;
    let mut old = lab.take_over(Side::A)?;
    wait::until_true("one layout", LIMIT, || is_cleared(&lab, Side::A))?;
    assert!(old.wait(LIMIT)?.success(), "{}", old.output());
    let taken_over = running.stop(LIMIT)?;
    assert_eq!(
        (taken_over.failed, taken_over.direct),
        (0, 0),
        "{taken_over:?}"
    );

    let running = client.start_traffic(&storm(&lab)?)?;
    wait::until_true("the storm", LIMIT, || Ok(running.report()?.proxied > 20))?;
    lab.end_agent(Side::A, Signal::SIGKILL)?;
    call_former(&lab, Side::A)?;
    lab.start_agent(Side::A)?;
    wait::until_true("one layout", LIMIT, || is_cleared(&lab, Side::A))?;
    let followed = running.stop(LIMIT)?;
    assert_eq!(followed.direct, 0, "{followed:?}");
    assert!(followed.failed_by(Failure::Refused) > 0, "{followed:?}");
    assert_eq!(near.report()?.direct, 0);
    let witness = Witness::start(&lab)?;
    let report = client.traffic(&ClientOptions::echo(lab.service("far", 80)?).connections(10))?;
    assert_eq!((report.ok, report.failed), (10, 0), "{report:?}");
    witness.expect(10, 0)?;
    Ok(())
}

/// Stops the CA or lets it go on.
fn signal_authority(lab: &Lab, signal: Signal) -> Result<()> {
    for pid in lab.authority().place().cgroup.processes()? {
        kill(Pid::from_raw(pid), signal)?;
    }
    Ok(())
}

#[test]
fn a_successor_without_certificates_does_not_take_over_even_if_the_running_agent_got_its_own_late()
-> Result<()> {
    let lab = pods().start()?;
    let _far = lab.pod("far")?.serve(serve())?;
    let agent = lab.node(Side::A)?.agent();
    lab.end_agent(Side::A, Signal::SIGKILL)?;
    // The CA has not answered yet when the successor greets the agent.
    signal_authority(&lab, Signal::SIGSTOP)?;
    lab.start_agent(Side::A)?;
    let before = agent.pid()?;
    // The CA does not know this token, which the running agent did not read.
    let kept = lab.node(Side::A)?.record().dir.join("token");
    let right = fs::read(&kept)?;
    fs::write(&kept, "wrong")?;
    let starts =
        || fs::read_to_string(agent.log()).map(|log| log.matches("manifests in force").count());
    let so_far = starts()?;
    let mut successor = agent.spawn_successor(&[], &[])?;
    wait::until_true("the successor to start", LIMIT, || Ok(starts()? > so_far))?;
    signal_authority(&lab, Signal::SIGCONT)?;
    let ended = successor.wait(LIMIT)?;
    fs::write(&kept, right)?;
    assert!(!ended.success());
    assert_eq!(agent.pid()?, before);
    let to = lab.service("far", 80)?;
    let report = lab
        .pod("client")?
        .traffic(&ClientOptions::echo(to).connections(10))?;
    assert_eq!((report.ok, report.failed), (10, 0), "{report:?}");
    Ok(())
}
