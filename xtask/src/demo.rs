//! `cargo xtask demo`: real programs in pods of two nodes, one agent per node, and what each side counted.

mod clients;
mod requests;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Map, Value, json};
use undermesh_lab::figures::Figures;
use undermesh_lab::traffic::{ClientOptions, Latency, ServeOptions};
use undermesh_lab::wire::Packets;
use undermesh_lab::{Agent, Lab, Side, interrupt, machine, random_hex, wait};

use self::clients::{Clients, Opened};
use crate::cluster::{self, Servers};
use crate::programs;
use crate::report::{self, Checks};

#[derive(Args)]
pub struct Options {
    /// How long the clients run, in seconds.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Where to write the figures, in JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

const SETTLE: Duration = Duration::from_secs(20);
const CONTROL_PORT: u16 = 7009;

pub fn run(options: &Options) -> Result<ExitCode> {
    machine::require_root()?;
    let start = Instant::now();
    let outcome = shown(Duration::from_secs(options.seconds));
    let (checks, body) = match outcome {
        Ok(Shown { checks, body }) => (checks, body),
        Err(error) => {
            let mut checks = Checks::default();
            checks.equal("ran to its end", format!("{error:#}"), "yes".to_owned());
            (checks, Map::new())
        }
    };
    println!("\n{}", if checks.passed() { "passed" } else { "FAILED" });
    checks.print();
    if let Some(file) = &options.json {
        report::write(file, &report::envelope("demo", start, &checks, body))?;
    }
    Ok(if checks.passed() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Leaves nothing behind, whatever happens in between.
fn shown(duration: Duration) -> Result<Shown> {
    let binaries = programs::build()?;
    println!("building two nodes");
    let lab = cluster::builder()
        .id(&format!("demo-{}", std::process::id()))
        .binaries(binaries.clone())
        .without_agents()
        .start()?;
    let outcome = demonstrate(&lab, duration);
    if outcome.is_err() && !interrupt::interrupted() {
        print_logs(&lab);
    }
    drop(lab);
    let mut shown = outcome?;
    let requests = requests::show(&binaries, &mut shown.checks)?;
    shown.body.insert("requests".to_owned(), requests);
    Ok(shown)
}

struct Shown {
    checks: Checks,
    body: Map<String, Value>,
}

/// What everybody counted, once all is over.
struct Counted {
    opened: Opened,
    accepted: u64,
    agents: Figures,
    wire: Packets,
    rss: Vec<u64>,
    latency: Latency,
}

fn demonstrate(lab: &Lab, duration: Duration) -> Result<Shown> {
    let marker = format!("marker-{}", random_hex(12)?);
    let control_marker = format!("control-{}", random_hex(12)?);
    let servers = Servers::start(lab, &marker)?;
    // How many connections one run of redis-benchmark opens it does not say; the server does, without a mesh.
    let per_benchmark = clients::calibrate(lab, &servers, &control_marker)?;
    println!("starting the CA and an agent on each node");
    lab.start_mesh()?;
    for side in Side::ALL {
        let state = lab.state();
        let agent = lab.node(side)?.agent();
        println!(
            "{}: admin endpoint http://{} in {}, metrics http://{}",
            side.node(),
            Agent::admin_address(),
            state.node(side.node())?.netns.display(),
            agent.metrics_address()
        );
    }

    let capture = lab.node(Side::A)?.capture("wire")?;
    let before = Figures::read(lab)?;
    let accepted_before = servers.accepted()?;
    let clients = Clients::start(lab, &marker, per_benchmark, duration)?;
    watch(lab, &clients, &before, duration)?;
    let opened = clients.finish()?;
    let control = control_connection(lab, &control_marker)?;

    // Counters follow the last byte by a moment: wait for what must come, but not for ever.
    let expected = opened.opened;
    let settled = wait::until_true("the agents' counters", SETTLE, || {
        let now = Figures::read(lab)?.since(&before);
        Ok(now.outbound >= expected && servers.accepted()? - accepted_before >= expected)
    });
    interrupt::check()?;
    if let Err(error) = settled {
        println!("{error:#}");
    }
    let counted = Counted {
        accepted: servers.accepted()? - accepted_before,
        agents: Figures::read(lab)?.since(&before),
        rss: Side::ALL
            .iter()
            .map(|&side| lab.node(side)?.agent().resident_bytes())
            .collect::<Result<_>>()?,
        wire: capture.stop(&[&marker, &control_marker])?,
        latency: opened.latency,
        opened,
    };
    Ok(counted.judge(lab, control))
}

/// One line a second.
fn watch(lab: &Lab, clients: &Clients, before: &Figures, duration: Duration) -> Result<()> {
    let start = Instant::now();
    println!(
        "\n{:>4} {:>8} {:>7} | {:>9} {:>8} {:>6} {:>9} | {:>10}",
        "s", "opened", "failed", "outbound", "inbound", "mTLS", "same node", "MiB moved"
    );
    while start.elapsed() < duration {
        wait::pause(Duration::from_secs(1).min(duration.saturating_sub(start.elapsed())))?;
        let seen = clients.so_far()?;
        let agents = Figures::read(lab)?.since(before);
        println!(
            "{:>4} {:>8} {:>7} | {:>9} {:>8} {:>6} {:>9} | {:>10.1}",
            start.elapsed().as_secs(),
            seen.opened,
            seen.failed,
            agents.outbound,
            agents.inbound,
            agents.mutual_tls,
            agents.same_node,
            mebibytes(seen.bytes),
        );
    }
    Ok(())
}

#[allow(clippy::cast_precision_loss)]
fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// The same programs over the same wire, between pods that are not in the mesh: the capture must show these.
/// Gives back whether the connection did what it should.
fn control_connection(lab: &Lab, marker: &str) -> Result<bool> {
    let (from, to) = (lab.pod("outsider-a")?, lab.pod("outsider-b")?);
    let _serving = to.serve(ServeOptions::new().echo(CONTROL_PORT))?;
    let options = ClientOptions::echo(to.v4(CONTROL_PORT))
        .bytes(4096)
        .marker(marker);
    Ok(from.traffic(&options)?.ok == 1)
}

impl Counted {
    fn judge(self, lab: &Lab, control: bool) -> Shown {
        let state = lab.state();
        let Self {
            opened,
            accepted,
            agents,
            wire,
            rss,
            latency,
        } = self;
        let mut checks = Checks::default();
        checks.equal("failed", opened.failed, 0);
        checks.more_than("client_opened", opened.opened, 0);
        checks.equal("agent_outbound", agents.outbound, opened.opened);
        checks.equal("server_accepted", accepted, opened.opened);
        checks.more_than("mutual_tls_connections", agents.mutual_tls, 0);
        checks.more_than("same_node_connections", agents.same_node, 0);
        checks.equal(
            "mutual_tls + same_node",
            agents.mutual_tls + agents.same_node,
            opened.opened,
        );
        // The other side of every connection that came over the wire.
        checks.equal(
            "inbound with mutual_tls",
            agents.inbound_mutual_tls,
            agents.mutual_tls,
        );
        checks.equal("wire.marker_hits", wire.marker_hits[0], 0);
        checks.equal("control connection", control, true);
        checks.more_than("wire.control_marker_hits", wire.marker_hits[1], 0);
        checks.equal("packets lost by the capture", wire.dropped, 0);
        let nodes: Vec<&str> = state.nodes.iter().map(|node| node.name.as_str()).collect();
        let meshed = state.pods.iter().filter(|pod| pod.meshed());
        let pods: Vec<Value> = meshed
            .map(|pod| json!({"name": pod.name, "node": pod.node, "identity": pod.identity(&state.trust_domain)}))
            .collect();
        let body = json!({
            "nodes": nodes,
            "pods": pods,
            "connections": {
                "client_opened": opened.opened,
                "agent_outbound": agents.outbound,
                "agent_inbound": agents.inbound,
                "server_accepted": accepted,
                "failed": opened.failed,
                "by_program": opened.by_program,
                "failures": opened.examples,
            },
            "mutual_tls_connections": agents.mutual_tls,
            "same_node_connections": agents.same_node,
            "wire": {
                "packets": wire.packets,
                "marker_hits": wire.marker_hits[0],
                "control_marker_hits": wire.marker_hits[1],
            },
            "bytes": opened.bytes,
            "latency_ms": {
                "operation": "echo of 1 KiB on an open connection through the mesh",
                "p50": latency.p50,
                "p99": latency.p99,
                "samples": latency.samples,
            },
            "agent_rss_bytes": rss,
        });
        let body = match body {
            Value::Object(body) => body,
            _ => Map::new(),
        };
        Shown { checks, body }
    }
}

/// Why it did not work is in the logs, which go away with the lab.
fn print_logs(lab: &Lab) {
    for side in Side::ALL {
        if let Ok(node) = lab.node(side).context("node") {
            let log = node.agent().log();
            println!("== {}", log.display());
            println!("{}", undermesh_lab::process::tail(&log, 20));
        }
    }
}
