//! The lab itself, without agents: what tests of the mesh rest on.

use std::time::Duration;

use anyhow::Result;
use undermesh_lab::traffic::{ClientOptions, Failure, Kind, ServeOptions};
use undermesh_lab::{Lab, LabState, PodSpec, ServiceSpec, Side};

fn two_pods() -> Result<Lab> {
    Lab::builder()
        .pod(PodSpec::new("client").on(Side::A))
        .pod(PodSpec::new("neighbour").on(Side::A).v4_only())
        .pod(PodSpec::new("server").on(Side::B))
        .service(ServiceSpec::new("server").port(80, 7000))
        .service(ServiceSpec::new("nobody").port(80, 7000))
        .without_agents()
        .start()
}

#[test]
fn pods_reach_each_other_by_address_and_by_service_in_both_families() -> Result<()> {
    let lab = two_pods()?;
    let (client, server) = (lab.pod("client")?, lab.pod("server")?);
    let serve = ServeOptions::new()
        .echo(7000)
        .exchange(7001)
        .banner(7002)
        .source(7003)
        .udp_echo(7004);
    let serving = server.serve(serve)?;

    let destinations = [
        server.v4(7000),
        server.v6(7000)?,
        lab.service("server", 80)?,
        lab.service6("server", 80)?,
    ];
    for to in destinations {
        let report = client.traffic(&ClientOptions::echo(to).connections(20).concurrency(4))?;
        assert_eq!(
            (report.opened, report.ok, report.failed),
            (20, 20, 0),
            "{to}: {report:?}"
        );
        assert_eq!(report.peers[&to], 20);
    }
    let report = serving.report()?;
    assert_eq!(report.accepted, 80);
    assert_eq!(report.accepted_from(client.ip()), 40);
    assert_eq!(report.accepted_from(client.ip6()?), 40);

    for (kind, port) in [
        (Kind::Exchange, 7001),
        (Kind::Banner, 7002),
        (Kind::EarlyClose, 7003),
        (Kind::Udp, 7004),
    ] {
        let mut options = ClientOptions::new(kind, server.v4(port))
            .bytes(1_000_000)
            .connections(3);
        options.answer = 2_000_000;
        let report = client.traffic(&options)?;
        assert_eq!((report.ok, report.failed), (3, 0), "{kind:?}: {report:?}");
    }
    let report = serving.stop(Duration::from_secs(5))?;
    assert_eq!((report.datagrams, report.open), (3, 0));
    assert!(report.failures.is_empty(), "{report:?}");
    Ok(())
}

#[test]
fn failures_have_names() -> Result<()> {
    let lab = two_pods()?;
    let (client, server) = (lab.pod("client")?, lab.pod("server")?);
    let refused = client.traffic(&ClientOptions::echo(server.v4(9)))?;
    assert_eq!(refused.failed_by(Failure::Refused), 1, "{refused:?}");
    let nobody = lab.service("nobody", 80)?;
    let refused = client.traffic(&ClientOptions::echo(nobody))?;
    assert_eq!(refused.failed_by(Failure::Refused), 1, "{refused:?}");
    let v6 = lab
        .pod("neighbour")?
        .traffic(&ClientOptions::echo(server.v6(9)?))?;
    assert_eq!(v6.failed_by(Failure::Unreachable), 1, "{v6:?}");
    Ok(())
}

#[test]
fn pods_come_and_go_while_the_lab_runs() -> Result<()> {
    let lab = two_pods()?;
    let client = lab.pod("client")?;
    let to = lab.service("nobody", 80)?;
    for round in 0..3 {
        let pod = lab.add_pod(&PodSpec::new("nobody").on(Side::B))?;
        let _serving = pod.serve(ServeOptions::new().echo(7000))?;
        let report = client.traffic(&ClientOptions::echo(to))?;
        assert_eq!(report.ok, 1, "round {round}: {report:?}");
        lab.remove_pod("nobody")?;
        assert!(!pod.record().netns.exists());
        assert!(!pod.record().cgroup.exists());
    }
    Ok(())
}

#[test]
fn the_wire_shows_what_crosses_it_and_only_that() -> Result<()> {
    let lab = two_pods()?;
    let (client, server) = (lab.pod("client")?, lab.pod("server")?);
    let near = lab.pod("neighbour")?;
    let serve = || ServeOptions::new().echo(7000);
    let (_far, _near) = (server.serve(serve())?, near.serve(serve())?);
    let capture = lab.node(Side::A)?.capture("wire")?;
    let across = ClientOptions::echo(server.v4(7000))
        .bytes(5000)
        .marker("across-the-wire");
    assert_eq!(client.traffic(&across)?.ok, 1);
    let beside = ClientOptions::echo(near.v4(7000))
        .bytes(5000)
        .marker("across-the-node");
    assert_eq!(client.traffic(&beside)?.ok, 1);
    let packets = capture.stop(&["across-the-wire", "across-the-node"])?;
    assert!(packets.marker_hits[0] >= 2, "{packets:?}");
    assert_eq!((packets.marker_hits[1], packets.dropped), (0, 0));
    Ok(())
}

#[test]
fn nothing_is_left_of_a_lab() -> Result<()> {
    let lab = two_pods()?;
    let server = lab.pod("server")?;
    let serving = server.serve(ServeOptions::new().echo(7000))?;
    let state: LabState = lab.state();
    let pid = serving.process().pid();
    assert!(std::path::Path::new(&format!("/proc/{pid}")).exists());
    serving.leave_running();
    drop(lab);
    assert!(!state.dir.exists() && !state.cgroup.exists());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    assert!(!mounts.contains(&state.dir.display().to_string()));
    Ok(())
}
