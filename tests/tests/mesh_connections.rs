//! Connections of pods through their agents: every one is held against what the agents and the servers saw.

use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use undermesh_lab::figures::Witness;
use undermesh_lab::traffic::{ClientOptions, Failure, Kind, ServeOptions, ServerReport};
use undermesh_lab::{Lab, LabBuilder, PodHandle, PodSpec, ServiceSpec, Side, Traffic, wait};

const ECHO: u16 = 7000;
const EXCHANGE: u16 = 7001;
const BANNER: u16 = 7002;
const SOURCE: u16 = 7003;
const SETTLE: Duration = Duration::from_secs(10);

fn pods() -> LabBuilder {
    Lab::builder()
        .pod(PodSpec::new("client").on(Side::A))
        .pod(PodSpec::new("near").on(Side::A))
        .pod(PodSpec::new("far").on(Side::B))
        .service(ServiceSpec::new("near").port(80, ECHO))
        .service(ServiceSpec::new("far").port(80, ECHO))
        .service(ServiceSpec::new("nobody").port(80, ECHO))
}

fn serve(lab: &Lab, pod: &str) -> Result<Traffic<ServerReport>> {
    let options = ServeOptions::new()
        .echo(ECHO)
        .exchange(EXCHANGE)
        .banner(BANNER)
        .source(SOURCE)
        .udp_echo(ECHO);
    lab.pod(pod)?.serve(options)
}

/// A server sees the end of a connection a moment after its client.
fn settled(server: &Traffic<ServerReport>) -> Result<ServerReport> {
    wait::until("the server's connections to end", SETTLE, || {
        let report = server.report()?;
        Ok((report.open == 0).then_some(report))
    })
}

#[test]
fn a_service_and_a_pod_are_reached_over_mutual_tls_in_both_families() -> Result<()> {
    let lab = pods().start()?;
    let (client, far) = (lab.pod("client")?, lab.pod("far")?);
    let server = serve(&lab, "far")?;
    // New links answer over IPv6 as late as a second after they came up, and a Service's connection
    // goes to the other family then, as it should.
    wait::until_true("IPv6 between the nodes", Duration::from_secs(20), || {
        let first = ClientOptions::echo(far.v6(ECHO)?).connections(1);
        Ok(client.traffic(&first)?.ok == 1)
    })?;
    let before = settled(&server)?;
    let destinations = [
        lab.service("far", 80)?,
        lab.service6("far", 80)?,
        far.v4(ECHO),
        far.v6(ECHO)?,
    ];
    for to in destinations {
        let witness = Witness::start(&lab)?;
        let report = client.traffic(&ClientOptions::echo(to).connections(10).concurrency(2))?;
        assert_eq!((report.ok, report.failed), (10, 0), "{to}: {report:?}");
        assert_eq!(report.peers.get(&to), Some(&10), "getpeername: {report:?}");
        let own = if to.is_ipv4() {
            client.ip()
        } else {
            client.ip6()?
        };
        assert_eq!(
            report.locals.get(&own),
            Some(&10),
            "getsockname: {report:?}"
        );
        witness.expect(10, 0).with_context(|| to.to_string())?;
    }
    let report = settled(&server)?;
    let accepted = report.accepted - before.accepted;
    let completed = report.completed - before.completed;
    assert_eq!((accepted, completed), (40, 40), "{report:?}");
    // The application sees the client's own address.
    assert_eq!(report.accepted_from(client.ip()), 20, "{report:?}");
    let over_v6 = report.accepted_from(client.ip6()?) - before.accepted_from(client.ip6()?);
    assert_eq!(over_v6, 20, "{report:?}");
    assert_eq!(report.locals.get(&far.v4(ECHO)), Some(&20), "{report:?}");
    Ok(())
}

#[test]
fn pods_of_one_node_talk_through_one_relay_without_tls() -> Result<()> {
    let lab = pods().start()?;
    let (client, near) = (lab.pod("client")?, lab.pod("near")?);
    let server = serve(&lab, "near")?;
    for to in [
        lab.service("near", 80)?,
        lab.service6("near", 80)?,
        near.v4(ECHO),
        near.v6(ECHO)?,
    ] {
        let witness = Witness::start(&lab)?;
        let report = client.traffic(&ClientOptions::echo(to).connections(10).concurrency(2))?;
        assert_eq!((report.ok, report.failed), (10, 0), "{to}: {report:?}");
        witness.expect(0, 10).with_context(|| to.to_string())?;
    }
    let report = settled(&server)?;
    assert_eq!(report.accepted_from(client.ip()), 20, "{report:?}");
    assert_eq!(report.accepted_from(client.ip6()?), 20, "{report:?}");
    Ok(())
}

#[test]
fn a_pod_reaches_itself_through_its_own_service() -> Result<()> {
    let lab = pods().start()?;
    let near = lab.pod("near")?;
    let server = serve(&lab, "near")?;
    let own = near.traffic(&ClientOptions::echo(lab.service("near", 80)?).connections(5))?;
    assert_eq!((own.ok, own.failed), (5, 0), "{own:?}");
    // Its own addresses are no destination of the mesh.
    let witness = Witness::start(&lab)?;
    for to in [near.v4(ECHO), ([127, 0, 0, 1], ECHO).into()] {
        let report = near.traffic(&ClientOptions::echo(to).connections(5))?;
        assert_eq!((report.ok, report.failed), (5, 0), "{to}: {report:?}");
    }
    witness.expect(0, 0)?;
    assert_eq!(settled(&server)?.accepted, 15);
    Ok(())
}

#[test]
fn half_closes_server_first_protocols_and_early_ends_survive_the_way() -> Result<()> {
    let lab = pods().start()?;
    let client = lab.pod("client")?;
    for name in ["near", "far"] {
        let (server, pod) = (serve(&lab, name)?, lab.pod(name)?);
        let plan = [
            (Kind::Banner, BANNER),
            (Kind::Exchange, EXCHANGE),
            (Kind::EarlyClose, SOURCE),
        ];
        for (kind, port) in plan {
            let mut options = ClientOptions::new(kind, pod.v4(port))
                .connections(8)
                .concurrency(2);
            options.bytes = 300_000;
            options.answer = 500_000;
            let report = client.traffic(&options)?;
            assert_eq!(
                (report.ok, report.failed),
                (8, 0),
                "{name} {kind:?}: {report:?}"
            );
        }
        let report = settled(&server)?;
        assert_eq!(
            (report.accepted, report.completed),
            (24, 24),
            "{name}: {report:?}"
        );
    }
    Ok(())
}

#[test]
fn a_connection_that_cannot_be_made_ends_with_a_reset_and_never_in_order() -> Result<()> {
    let lab = pods().start()?;
    let client = lab.pod("client")?;
    let closed = 9;
    let destinations = [
        lab.service("nobody", 80)?,
        lab.service6("nobody", 80)?,
        lab.pod("far")?.v4(closed),
        lab.pod("near")?.v6(closed)?,
    ];
    for to in destinations {
        let report = client.traffic(&ClientOptions::echo(to).timeout(Duration::from_secs(15)))?;
        assert_eq!((report.ok, report.failed), (0, 1), "{to}: {report:?}");
        let told = report.failed_by(Failure::Refused) + report.failed_by(Failure::Reset);
        assert_eq!(told, 1, "{to}: {report:?}");
    }
    Ok(())
}

#[test]
fn udp_stays_untouched() -> Result<()> {
    let lab = pods().start()?;
    let server = serve(&lab, "far")?;
    let witness = Witness::start(&lab)?;
    let to = lab.pod("far")?.v4(ECHO);
    let options = ClientOptions::new(Kind::Udp, to)
        .connections(5)
        .requests(20);
    let report = lab.pod("client")?.traffic(&options)?;
    assert_eq!((report.ok, report.failed), (5, 0), "{report:?}");
    assert_eq!(server.report()?.datagrams, 100);
    witness.expect(0, 0)?;
    Ok(())
}

#[test]
fn a_live_connection_is_shown_with_both_identities() -> Result<()> {
    let lab = pods().start()?;
    let _server = serve(&lab, "far")?;
    let options = ClientOptions::echo(lab.service("far", 80)?)
        .requests(2)
        .think(Duration::from_secs(3600));
    let running = lab.pod("client")?.start_traffic(&options)?;
    for (side, direction) in [(Side::A, "outbound"), (Side::B, "inbound")] {
        let agent = lab.node(side)?.agent();
        let shown = wait::until("the connection to be shown", SETTLE, || {
            let all = agent.admin("/connections")?;
            let all = all.as_array().context("a list")?.clone();
            Ok(all
                .into_iter()
                .find(|one| one["direction"] == direction && one["phase"] == "established"))
        })?;
        assert_eq!(
            shown["source_principal"],
            "spiffe://cluster.local/ns/default/sa/client"
        );
        assert_eq!(
            shown["destination_principal"],
            "spiffe://cluster.local/ns/default/sa/far"
        );
        assert_eq!(shown["connection_security_policy"], "mutual_tls", "{shown}");
        let text = agent.admin_text("/connections")?;
        assert!(text.contains("mutual_tls"), "{text}");
    }
    drop(running);
    Ok(())
}

#[test]
fn a_connection_that_went_past_the_agents_does_not_pass_for_one_of_the_mesh() -> Result<()> {
    let lab = pods()
        .pod(PodSpec::new("outsider").on(Side::A).outside())
        .start()?;
    let _server = serve(&lab, "far")?;
    let witness = Witness::start(&lab)?.patience(Duration::from_secs(1));
    let to = lab.pod("far")?.v4(ECHO);
    let report = lab.pod("outsider")?.traffic(&ClientOptions::echo(to))?;
    assert_eq!((report.ok, report.failed), (1, 0), "{report:?}");
    assert!(witness.expect(1, 0).is_err());
    Ok(())
}

/// Longer than an endpoint is waited for where there is another: a SYN that is sent again comes too late for that.
const HUNG: Duration = Duration::from_millis(2500);
/// More than fit into the queue of an app that takes none of them.
const BURST: u64 = 40;

#[test]
fn a_burst_that_an_apps_queue_does_not_hold_is_served_once_the_app_goes_on() -> Result<()> {
    let lab = pods().start()?;
    let client = lab.pod("client")?;
    for name in ["near", "far"] {
        let pod = lab.pod(name)?;
        // The agent listens already; only the app's queue is short.
        pod.place().netns.sysctl(&[("core/somaxconn", "4")])?;
        let server = serve(&lab, name)?;
        let witness = Witness::start(&lab)?;
        server.process().signal(Signal::SIGSTOP)?;
        let options = ClientOptions::echo(lab.service(name, 80)?)
            .connections(BURST)
            .concurrency(BURST)
            .timeout(Duration::from_secs(60));
        let burst = client.start_traffic(&options)?;
        wait::until_true("the queue to overflow", SETTLE, || Ok(overflows(&pod)? > 0))?;
        wait::pause(HUNG)?;
        let meanwhile = burst.report()?;
        assert_eq!(
            (meanwhile.attempted, meanwhile.ok, meanwhile.failed),
            (BURST, 0, 0),
            "{name}: {meanwhile:?}"
        );
        server.process().signal(Signal::SIGCONT)?;
        let report = burst.finish(Duration::from_secs(60))?;
        assert_eq!((report.ok, report.failed), (BURST, 0), "{name}: {report:?}");
        witness.until("the connections", |seen| seen.outbound == BURST)?;
    }
    Ok(())
}

/// `ListenOverflows` of the pod's network (snmp_counter.rst): connections that a full queue had no room for.
fn overflows(pod: &PodHandle) -> Result<u64> {
    let text = pod.place().netns.enter(|| {
        let path = "/proc/thread-self/net/netstat";
        Ok(std::fs::read_to_string(path)?)
    })?;
    let mut lines = text
        .lines()
        .filter_map(|line| line.strip_prefix("TcpExt: "));
    let (names, values) = (lines.next(), lines.next());
    let (names, values) = names.zip(values).context("no TcpExt")?;
    let position = names.split(' ').position(|name| name == "ListenOverflows");
    let value = position.and_then(|position| values.split(' ').nth(position));
    Ok(value.context("no ListenOverflows")?.parse()?)
}
