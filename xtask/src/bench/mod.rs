//! `cargo xtask bench`: what Undermesh costs, beside no proxy and beside Envoy.

// The same pictures as the simulation's, without all that it is built of.
#[path = "../../../simulate/src/canvas.rs"]
mod canvas;
mod capture;
mod instructions;
mod lines;
mod memory;
mod plots;
mod ratios;
mod rows;
mod settings;
mod stage;
mod targets;
mod written;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use clap::Args;
use serde_json::{Map, Value, json};
use undermesh_lab::envoy::Envoy;
use undermesh_lab::{Binaries, interrupt, machine};

use self::lines::{Lines, main_figure};
use self::ratios::Ratio;
use self::rows::{CAPTURE, Layer, MEMORY, Proxy, ROWS, Row};
use self::settings::Settings;
use self::stage::Stage;
use crate::report::{self, Checks};
use crate::{build, programs};

#[derive(Args)]
pub struct Options {
    /// One repetition of 2 s, and fewer idle connections: a glance, not a measurement.
    #[arg(long)]
    quick: bool,
    /// Only these loads: ids, or what they start with.
    #[arg(long, value_name = "ID", num_args = 1.., value_delimiter = ',')]
    only: Vec<String>,
    /// Only these proxies.
    #[arg(long, value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    proxy: Vec<String>,
    /// Measures, in turn with all others, the agent of another build: the folder of its programs.
    #[arg(long, value_name = "DIR")]
    former: Option<PathBuf>,
    /// Repetitions of each load.
    #[arg(long, value_name = "N")]
    repetitions: Option<usize>,
    /// Where to write the figures, in JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write docs/performance.md and its plots.
    #[arg(long)]
    report: bool,
    /// Nothing of all that: counts the instructions of what runs for every connection, and compares
    /// them with those that are kept.
    #[arg(long)]
    instructions: bool,
    /// Keeps them from now on.
    #[arg(long, requires = "instructions")]
    renew: bool,
}

impl Options {
    fn chosen(&self, id: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|start| id.starts_with(start.as_str()))
    }

    fn takes(&self, proxy: Proxy) -> bool {
        let name = proxy.name();
        self.proxy.is_empty() || self.proxy.iter().any(|one| name.starts_with(one.as_str()))
    }

    fn repetitions(&self) -> usize {
        let usual = if self.quick { 1 } else { 5 };
        self.repetitions.unwrap_or(usual).max(1)
    }

    fn window(&self) -> Duration {
        Duration::from_secs(if self.quick { 2 } else { 5 })
    }
}

/// The programs that are compared.
pub struct Builds {
    current: Binaries,
    former: Option<Binaries>,
    envoy: Result<Envoy, String>,
}

impl Builds {
    /// Who can be measured at all.
    fn has(&self, proxy: Proxy) -> bool {
        proxy != Proxy::Former || self.former.is_some()
    }

    fn stage(&self, proxy: Proxy, tag: &str) -> Result<Stage> {
        let envoy = match (proxy.envoy(), &self.envoy) {
            (None, _) => None,
            (Some(_), Ok(envoy)) => Some(envoy),
            (Some(_), Err(reason)) => bail!("{reason}"),
        };
        let binaries = match (proxy, &self.former) {
            (Proxy::Former, Some(former)) => former,
            _ => &self.current,
        };
        Stage::build(proxy, binaries, envoy, tag)
    }
}

/// What was measured with.
pub struct Versions {
    pub envoy: String,
    pub cpu: String,
    pub rustc: String,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    if options.instructions {
        return instructions::run(options.renew);
    }
    machine::require_root()?;
    ensure!(
        machine::cpus() >= 2,
        "client and server need a processor each"
    );
    let start = Instant::now();
    let binaries = programs::build_dist()?;
    let _settings = Settings::take()?;
    let envoy = Envoy::find_or_install(&build::workspace().join("target/envoy"));
    let envoy = envoy.map_err(|error| format!("{error:#}"));
    let mut lines = Lines::default();
    let builds = Builds {
        current: binaries,
        former: options.former.as_deref().map(Binaries::in_dir),
        envoy,
    };
    // What waits does so while something else is measured.
    let at_rest = options
        .chosen(MEMORY)
        .then(|| memory::start(&mut lines, &builds, |proxy| options.takes(proxy)))
        .transpose()?;
    measure(options, &mut lines, &builds)?;
    let mut closed = None;
    if let Some(at_rest) = at_rest {
        println!("{MEMORY}: idle connections, cross-node");
        let extent = memory::Extent::of(options.quick);
        closed = Some(memory::hold(&mut lines, at_rest, extent)?);
    }
    if options.chosen(CAPTURE.id) {
        println!("{}: {}", CAPTURE.id, CAPTURE.about);
        capture::run(&mut lines, &builds, options.quick, |proxy| {
            options.takes(proxy)
        })?;
    }
    if let Some(closed) = closed {
        memory::given_back(&mut lines, closed)?;
    }
    let ratios = ratios::compare(&lines, |row| options.chosen(row));
    let versions = Versions {
        envoy: builds
            .envoy
            .as_ref()
            .map_err(String::clone)
            .and_then(|envoy| envoy.version().map_err(|error| error.to_string()))
            .unwrap_or_else(|reason| format!("none: {reason}")),
        cpu: machine::processor(),
        rustc: rustc(),
    };
    finish(options, start, &lines, &ratios, &versions)
}

/// Every load: each proxy in its turn, and the other way round in every other repetition.
fn measure(options: &Options, lines: &mut Lines, builds: &Builds) -> Result<()> {
    let mut stages: BTreeMap<Proxy, Stage> = BTreeMap::new();
    for row in ROWS.iter().filter(|row| options.chosen(row.id)) {
        println!("{}: {}, {}", row.id, row.about, row.path.name());
        let mut proxies = Vec::new();
        let all = row.proxies.iter().chain(&[Proxy::Former]).copied();
        for proxy in all.filter(|&proxy| options.takes(proxy) && builds.has(proxy)) {
            match ready(&mut stages, row, proxy, builds) {
                Ok(()) => proxies.push(proxy),
                Err(error) => {
                    interrupt::check()?;
                    println!("  {:<12} {error:#}", proxy.name());
                    lines.lost(row, main_figure(row), proxy, &format!("{error:#}"));
                }
            }
        }
        for repetition in 0..options.repetitions() {
            for &proxy in &proxies {
                let Some(stage) = stages.get(&proxy) else {
                    continue;
                };
                match stage.measure(row, options.window()) {
                    Ok(report) => lines.add(row, proxy, &report),
                    Err(error) => {
                        interrupt::check()?;
                        println!("  {:<12} {error:#}", proxy.name());
                        lines.lost(row, main_figure(row), proxy, &format!("{error:#}"));
                    }
                }
            }
            proxies.reverse();
            if repetition + 1 == options.repetitions() {
                for proxy in Proxy::ALL {
                    show(lines, row, proxy);
                }
            }
        }
    }
    Ok(())
}

/// Makes sure that there is a stage on which the load can be run.
fn ready(
    stages: &mut BTreeMap<Proxy, Stage>,
    row: &Row,
    proxy: Proxy,
    builds: &Builds,
) -> Result<()> {
    if let Entry::Vacant(place) = stages.entry(proxy) {
        place.insert(builds.stage(proxy, "")?);
    }
    if proxy.meshed()
        && row.layer == Layer::Http
        && let Some(stage) = stages.get(&proxy)
    {
        ensure!(
            stage.speaks_http()?,
            "not built: the agent counts no HTTP requests on a port that is called http"
        );
    }
    Ok(())
}

/// One line of the table on the terminal.
fn show(lines: &Lines, row: &Row, proxy: Proxy) {
    let own = lines
        .all()
        .iter()
        .filter(|line| (line.row, line.path, line.proxy) == (row.id, row.path, proxy));
    let main = main_figure(row);
    let mut text = Vec::new();
    for line in own {
        if let (Some(median), Some(least), Some(most)) = (line.median(), line.least(), line.most())
        {
            let suffix = line.figure.suffix();
            let name = suffix.trim_start_matches('/');
            let unit = line.figure.unit();
            if line.figure == main {
                text.push(format!(
                    "{} {unit} ({} to {})",
                    number(median),
                    number(least),
                    number(most)
                ));
            } else {
                text.push(format!("{name} {} {unit}", number(median)));
            }
            if line.figure == main && line.errors > 0 {
                let example = line.example.as_deref().unwrap_or_default();
                text.push(format!("{} errors ({example})", line.errors));
            }
        }
    }
    if !text.is_empty() {
        println!("  {:<12} {}", proxy.name(), text.join("; "));
    }
}

/// Three digits that matter.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 10_000.0 => format!("{:.1} k", value / 1e3),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

fn finish(
    options: &Options,
    start: Instant,
    lines: &Lines,
    ratios: &[Ratio],
    versions: &Versions,
) -> Result<ExitCode> {
    let lost = lines.all().iter().filter(|line| line.not_run.is_some());
    let lost: Vec<String> = lost
        .map(|line| {
            let reason = line.not_run.as_deref().unwrap_or_default();
            format!(
                "{} {} {}: {reason}",
                line.id(),
                line.path.name(),
                line.proxy.name()
            )
        })
        .collect();
    let errors: u64 = lines
        .all()
        .iter()
        .filter(|line| line.proxy == Proxy::Undermesh)
        .map(|line| line.errors)
        .sum();
    let targets: Vec<&Ratio> = ratios.iter().filter(|one| one.target.is_some()).collect();
    let met = targets.iter().filter(|one| one.met() == Some(true)).count();
    let mut checks = Checks::default();
    checks.equal("every row was run", lost.join("; "), String::new());
    checks.equal("errors through undermesh", errors, 0);
    checks.equal("targets met", met, targets.len());

    println!("\ntargets:");
    for ratio in &targets {
        println!("  {}", told(ratio));
    }
    println!("\n{}", if checks.passed() { "passed" } else { "FAILED" });
    checks.print();
    if options.report {
        written::write(options, start, lines, ratios, versions)?;
    }
    if let Some(file) = &options.json {
        let body = json!({
            "rows": lines.all().iter().map(lines::Line::to_json).collect::<Vec<_>>(),
            "ratios": ratios.iter().map(Ratio::to_json).collect::<Vec<_>>(),
            "envoy": versions.envoy,
            "processor": versions.cpu,
        });
        let body = match body {
            Value::Object(body) => body,
            _ => Map::new(),
        };
        report::write(file, &report::envelope("bench", start, &checks, body))?;
    }
    Ok(if checks.passed() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn told(ratio: &Ratio) -> String {
    let target = ratio
        .target
        .map_or_else(String::new, |target| target.text());
    format!(
        "{:<7} {:<22} {:<10} {:>8} ({target})",
        match ratio.met() {
            Some(true) => "met",
            _ => "NOT MET",
        },
        ratio.id,
        ratio.path.name(),
        ratio.value.map_or_else(|| "none".to_owned(), number),
    )
}

fn rustc() -> String {
    let output = std::process::Command::new("rustc")
        .arg("--version")
        .output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    text.unwrap_or_default()
}
