//! Pods and agents that come and go while others work.

use std::time::Duration;

use anyhow::Result;
use nix::sys::signal::Signal;
use undermesh_lab::figures::Witness;
use undermesh_lab::traffic::{ClientOptions, ServeOptions};
use undermesh_lab::{Lab, LabBuilder, PodSpec, ServiceSpec, Side, wait};

const ECHO: u16 = 7000;

fn pods() -> LabBuilder {
    Lab::builder()
        .pod(PodSpec::new("client").on(Side::A))
        .pod(PodSpec::new("server").on(Side::B))
        .service(ServiceSpec::new("server").port(80, ECHO))
        .service(ServiceSpec::new("guest").port(80, ECHO))
}

fn serve() -> ServeOptions {
    ServeOptions::new().echo(ECHO)
}

#[test]
fn pods_come_and_go_under_load_and_nobody_else_notices() -> Result<()> {
    let lab = pods().start()?;
    let server = lab.pod("server")?.serve(serve())?;
    let client = lab.pod("client")?;
    let steady = ClientOptions::echo(lab.service("server", 80)?)
        .during(Duration::from_secs(3600))
        .concurrency(4)
        .pause(Duration::from_millis(5));
    let witness = Witness::start(&lab)?;
    let running = client.start_traffic(&steady)?;
    let (mut across, mut beside) = (0, 0);
    for round in 0..6 {
        let side = if round % 2 == 0 { Side::A } else { Side::B };
        let guest = lab.add_pod(&PodSpec::new("guest").on(side))?;
        let serving = guest.serve(serve())?;
        lab.wait_enrolled(&guest)?;
        // To the newcomer, by its Service, and from it.
        let to_guest = ClientOptions::echo(lab.service("guest", 80)?).connections(10);
        let report = client.traffic(&to_guest)?;
        assert_eq!(
            (report.ok, report.failed),
            (10, 0),
            "round {round}: {report:?}"
        );
        let from_guest = ClientOptions::echo(lab.service("server", 80)?).connections(10);
        let report = guest.traffic(&from_guest)?;
        assert_eq!(
            (report.ok, report.failed),
            (10, 0),
            "round {round}: {report:?}"
        );
        assert_eq!(serving.report()?.accepted, 10);
        across += 10;
        beside += 10;
        drop(serving);
        lab.remove_pod("guest")?;
    }
    let report = running.stop(Duration::from_secs(30))?;
    assert_eq!(report.failed, 0, "{report:?}");
    assert!(report.ok > 100, "{report:?}");
    // Each guest had ten connections over the wire and ten within its node.
    assert_eq!(server.report()?.accepted, report.ok + 60);
    witness.expect(report.ok + across, beside)?;
    Ok(())
}

#[test]
fn a_pod_that_is_gone_leaves_nothing_behind_in_the_agent() -> Result<()> {
    let lab = pods().start()?;
    let agent = lab.node(Side::B)?.agent();
    let descriptors = || -> Result<usize> {
        let pid = agent.pid()?.unwrap_or(0);
        Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
    };
    let round = || -> Result<()> {
        let guest = lab.add_pod(&PodSpec::new("guest").on(Side::B))?;
        let _serving = guest.serve(serve())?;
        lab.wait_enrolled(&guest)?;
        let to = lab.service("guest", 80)?;
        let report = lab
            .pod("client")?
            .traffic(&ClientOptions::echo(to).connections(5))?;
        assert_eq!((report.ok, report.failed), (5, 0), "{report:?}");
        lab.remove_pod("guest")
    };
    // What the first pod brings once and for all.
    round()?;
    let gone = |baseline: usize| {
        wait::until_true(
            "the pod's descriptors to be closed",
            Duration::from_secs(60),
            || Ok(descriptors()? <= baseline),
        )
    };
    wait::until_true(
        "the first guest to be forgotten",
        Duration::from_secs(60),
        || Ok(!agent.admin("/pods")?.to_string().contains("default/guest")),
    )?;
    let baseline = descriptors()?;
    for _ in 0..4 {
        round()?;
    }
    gone(baseline)
}

#[test]
fn an_agent_that_was_killed_takes_up_its_pods_again() -> Result<()> {
    let lab = pods().start()?;
    let server = lab.pod("server")?.serve(serve())?;
    let client = lab.pod("client")?;
    let options = ClientOptions::echo(lab.service("server", 80)?).connections(10);
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        for side in Side::ALL {
            lab.end_agent(side, signal)?;
            lab.start_agent(side)?;
            let witness = Witness::start(&lab)?;
            let report = client.traffic(&options)?;
            assert_eq!(
                (report.ok, report.failed),
                (10, 0),
                "{signal} {side:?}: {report:?}"
            );
            witness.expect(10, 0)?;
        }
    }
    assert_eq!(server.report()?.accepted, 40);
    Ok(())
}
