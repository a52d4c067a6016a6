//! What idle connections cost, and what comes back when they close.

use std::time::{Duration, Instant};

use anyhow::Result;
use undermesh_lab::process::Process;
use undermesh_lab::wait;

use super::Builds;
use super::lines::Lines;
use super::rows::{Figure, MEMORY_PROXIES, Proxy};
use super::stage::{self, Stage};

/// How many connections are held.
pub struct Extent {
    /// In growing steps.
    pub steps: &'static [usize],
}

impl Extent {
    /// Of a glance, or of the whole bench.
    pub fn of(quick: bool) -> &'static Self {
        if quick { &QUICK } else { &FULL }
    }
}

/// How long memory may take to come back.
const GIVEN_BACK: Duration = Duration::from_secs(60);

/// Where processes may have 20,000 descriptors, the agent lets one pod have 9,488 connections, tunnels
/// included.
const FULL: Extent = Extent {
    steps: &[1000, 9300],
};

const QUICK: Extent = Extent { steps: &[1000] };

/// After the start: what start needed is given back by then, and everything that runs now and then has run.
const STARTED: Duration = Duration::from_secs(60);
/// Connections that are open before those of which the cost is measured: the first of all have code come into memory
/// that all the others share.
const WARM: usize = 100;
/// After connections are open: for what is still being tidied up.
const SETTLE: Duration = Duration::from_secs(2);

/// What is known of one proxy when its connections have been closed.
struct Held {
    stage: Stage,
    before: u64,
    with: u64,
}

/// Proxies whose connections were closed.
pub struct Closed {
    held: Vec<(Proxy, Held)>,
    /// How many connections there were.
    most: usize,
    since: Instant,
}

/// Proxies in fresh processes, which have nothing to do.
pub struct AtRest {
    stages: Vec<(Proxy, Stage)>,
    since: Instant,
}

/// Starts all proxies. What is measured between this and [`hold`] shortens its wait.
pub fn start(lines: &mut Lines, builds: &Builds, takes: impl Fn(Proxy) -> bool) -> Result<AtRest> {
    let mut stages = Vec::new();
    let all = MEMORY_PROXIES.iter().chain(&[Proxy::Former]).copied();
    for proxy in all.filter(|&proxy| takes(proxy) && builds.has(proxy)) {
        let stage = or_lost(lines, proxy, warm(proxy, builds))?;
        stages.extend(stage.map(|stage| (proxy, stage)));
    }
    Ok(AtRest {
        stages,
        since: Instant::now(),
    })
}

/// Measures all that were started, one after the other, at rest and with connections, which are closed then.
pub fn hold(lines: &mut Lines, at_rest: AtRest, extent: &Extent) -> Result<Closed> {
    wait::pause(STARTED.saturating_sub(at_rest.since.elapsed()))?;
    let mut held = Vec::new();
    for (proxy, stage) in at_rest.stages {
        let one = hold_one(lines, proxy, stage, extent);
        held.extend(or_lost(lines, proxy, one)?.map(|one| (proxy, one)));
    }
    Ok(Closed {
        held,
        most: extent.steps.last().copied().unwrap_or(0),
        since: Instant::now(),
    })
}

/// Measures what all of them have given back. What is measured between [`hold`] and this shortens its wait.
pub fn given_back(lines: &mut Lines, closed: Closed) -> Result<()> {
    wait::pause(GIVEN_BACK.saturating_sub(closed.since.elapsed()))?;
    for (proxy, one) in closed.held {
        let after = one.stage.resident_bytes()?;
        let grown = one.with.saturating_sub(one.before);
        println!("  {:<12} {:>8.1} MiB after close", proxy.name(), mib(after));
        lines.add_memory(
            proxy,
            closed.most,
            Figure::GivenBack,
            share(one.with.saturating_sub(after), grown),
        );
    }
    Ok(())
}

/// What was come to; where it was an error, the list says so and the others go on.
fn or_lost<T>(lines: &mut Lines, proxy: Proxy, outcome: Result<T>) -> Result<Option<T>> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) => {
            undermesh_lab::interrupt::check()?;
            lines.lost_memory(proxy, &format!("{error:#}"));
            Ok(None)
        }
    }
}

fn warm(proxy: Proxy, builds: &Builds) -> Result<Stage> {
    let stage = builds.stage(proxy, "m")?;
    stage.warm()?;
    Ok(stage)
}

fn hold_one(lines: &mut Lines, proxy: Proxy, stage: Stage, extent: &Extent) -> Result<Held> {
    let before = stage.resident_bytes()?;
    lines.add_memory(proxy, 0, Figure::Resident(0), mib(before));
    println!("  {:<12} {:>8.1} MiB", proxy.name(), mib(before));
    let mut holders: Vec<Process> = vec![stage.hold(WARM)?];
    wait::pause(SETTLE)?;
    let warm = stage.resident_bytes()?;
    println!("  {:<12} {:>8.1} MiB with {WARM}", proxy.name(), mib(warm));
    let (mut open, mut with) = (WARM, warm);
    for &step in extent.steps {
        holders.push(stage.hold(step - open)?);
        open = step;
        wait::pause(SETTLE)?;
        with = stage.resident_bytes()?;
        lines.add_memory(proxy, step, Figure::Resident(step), mib(with));
        println!("  {:<12} {:>8.1} MiB with {step}", proxy.name(), mib(with));
    }
    let each = share(with.saturating_sub(warm), (open - WARM) as u64 * 1024);
    lines.add_memory(proxy, open, Figure::PerConnection, each);
    for holder in holders {
        stage::release(holder)?;
    }
    Ok(Held {
        stage,
        before,
        with,
    })
}

#[allow(clippy::cast_precision_loss)]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[allow(clippy::cast_precision_loss)]
fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        return 0.0;
    }
    part as f64 / whole as f64
}
