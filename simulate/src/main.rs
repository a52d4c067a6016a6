//! Runs the scenarios under each policy, prints the table, writes JSON and pictures.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Parser;
use serde_json::{Value, json};
use undermesh_simulation::policy::{
    envoy::Envoy, linkerd::Linkerd, none::Plain, undermesh::Mechanism, undermesh::Undermesh,
};
use undermesh_simulation::report::{Row, Trace};
use undermesh_simulation::scenario::{self, Scenario};
use undermesh_simulation::svg;
use undermesh_simulation::world::World;

/// Simulates failures under Undermesh's resilience and under the published defaults of others.
#[derive(Debug, Parser)]
struct Arguments {
    /// Only this scenario.
    #[arg(long)]
    scenario: Option<String>,
    /// Writes the results here.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Draws timelines into this folder.
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Leaves mechanisms out.
    #[arg(long, value_enum)]
    without: Vec<Mechanism>,
    /// Also runs Undermesh with each mechanism left out in turn.
    #[arg(long)]
    ablation: bool,
    /// The same seed gives the same run.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

const POLICIES: [&str; 4] = ["undermesh", "envoy", "linkerd", "none"];
/// More attempts than this per request fail the run.
const AMPLIFICATION_MAX: f64 = 1.2;

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let started = Instant::now();
    let mut scenarios = scenario::all();
    if let Some(name) = &arguments.scenario {
        let names: Vec<&str> = scenarios.iter().map(|scenario| scenario.name).collect();
        let known = names.join(", ");
        scenarios.retain(|scenario| scenario.name == name);
        if scenarios.is_empty() {
            bail!("no scenario is named {name}; there are {known}");
        }
    }
    let (mut rows, mut ablations) = (Vec::new(), Vec::new());
    println!(
        "{:<20} {:<22} {:>8} {:>8} {:>7} {:>9} {:>10} {:>6}",
        "scenario", "policy", "sent", "lost", "amplif.", "p99 ms", "recover ms", "false"
    );
    for scenario in &scenarios {
        let runs: Vec<(String, Trace)> = run_all(scenario, &arguments);
        if let Some(folder) = &arguments.svg {
            let path = folder.join(format!("{}.svg", scenario.name));
            std::fs::create_dir_all(folder)
                .with_context(|| format!("make {}", folder.display()))?;
            std::fs::write(&path, svg::draw(scenario, &runs))
                .with_context(|| format!("write {}", path.display()))?;
        }
        for (policy, trace) in runs {
            rows.push(print(trace.row(scenario, &policy)));
        }
        if arguments.ablation {
            for mechanism in Mechanism::ALL {
                let trace = undermesh(scenario, &[mechanism], arguments.seed);
                let label = format!("undermesh-no-{}", format!("{mechanism:?}").to_lowercase());
                ablations.push(print(trace.row(scenario, &label)));
            }
        }
    }
    let checks = checks(&scenarios, &rows);
    let passed = checks.iter().all(|check| check["passed"] == true);
    for check in checks.iter().filter(|check| check["passed"] != true) {
        println!(
            "not reached: {} is {}, should be {}",
            check["name"], check["observed"], check["expected"]
        );
    }
    if let Some(path) = &arguments.json {
        let report = json!({
            "schema": 1,
            "command": "simulate",
            "commit": output("git", &["rev-parse", "HEAD"]),
            "kernel": output("uname", &["-r"]),
            "cpus": std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            "seconds": started.elapsed().as_secs_f64(),
            "passed": passed,
            "checks": checks,
            "scenarios": rows,
            "ablations": ablations,
        });
        std::fs::write(path, format!("{report:#}\n"))
            .with_context(|| format!("write {}", path.display()))?;
    }
    if !passed {
        bail!("not every figure is what it should be");
    }
    Ok(())
}

/// The four policies of a scenario, two at a time.
fn run_all(scenario: &Scenario, arguments: &Arguments) -> Vec<(String, Trace)> {
    let seed = arguments.seed;
    std::thread::scope(|scope| {
        let halves = [
            scope.spawn(move || {
                vec![
                    undermesh(scenario, &arguments.without, seed),
                    World::run(scenario, |_| Envoy::default(), seed),
                ]
            }),
            scope.spawn(move || {
                vec![
                    World::run(scenario, |_| Linkerd::default(), seed),
                    World::run(scenario, |_| Plain::default(), seed),
                ]
            }),
        ];
        let traces = halves
            .into_iter()
            .flat_map(|half| half.join().unwrap_or_default());
        POLICIES
            .iter()
            .map(ToString::to_string)
            .zip(traces)
            .collect()
    })
}

fn undermesh(scenario: &Scenario, without: &[Mechanism], seed: u64) -> Trace {
    World::run(
        scenario,
        |node| Undermesh::new(u64::from(node), without),
        seed,
    )
}

fn print(row: Row) -> Row {
    let recover = row
        .recover_ms
        .map_or_else(|| "never".to_owned(), |ms| ms.to_string());
    println!(
        "{:<20} {:<22} {:>8} {:>8} {:>7.3} {:>9.1} {recover:>10} {:>6}",
        row.name,
        row.policy,
        row.sent,
        row.lost,
        row.amplification,
        row.p99_ms,
        row.false_ejections
    );
    row
}

fn checks(scenarios: &[Scenario], rows: &[Row]) -> Vec<Value> {
    let mut checks = Vec::new();
    for scenario in scenarios {
        let of = |policy: &str| {
            rows.iter()
                .find(|row| row.name == scenario.name && row.policy == policy)
        };
        let (Some(own), Some(envoy), Some(linkerd)) = (of("undermesh"), of("envoy"), of("linkerd"))
        else {
            continue;
        };
        let best = envoy.lost.min(linkerd.lost);
        checks.push(json!({
            "name": format!("{}: lost requests against the better baseline", scenario.name),
            "passed": own.lost <= best,
            "observed": own.lost,
            "expected": format!("at most {best}"),
        }));
        checks.push(json!({
            "name": format!("{}: amplification", scenario.name),
            "passed": own.amplification <= AMPLIFICATION_MAX,
            "observed": own.amplification,
            "expected": format!("at most {AMPLIFICATION_MAX}"),
        }));
    }
    checks
}

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = std::process::Command::new(program)
        .args(arguments)
        .output()
        .ok()?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
