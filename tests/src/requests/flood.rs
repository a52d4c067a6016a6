//! One pod sends as much as it can; what becomes of its neighbour's requests?

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde::Serialize;

use crate::web::{LoadOptions, LoadReport, WebOptions};
use crate::{Binaries, Lab, PodHandle, PodSpec, ServiceSpec, Side, wait};

const PORT: u16 = 80;
const TARGET: u16 = 8080;
const FINISH: Duration = Duration::from_secs(60);

/// How the run is made.
#[derive(Debug, Clone)]
pub struct FloodOptions {
    /// Requests a second of the victim.
    pub victim_rate: u32,
    /// Connections of the flood, each with one request after the other.
    pub flood_connections: u32,
    /// How long each of the measurements takes.
    pub each: Duration,
    /// How often all are measured in turn.
    pub rounds: usize,
}

impl Default for FloodOptions {
    fn default() -> Self {
        Self {
            victim_rate: 200,
            flood_connections: 256,
            each: Duration::from_secs(4),
            rounds: 3,
        }
    }
}

/// The victim's latency, in milliseconds: medians over the rounds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct VictimP99 {
    /// Without a flood.
    pub alone: f64,
    /// While a pod outside the mesh floods.
    pub flood_direct: f64,
    /// While a pod in the mesh does.
    pub flood_mesh: f64,
}

/// What became of the flood in the mesh.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Flooder {
    /// Requests sent.
    pub sent: u64,
    /// Of these, answered 2xx.
    pub served: u64,
    /// The others.
    pub by_reason: BTreeMap<String, u64>,
    /// Requests of the flood outside of the mesh.
    pub sent_direct: u64,
}

/// What was counted.
#[derive(Debug, Clone, Serialize)]
pub struct Flood {
    /// The victim's.
    pub victim_p99_ms: VictimP99,
    /// Requests of the victim that failed, in any of the measurements.
    pub victim_failed: u64,
    /// The flooder's.
    pub flooder: Flooder,
}

impl Flood {
    /// Runs it; nothing is left behind.
    pub fn run(binaries: Option<Binaries>, options: &FloodOptions) -> Result<Self> {
        let server = |name: &str| PodSpec::new(name).on(Side::B).port("http", TARGET);
        let mut builder = Lab::builder()
            .pod(PodSpec::new("victim").on(Side::A))
            .pod(PodSpec::new("flooder").on(Side::A))
            .pod(PodSpec::new("outsider").on(Side::A).outside())
            .pod(server("api"))
            .pod(server("sink"))
            .service(ServiceSpec::new("api").http(PORT, TARGET))
            .service(ServiceSpec::new("sink").http(PORT, TARGET));
        if let Some(binaries) = binaries {
            builder = builder.binaries(binaries);
        }
        let lab = builder.start()?;
        measure(&lab, options)
    }
}

fn measure(lab: &Lab, options: &FloodOptions) -> Result<Flood> {
    let _api = lab.pod("api")?.serve_web(&WebOptions::new("api", TARGET))?;
    let _sink = lab
        .pod("sink")?
        .serve_web(&WebOptions::new("sink", TARGET))?;
    let victim = lab.pod("victim")?;
    let load = LoadOptions::new(lab.service("api", PORT)?)
        .rate(options.victim_rate)
        .connections(32)
        .during(options.each);
    let warm = victim.start_load(&load)?.finish(FINISH)?;
    ensure!(warm.failed() == 0, "without a flood: {warm:?}");

    let flooders = [None, Some(lab.pod("outsider")?), Some(lab.pod("flooder")?)];
    let mut p99 = [const { Vec::new() }; 3];
    let mut victim_failed = 0;
    let mut floods = [LoadReport::default(), LoadReport::default()];
    for _ in 0..options.rounds {
        for (index, flooder) in flooders.iter().enumerate() {
            let (seen, flood) = beside(lab, &victim, &load, flooder.as_ref(), options)?;
            p99[index].push(seen.latency.p99);
            victim_failed += seen.failed();
            if let (Some(flood), Some(sum)) = (flood, index.checked_sub(1)) {
                add(&mut floods[sum], flood);
            }
        }
    }
    let [direct, meshed] = floods;
    let [alone, flood_direct, flood_mesh] = p99.map(median);
    Ok(Flood {
        victim_p99_ms: VictimP99 {
            alone,
            flood_direct,
            flood_mesh,
        },
        victim_failed,
        flooder: Flooder {
            sent: meshed.sent,
            served: meshed.ok,
            by_reason: meshed.by_reason,
            sent_direct: direct.sent,
        },
    })
}

/// One run of the victim, with or without a flood around it.
fn beside(
    lab: &Lab,
    victim: &PodHandle,
    load: &LoadOptions,
    flooder: Option<&PodHandle>,
    options: &FloodOptions,
) -> Result<(LoadReport, Option<LoadReport>)> {
    const HEAD_START: Duration = Duration::from_millis(500);
    let Some(flooder) = flooder else {
        return Ok((victim.start_load(load)?.finish(FINISH)?, None));
    };
    let flood = flooder.start_load(
        &LoadOptions::new(lab.service("sink", PORT)?)
            .connections(options.flood_connections)
            .during(HEAD_START + options.each),
    )?;
    wait::pause(HEAD_START)?;
    let seen = victim.start_load(load)?.finish(FINISH)?;
    Ok((seen, Some(flood.finish(FINISH)?)))
}

fn add(sum: &mut LoadReport, one: LoadReport) {
    sum.sent += one.sent;
    sum.ok += one.ok;
    for (reason, count) in one.by_reason {
        *sum.by_reason.entry(reason).or_default() += count;
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
