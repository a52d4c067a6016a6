//! `cargo xtask scenario restart`: the agent of the clients' node ends, or is taken over, while pods open
//! connections as fast as they can and streams are in the middle.
//!
//! A connection went past the agent if its server on the same node sees the client's own port, or if its first
//! line can be read on the wire between the nodes. Nothing here is the word of an agent.

use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use nix::sys::signal::Signal;
use serde_json::{Map, Value, json};
use undermesh_lab::process::Process;
use undermesh_lab::traffic::ServerReport;
use undermesh_lab::traffic::{ClientOptions, ClientReport, Failure, Kind, ServeOptions};
use undermesh_lab::{Lab, PodSpec, ServiceSpec, Side, Traffic, random_hex, wait};

use super::Shown;
use crate::programs;
use crate::report::Checks;

#[derive(Args)]
pub struct Options {
    /// Mode of the pods.
    #[arg(long, value_enum, default_value_t = Mode::Strict)]
    mode: Mode,
    /// How the agent ends.
    #[arg(long, value_enum, ignore_case = true, default_value_t = End::Kill)]
    signal: End,
    /// A successor takes over instead; no signal is sent.
    #[arg(long)]
    take_over: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    Strict,
    Permissive,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum End {
    Kill,
    Term,
}

const ORIGIN: u16 = 7000;
const ECHO: u16 = 7001;
const EXCHANGE: u16 = 7002;
const TRUNCATE: u16 = 7003;
/// Before and after what is done to the agent.
const CALM: Duration = Duration::from_secs(2);
/// How long no agent runs.
const DOWN: Duration = Duration::from_secs(1);
/// Streams of each kind to each server.
const STREAMS: u64 = 10;
/// Between two round trips of a stream, which is always in the middle of one or between two.
const THINK: Duration = Duration::from_millis(20);
/// Longest time for a new connection, far beyond the kernel's first retransmissions.
const PATIENCE: Duration = Duration::from_secs(15);
const FINISH: Duration = Duration::from_secs(60);
const CONTROLS: u64 = 10;

pub fn run(options: &Options) -> Result<Shown> {
    let binaries = programs::build()?;
    println!("building two nodes");
    let pod = |name: &str, side: Side| match options.mode {
        Mode::Strict => PodSpec::new(name).on(side).strict(),
        Mode::Permissive => PodSpec::new(name).on(side).permissive(),
    };
    let control = |name: &str, side: Side| PodSpec::new(name).on(side).permissive();
    let service = |name: &str| {
        ServiceSpec::new(name)
            .port(80, ORIGIN)
            .port(81, ECHO)
            .port(82, EXCHANGE)
    };
    let lab = Lab::builder()
        .id(&format!("restart-{}", std::process::id()))
        .binaries(binaries)
        .pod(pod("client", Side::A))
        .pod(pod("near", Side::A))
        .pod(pod("far", Side::B))
        .pod(control("control-client", Side::A))
        .pod(control("control-near", Side::A))
        .pod(control("control-far", Side::B))
        .service(service("near"))
        .service(service("far"))
        .start()?;
    let marker = format!("storm-{}", random_hex(8)?);
    let control_marker = format!("control-{}", random_hex(8)?);
    let servers = ["near", "far", "control-near", "control-far"]
        .map(|name| serve(&lab, name))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;

    let wire = lab.node(Side::A)?.capture("wire")?;
    let streams = Streams::start(&lab, options)?;
    let storm = ClientOptions::new(Kind::Origin, lab.service("near", 80)?)
        .and_to(lab.service("far", 80)?)
        .during(Duration::from_secs(3600))
        .concurrency(8)
        .pause(Duration::from_millis(2))
        .timeout(PATIENCE)
        .marker(&marker);
    println!("a storm of connections, and {} streams", streams.opened()?);
    let storm = lab.pod("client")?.start_traffic(&storm)?;
    wait::pause(CALM)?;
    let old = act(&lab, options)?;
    wait::pause(CALM)?;
    let storm = storm.stop(FINISH)?;
    let existing = streams.finish(&servers)?;
    if let Some(mut old) = old {
        let ended = old.wait(FINISH)?;
        println!("the old agent has drained: {ended}");
    }
    let counted = Counted::read(&lab)?;
    let controls = Controls::run(&lab, &control_marker)?;
    let wire = wire.stop(&[&marker, &control_marker])?;
    let near = servers[0].report()?;
    let far_direct = wire.marker_hits[0];
    let new = New {
        direct: near.direct + far_direct,
        proxied: storm.proxied.saturating_sub(far_direct),
        refused: storm.failed_by(Failure::Refused),
        reset: storm.failed_by(Failure::Reset),
        lost: storm.failed
            - storm.failed_by(Failure::Refused)
            - storm.failed_by(Failure::Reset)
            - storm.failed_by(Failure::Truncated),
        truncated: storm.failed_by(Failure::Truncated),
    };
    Ok(judge(
        options,
        &storm,
        &new,
        &existing,
        &counted,
        (&controls, wire.marker_hits[1]),
    ))
}

/// What the kernel programs of the clients' node counted, as the agent that follows shows it. It may be more
/// than the clients saw: a SYN comes again, and a connection that was let past may be reset by the dying
/// listener of the pod that it goes to.
struct Counted {
    refused: u64,
    passed: u64,
}

impl Counted {
    fn read(lab: &Lab) -> Result<Self> {
        let kernel = lab.node(Side::A)?.agent().admin("/kernel")?;
        let count = |verdict: &str| {
            let count = kernel["verdicts"][verdict].as_u64();
            count.with_context(|| format!("/kernel has no {verdict}"))
        };
        Ok(Self {
            refused: count("connect_agent_gone_refused")? + count("lookup_no_listener_refused")?,
            passed: count("connect_agent_gone_passed")?,
        })
    }
}

fn serve(lab: &Lab, pod: &str) -> Result<Traffic<ServerReport>> {
    let options = ServeOptions::new()
        .origin(ORIGIN)
        .echo(ECHO)
        .exchange(EXCHANGE)
        .truncate(TRUNCATE);
    lab.pod(pod)?.serve(options)
}

/// Gives back the agent that drains.
fn act(lab: &Lab, options: &Options) -> Result<Option<Process>> {
    if options.take_over {
        println!("a successor takes over on {}", Side::A.node());
        let old = lab.take_over(Side::A)?;
        // It drains; the storm goes on beside it.
        wait::pause(CALM)?;
        return Ok(Some(old));
    }
    let signal = match options.signal {
        End::Kill => Signal::SIGKILL,
        End::Term => Signal::SIGTERM,
    };
    println!("{signal} to the agent of {}", Side::A.node());
    lab.end_agent(Side::A, signal)?;
    wait::pause(DOWN)?;
    println!("starting it again");
    lab.start_agent(Side::A)?;
    Ok(None)
}

/// What became of the storm.
struct New {
    direct: u64,
    proxied: u64,
    refused: u64,
    /// In flight when the agent ended.
    reset: u64,
    lost: u64,
    truncated: u64,
}

/// Streams that are open when the agent ends.
struct Streams(Vec<Traffic<ClientReport>>);

#[derive(Default)]
struct Existing {
    opened: u64,
    completed: u64,
    reset: u64,
    /// As clients and servers saw it.
    truncated: u64,
    other: u64,
}

impl Streams {
    fn start(lab: &Lab, options: &Options) -> Result<Self> {
        // Those that a successor leaves to the old agent may end; others are cut in the middle.
        let requests = if options.take_over { 400 } else { 6_000 };
        let client = lab.pod("client")?;
        let mut running = Vec::new();
        for name in ["near", "far"] {
            let echo = ClientOptions::echo(lab.service(name, 81)?)
                .requests(requests)
                .think(THINK);
            let rate = 50_000;
            // More than all buffers on the way hold: a server that has sent everything has ended in order.
            let answer = if options.take_over { 400_000 } else { 1 << 40 };
            let exchange =
                ClientOptions::exchange(lab.service(name, 82)?, 0, answer).read_rate(rate);
            for options in [echo, exchange] {
                let options = options
                    .connections(STREAMS)
                    .concurrency(STREAMS)
                    .timeout(Duration::from_secs(300));
                running.push(client.start_traffic(&options)?);
            }
        }
        let streams = Self(running);
        wait::until_true("the streams to flow", PATIENCE, || {
            let mut flow = streams.0.iter().map(Traffic::report);
            flow.try_fold(true, |all, report| {
                let report = report?;
                Ok(all && report.opened == STREAMS && report.bytes_received > STREAMS * 2_000)
            })
        })?;
        Ok(streams)
    }

    fn opened(&self) -> Result<u64> {
        let mut reports = self.0.iter().map(Traffic::report);
        reports.try_fold(0, |sum, report| Ok(sum + report?.opened))
    }

    fn finish(self, servers: &[Traffic<ServerReport>]) -> Result<Existing> {
        let mut seen = Existing::default();
        for running in self.0 {
            let report = running.finish(FINISH).context("streams")?;
            seen.opened += report.opened;
            seen.completed += report.ok;
            seen.reset += report.failed_by(Failure::Reset);
            seen.truncated += report.failed_by(Failure::Truncated);
            seen.other += report.failed
                - report.failed_by(Failure::Reset)
                - report.failed_by(Failure::Truncated);
        }
        // An end in order that no client meant. A connection of the storm whose first line never came was cut
        // too: its server must not see an end either.
        let mut ended = 0;
        for server in servers {
            let report = wait::until("the servers' streams to end", PATIENCE, || {
                let report = server.report()?;
                Ok((report.open == 0).then_some(report))
            })?;
            seen.truncated += report
                .failures
                .get(&Failure::Truncated)
                .copied()
                .unwrap_or(0);
            ended += report.completed - report.direct.min(report.completed);
            ended -= report.proxied.min(ended);
        }
        seen.truncated += ended.saturating_sub(seen.completed);
        Ok(seen)
    }
}

/// The detectors, shown to detect: no agent on the clients' node, and a server that truncates.
struct Controls {
    direct_near: u64,
    ok_far: u64,
    truncated: u64,
}

impl Controls {
    fn run(lab: &Lab, marker: &str) -> Result<Self> {
        lab.end_agent(Side::A, Signal::SIGKILL)?;
        let client = lab.pod("control-client")?;
        let origin = |to| {
            ClientOptions::new(Kind::Origin, to)
                .connections(CONTROLS)
                .marker(marker)
        };
        let near = client.traffic(&origin(lab.pod("control-near")?.v4(ORIGIN)))?;
        let far = client.traffic(&origin(lab.pod("control-far")?.v4(ORIGIN)))?;
        let cut = ClientOptions::exchange(lab.pod("control-near")?.v4(TRUNCATE), 0, 100_000)
            .connections(CONTROLS);
        let cut = client.traffic(&cut)?;
        Ok(Self {
            direct_near: near.direct,
            ok_far: far.ok,
            truncated: cut.failed_by(Failure::Truncated),
        })
    }
}

fn judge(
    options: &Options,
    storm: &ClientReport,
    new: &New,
    existing: &Existing,
    counted: &Counted,
    (controls, control_wire): (&Controls, u64),
) -> Shown {
    let truncated = existing.truncated + new.truncated;
    let mut checks = Checks::default();
    checks.more_than("new.proxied", new.proxied, 0);
    checks.equal("new.lost", new.lost, 0);
    checks.equal("existing.truncated_with_fin", truncated, 0);
    checks.equal("existing streams ended otherwise", existing.other, 0);
    if options.take_over {
        checks.equal("new.refused", new.refused, 0);
        checks.equal("new.direct", new.direct, 0);
        checks.equal("new connections reset", new.reset, 0);
        checks.equal("existing.completed", existing.completed, existing.opened);
    } else {
        match options.mode {
            Mode::Strict => {
                checks.equal("new.direct", new.direct, 0);
                checks.more_than("new.refused", new.refused, 0);
            }
            Mode::Permissive => {
                checks.more_than("new.direct", new.direct, 0);
                checks.equal("new.refused", new.refused, 0);
            }
        }
        checks.more_than("existing.reset", existing.reset, 0);
    }
    let uncounted = new.refused.saturating_sub(counted.refused);
    checks.equal("refused, and not counted by the kernel", uncounted, 0);
    let uncounted = new.direct.saturating_sub(counted.passed);
    checks.equal("direct, and not counted by the kernel", uncounted, 0);
    checks.equal("control: direct, same node", controls.direct_near, CONTROLS);
    checks.equal("control: served, other node", controls.ok_far, CONTROLS);
    checks.more_than("control: readable on the wire", control_wire, CONTROLS - 1);
    checks.equal("control: truncated", controls.truncated, CONTROLS);
    let body = json!({
        "mode": match options.mode { Mode::Strict => "strict", Mode::Permissive => "permissive" },
        "signal": match (options.take_over, options.signal) {
            (true, _) => Value::Null,
            (false, End::Kill) => json!("KILL"),
            (false, End::Term) => json!("TERM"),
        },
        "take_over": options.take_over,
        "new": {
            "proxied": new.proxied, "direct": new.direct, "refused": new.refused, "lost": new.lost,
        },
        "existing": {
            "completed": existing.completed,
            "reset": existing.reset + new.reset,
            "truncated_with_fin": truncated,
        },
        "gap_ms": storm.longest_gap_ms,
        "attempted": storm.attempted,
        "storm_reset": new.reset,
        "streams": existing.opened,
        "failures": storm.examples,
        "counted": {"refused": counted.refused, "passed": counted.passed},
        "control": {
            "direct_same_node": controls.direct_near,
            "readable_on_the_wire": control_wire,
            "truncated": controls.truncated,
        },
    });
    println!("{body:#}");
    let body = match body {
        Value::Object(body) => body,
        _ => Map::new(),
    };
    (checks, body)
}
