//! Whether every connection of a pod comes to the agent, and what the kernel programs take for one.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::programs::loaded_programs;
use aya::sys::{Stats, enable_stats};
use undermesh_lab::wait;

use super::Builds;
use super::lines::Lines;
use super::rows::{CAPTURE, Figure, Proxy};
use super::stage::Stage;

/// How many connections are made, or a few more.
const FULL: u64 = 400_000;
const QUICK: u64 = 20_000;

/// One run of the client.
const WINDOW: Duration = Duration::from_secs(5);
/// For the agent's counters to follow the last connection.
const SETTLE: Duration = Duration::from_secs(10);
/// What the programs' names begin with, of which the kernel keeps fifteen bytes.
const PREFIX: &str = "undermesh";
/// And those of the programs that run once for each connect(2).
const CONNECT: &str = "undermesh_conne";

/// Measures the agent of this build, and of the former one.
pub fn run(
    lines: &mut Lines,
    builds: &Builds,
    quick: bool,
    takes: impl Fn(Proxy) -> bool,
) -> Result<()> {
    let connections = if quick { QUICK } else { FULL };
    let all = [Proxy::Undermesh, Proxy::Former];
    for proxy in all
        .into_iter()
        .filter(|one| takes(*one) && builds.has(*one))
    {
        if let Err(error) = measure(lines, proxy, builds, connections) {
            undermesh_lab::interrupt::check()?;
            println!("  {:<12} {error:#}", proxy.name());
            lines.lost(&CAPTURE, Figure::Missed, proxy, &format!("{error:#}"));
        }
    }
    Ok(())
}

fn measure(lines: &mut Lines, proxy: Proxy, builds: &Builds, connections: u64) -> Result<()> {
    let stage = builds.stage(proxy, "c")?;
    // The first ones load what all others share.
    stage.measure(&CAPTURE, Duration::from_millis(200))?;
    settled(&stage)?;
    // While this is open, the kernel takes the time of every program.
    let _stats = enable_stats(Stats::RunTime).context("BPF_ENABLE_STATS")?;
    let (former, runs) = (counted(&stage)?, runs()?);
    let mut errors = 0;
    let mut made = 0;
    while made < connections {
        let report = stage.measure(&CAPTURE, WINDOW)?;
        ensure!(report.operations > 0, "no connection in {WINDOW:?}");
        errors += report.errors;
        made = counted(&stage)?.served - former.served;
    }
    let now = settled(&stage)?;
    let (served, captured) = (now.served - former.served, now.captured - former.captured);
    let missed = served.saturating_sub(captured);
    println!(
        "  {:<12} {missed} missed of {served} connections, {errors} errors",
        proxy.name()
    );
    let mut spent = Vec::new();
    for (name, now) in self::runs()? {
        let before = runs.get(&name).copied().unwrap_or_default();
        spent.push((name, now.since(before)));
    }
    // The pod's and the agent's own: one each for a connection within a node.
    let mut connects = spent.iter().filter(|(name, _)| name == CONNECT);
    let connects = count(connects.next().map_or(0, |(_, runs)| runs.count));
    ensure!(connects > 0.0, "no run of a program for connect(2)");
    let mut each = 0.0;
    for (name, runs) in spent.iter().filter(|(_, runs)| runs.count > 0) {
        let micros = runs.time.as_secs_f64() * 1e6 / connects;
        each += micros;
        println!(
            "  {:<12} {name:<16} {:.2} runs and {micros:.2} µs for each of {connects} connects",
            "",
            count(runs.count) / connects
        );
    }
    lines.add_capture(proxy, served, errors, Figure::Missed, count(missed));
    lines.add_capture(proxy, served, errors, Figure::Programs, each);
    Ok(())
}

/// What both ends have counted.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Counted {
    /// Connections that the server accepted.
    served: u64,
    /// Those that the agent carried.
    captured: u64,
}

fn counted(stage: &Stage) -> Result<Counted> {
    Ok(Counted {
        served: stage.served(CAPTURE.path)?,
        captured: stage.figures()?.same_node,
    })
}

/// The counts once they stand still.
fn settled(stage: &Stage) -> Result<Counted> {
    let mut last = counted(stage)?;
    wait::until(
        "the agent's count of connections to stand still",
        SETTLE,
        || {
            wait::pause(Duration::from_millis(500))?;
            let now = counted(stage)?;
            let before = std::mem::replace(&mut last, now);
            Ok((before == now).then_some(now))
        },
    )
}

/// How often a program has run, and for how long.
#[derive(Clone, Copy, Default)]
struct Runs {
    count: u64,
    time: Duration,
}

impl Runs {
    fn since(self, before: Self) -> Self {
        Self {
            count: self.count.saturating_sub(before.count),
            time: self.time.saturating_sub(before.time),
        }
    }
}

/// The programs of all agents on this machine so far, by name.
fn runs() -> Result<BTreeMap<String, Runs>> {
    let mut all: BTreeMap<String, Runs> = BTreeMap::new();
    for program in loaded_programs() {
        let program = program.context("the kernel's list of programs")?;
        if let Some(name) = program
            .name_as_str()
            .filter(|name| name.starts_with(PREFIX))
        {
            let runs = all.entry(name.to_owned()).or_default();
            runs.count += program.run_count();
            runs.time += program.run_time();
        }
    }
    ensure!(!all.is_empty(), "no program's name begins with {PREFIX}");
    Ok(all)
}

#[allow(clippy::cast_precision_loss)]
fn count(number: u64) -> f64 {
    number as f64
}
