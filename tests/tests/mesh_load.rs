//! Much at once, for long, or slowly.

use std::time::Duration;

use anyhow::Result;
use undermesh_lab::figures::Witness;
use undermesh_lab::traffic::{ClientOptions, Failure, ServeOptions};
use undermesh_lab::{Lab, LabBuilder, PodSpec, ServiceSpec, Side, wait};

const ECHO: u16 = 7000;
const EXCHANGE: u16 = 7001;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// How long the first of many connections stays open: on a busy machine the last one comes late.
const HELD: Duration = Duration::from_secs(20);

fn pods() -> LabBuilder {
    Lab::builder()
        .pod(PodSpec::new("client").on(Side::A))
        .pod(PodSpec::new("near").on(Side::A))
        .pod(PodSpec::new("far").on(Side::B))
        .service(ServiceSpec::new("far").port(80, ECHO))
}

fn serve() -> ServeOptions {
    ServeOptions::new().echo(ECHO).exchange(EXCHANGE)
}

#[test]
fn a_gibibyte_each_way_at_once_arrives_unchanged() -> Result<()> {
    let lab = pods().start()?;
    for (name, across, beside) in [("far", 1, 0), ("near", 0, 1)] {
        let pod = lab.pod(name)?;
        let server = pod.serve(serve())?;
        let witness = Witness::start(&lab)?;
        let options =
            ClientOptions::exchange(pod.v4(EXCHANGE), GIB, GIB).timeout(Duration::from_secs(180));
        let report = lab.pod("client")?.traffic(&options)?;
        assert_eq!((report.ok, report.failed), (1, 0), "{name}: {report:?}");
        assert_eq!((report.bytes_sent, report.bytes_received), (GIB, GIB));
        assert_eq!(server.report()?.bytes_received, GIB);
        witness.expect(across, beside)?;
    }
    Ok(())
}

#[test]
fn a_thousand_connections_are_open_at_once() -> Result<()> {
    let lab = pods().start()?;
    let server = lab.pod("far")?.serve(serve())?;
    let witness = Witness::start(&lab)?;
    let options = ClientOptions::echo(lab.service("far", 80)?)
        .connections(1000)
        .concurrency(1000)
        .requests(2)
        .think(HELD)
        .timeout(4 * HELD);
    let running = lab.pod("client")?.start_traffic(&options)?;
    wait::until_true("all of them to be open", 2 * HELD, || {
        Ok(server.report()?.open == 1000)
    })?;
    let report = running.finish(4 * HELD)?;
    assert_eq!((report.ok, report.failed), (1000, 0), "{report:?}");
    assert_eq!(server.report()?.accepted, 1000);
    witness.expect(1000, 0)?;
    Ok(())
}

#[test]
fn a_slow_reader_holds_its_sender_back_and_nobody_else() -> Result<()> {
    let lab = pods().start()?;
    let (client, far) = (lab.pod("client")?, lab.pod("far")?);
    let server = far.serve(serve())?;
    let resident = || -> Result<Vec<u64>> {
        let sides = Side::ALL.iter();
        sides
            .map(|&side| lab.node(side)?.agent().resident_bytes())
            .collect()
    };
    // Something flows first, so that what a tunnel needs anyway is there before memory is measured.
    let warm = ClientOptions::exchange(far.v4(EXCHANGE), 64 * MIB, 64 * MIB);
    assert_eq!(client.traffic(&warm)?.ok, 1);
    let before = resident()?;
    let sent_before = server.report()?.bytes_sent;

    let slow = ClientOptions::exchange(far.v4(EXCHANGE), 0, GIB)
        .connections(8)
        .concurrency(8)
        .read_rate(10_000)
        .timeout(Duration::from_secs(3600));
    let running = client.start_traffic(&slow)?;
    // Until what there is of buffers is full.
    let mut last = 0;
    wait::until_true(
        "the senders to be held back",
        Duration::from_secs(30),
        || {
            std::thread::sleep(Duration::from_secs(1));
            let now = server.report()?.bytes_sent - sent_before;
            let full = now > 0 && now - last < MIB;
            last = now;
            Ok(full)
        },
    )?;
    // 8 streams: windows of the tunnel and of TCP on every hop, not the gigabytes that were offered.
    assert!(
        last < 8 * 24 * MIB,
        "{last} bytes were sent ahead of the readers"
    );
    for (before, now) in before.iter().zip(resident()?) {
        assert!(
            now < before + 96 * MIB,
            "an agent grew from {before} to {now}"
        );
    }

    // Neighbours, in the same tunnel, are served all the same.
    let witness = Witness::start(&lab)?;
    let quick = ClientOptions::echo(lab.service("far", 80)?)
        .connections(50)
        .concurrency(5)
        .bytes(100_000);
    let report = client.traffic(&quick)?;
    assert_eq!((report.ok, report.failed), (50, 0), "{report:?}");
    witness.expect(50, 0)?;
    drop(running);
    Ok(())
}

#[test]
fn the_death_of_a_server_ends_its_connections_and_is_no_success() -> Result<()> {
    let lab = pods().start()?;
    let client = lab.pod("client")?;
    for name in ["near", "far"] {
        let pod = lab.pod(name)?;
        let server = pod.serve(serve())?;
        // More than will have been sent when the server dies.
        let options = ClientOptions::exchange(pod.v4(EXCHANGE), 0, 1 << 40)
            .connections(4)
            .concurrency(4)
            .timeout(Duration::from_secs(60));
        let running = client.start_traffic(&options)?;
        wait::until_true("bytes to flow", Duration::from_secs(10), || {
            Ok(running.report()?.bytes_received > 10 * MIB)
        })?;
        // Its kernel ends them in order or with a reset, as it would without a mesh.
        drop(server);
        let report = running.finish(Duration::from_secs(30))?;
        let ended = report.failed_by(Failure::Reset) + report.failed_by(Failure::Truncated);
        assert_eq!((report.ok, ended), (0, 4), "{name}: {report:?}");
    }
    Ok(())
}
