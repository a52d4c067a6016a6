//! The load program of the bench, on pods without a mesh.

use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use undermesh_lab::load::{LoadKind, LoadOptions, LoadReport, SinkOptions};
use undermesh_lab::{Lab, PodSpec, Side, wait};

const PORT: u16 = 7000;
const LIMIT: Duration = Duration::from_secs(10);

#[test]
fn every_kind_of_load_is_carried_and_counted() -> Result<()> {
    let lab = Lab::builder()
        .pod(PodSpec::new("client").on(Side::A).outside())
        .pod(PodSpec::new("server").on(Side::B).outside())
        .without_agents()
        .start()?;
    let program = lab.state().binaries.load.display().to_string();
    let (client, server) = (lab.pod("client")?, lab.pod("server")?);
    let control = server.record().dir.join("load.sock");
    let options = SinkOptions {
        port: vec![PORT],
        cpu: None,
        control: control.clone(),
    };
    let serving = server.spawn("load", &program, &options.to_args())?;
    wait::until_true("the server to start", LIMIT, || Ok(control.exists()))?;

    let run = |kind, rate| -> Result<LoadReport> {
        let options = LoadOptions {
            connections: 4,
            rate,
            warm_up: Duration::from_millis(100),
            window: Duration::from_millis(300),
            watch: vec![serving.pid()],
            server: Some(control.clone()),
            ..LoadOptions::new(kind, vec![server.v4(PORT)])
        };
        let output = client.run(&program, &options.to_args())?;
        serde_json::from_str(output.trim()).context(output)
    };
    let bulk = run(LoadKind::Bulk, None)?;
    assert!(bulk.bytes > 1 << 20 && bulk.errors == 0, "{bulk:?}");
    assert!(bulk.watched_cpu_seconds > 0.0, "{bulk:?}");
    for kind in [LoadKind::PingPong, LoadKind::Connect, LoadKind::Http] {
        let report = run(kind, None)?;
        assert!(
            report.operations > 10 && report.errors == 0,
            "{kind:?} {report:?}"
        );
        assert_eq!(report.latency.samples, report.operations);
        assert!(report.latency.p50 > 1.0, "{report:?}");
    }
    // As many as were due in the window, neither more nor fewer.
    let paced = run(LoadKind::Http, Some(500))?;
    #[allow(clippy::cast_precision_loss)]
    let missing = 500.0 * paced.seconds - paced.operations as f64;
    assert!(missing.abs() < 2.0 && paced.errors == 0, "{paced:?}");

    let options = LoadOptions {
        connections: 100,
        ..LoadOptions::new(LoadKind::Hold, vec![server.v4(PORT)])
    };
    let mut holder = client.spawn("hold", &program, &options.to_args())?;
    holder.until("connections to be open", LIMIT, |holder| {
        Ok(holder.output().contains("\"operations\":100"))
    })?;
    assert!(holder.stop(Signal::SIGTERM, LIMIT)?.success());
    Ok(())
}
