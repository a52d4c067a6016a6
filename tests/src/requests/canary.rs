//! A new version that gets a share of the requests begins to fail all of them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;

use super::{Tell, policy};
use crate::web::{Behaviour, LoadOptions, LoadReport, WebOptions, WebReport};
use crate::{Binaries, Lab, PodSpec, ServiceSpec, Side, Traffic, wait};

const PORT: u16 = 80;
const TARGET: u16 = 8080;
const FINISH: Duration = Duration::from_secs(30);
const STEP: Duration = Duration::from_millis(10);
/// What is sent to a canary that is contained: a probe now and then.
const PROBES_A_SECOND: f64 = 15.0;

/// How the run is made.
#[derive(Debug, Clone)]
pub struct CanaryOptions {
    /// Requests a second.
    pub rate: u32,
    /// Weights of the stable version and of the canary.
    pub weights: [u32; 2],
    /// While both are well.
    pub before: Duration,
    /// While the canary fails.
    pub failing: Duration,
}

impl Default for CanaryOptions {
    fn default() -> Self {
        Self {
            rate: 400,
            weights: [90, 10],
            before: Duration::from_secs(3),
            failing: Duration::from_secs(6),
        }
    }
}

/// What a version received.
#[derive(Debug, Clone, Serialize)]
pub struct Backend {
    /// Its Service.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Requests.
    pub received: u64,
    /// Requests that it answered with an error.
    pub errors: u64,
}

/// What was counted.
#[derive(Debug, Clone, Serialize)]
pub struct Canary {
    /// As configured.
    pub weights: [u32; 2],
    /// Both, as they counted.
    pub backends: Vec<Backend>,
    /// From the first moment of failing to the last request that the canary received other than as a probe.
    pub contained_ms: u64,
    /// Share of the requests until then that the client saw fail.
    pub client_error_share: f64,
    /// Requests that the client saw fail after that.
    pub errors_after: u64,
    /// Share of the requests that the canary received while it was well.
    pub share_while_well: f64,
}

impl Canary {
    /// Runs it, and tells what happens; nothing is left behind.
    pub fn run(binaries: Option<Binaries>, options: &CanaryOptions, tell: &Tell) -> Result<Self> {
        let pod = |name: &str, version: &str, side: Side| {
            PodSpec::new(name)
                .on(side)
                .label("app", "api")
                .label("version", version)
                .service_account("api")
                .port("http", TARGET)
        };
        let service = |name: &str, version: &str| ServiceSpec::new(name).select("version", version);
        let [stable, canary] = options.weights;
        let mut builder = Lab::builder()
            .pod(PodSpec::new("client").on(Side::A))
            .pod(pod("stable-1", "v1", Side::A))
            .pod(pod("stable-2", "v1", Side::B))
            .pod(pod("canary-1", "v2", Side::B))
            .service(ServiceSpec::new("api").http(PORT, TARGET))
            .service(service("api-v1", "v1").http(PORT, TARGET))
            .service(service("api-v2", "v2").http(PORT, TARGET))
            .document(policy::route(
                "api",
                PORT,
                &[("api-v1", stable), ("api-v2", canary)],
            ))
            .document(policy::traffic_policy(
                "api-v2",
                json!({"fallback": {"backend": {"name": "api-v1", "port": PORT}}}),
            ));
        if let Some(binaries) = binaries {
            builder = builder.binaries(binaries);
        }
        let lab = builder.start()?;
        measure(&lab, options, tell)
    }
}

fn measure(lab: &Lab, options: &CanaryOptions, tell: &Tell) -> Result<Canary> {
    let serve = |name: &str, version: &str| {
        lab.pod(name)?
            .serve_web(&WebOptions::new(version, TARGET))
            .context(name.to_owned())
    };
    let stable = [serve("stable-1", "v1")?, serve("stable-2", "v1")?];
    let canary = serve("canary-1", "v2")?;
    let client = lab.pod("client")?;
    let whole = options.before + options.failing;
    let load = client.start_load(
        &LoadOptions::new(lab.service("api", PORT)?)
            .rate(options.rate)
            .connections(32)
            .during(whole),
    )?;
    let start = Instant::now();
    let [stable_weight, canary_weight] = options.weights;
    tell(&format!(
        "{} requests a second, {stable_weight} : {canary_weight} to the stable version and the canary",
        options.rate
    ));
    wait::pause(options.before)?;
    let well = canary.report()?.received;
    let all = load.report()?.sent;
    canary.behave(&Behaviour::failing(500))?;
    tell("the canary fails every request from now on");
    let failing = Instant::now();
    let contained = contained(&canary, failing, options.failing)?;
    tell(&format!(
        "contained after {} ms: but for probes it receives nothing",
        contained.as_millis()
    ));
    let report = load.finish(whole + FINISH)?;
    ensure!(report.unsent == 0, "the client was too slow: {report:?}");

    let until = (failing - start) + contained;
    let (before, after) = split(&report, failing - start, until);
    let backend = |name: &str, version: &str, reports: &[WebReport]| Backend {
        name: name.to_owned(),
        version: version.to_owned(),
        received: reports.iter().map(|report| report.received).sum(),
        errors: reports
            .iter()
            .flat_map(|report| &report.by_status)
            .filter(|(status, _)| !status.starts_with('2'))
            .map(|(_, count)| count)
            .sum(),
    };
    let stable = [stable[0].report()?, stable[1].report()?];
    Ok(Canary {
        weights: options.weights,
        backends: vec![
            backend("api-v1", "v1", &stable),
            backend("api-v2", "v2", &[canary.report()?]),
        ],
        contained_ms: u64::try_from(contained.as_millis()).unwrap_or(u64::MAX),
        client_error_share: before.share(),
        errors_after: after.failed,
        share_while_well: share(well, all),
    })
}

/// How long the canary received more than probes.
fn contained(canary: &Traffic<WebReport>, failing: Instant, limit: Duration) -> Result<Duration> {
    const LOOK: Duration = Duration::from_millis(500);
    let mut seen = vec![(Duration::ZERO, canary.report()?.received)];
    while failing.elapsed() < limit {
        wait::pause(STEP)?;
        seen.push((failing.elapsed(), canary.report()?.received));
    }
    // The first moment from which on no half second brings more than probes.
    let most = (PROBES_A_SECOND * LOOK.as_secs_f64()).ceil();
    let calm_from = |from: usize| {
        seen[from..].iter().enumerate().all(|(index, (at, count))| {
            let window = &seen[from + index..];
            let end = window
                .iter()
                .take_while(|(later, _)| *later <= *at + LOOK)
                .last();
            #[allow(clippy::cast_precision_loss)]
            end.is_none_or(|(_, later)| (later - count) as f64 <= most)
        })
    };
    let moment = (0..seen.len()).find(|&from| calm_from(from));
    Ok(moment.map_or(limit, |index| seen[index].0))
}

struct Part {
    sent: u64,
    failed: u64,
}

impl Part {
    fn share(&self) -> f64 {
        share(self.failed, self.sent)
    }
}

/// The requests that were due between `from` and `until`, and those due later; to whole ticks, with the one that
/// `until` lies in and the next counted to the first part.
fn split(report: &LoadReport, from: Duration, until: Duration) -> (Part, Part) {
    let tick = |at: Duration| {
        usize::try_from(at.as_millis() / LoadReport::TICK.as_millis()).unwrap_or(usize::MAX)
    };
    let ticks = &report.ticks;
    let first = tick(from).min(ticks.len());
    let middle = (tick(until) + 2).clamp(first, ticks.len());
    let part = |ticks: &[crate::web::Tick]| Part {
        sent: ticks.iter().map(|tick| tick.ok + tick.failed).sum(),
        failed: ticks.iter().map(|tick| tick.failed).sum(),
    };
    (part(&ticks[first..middle]), part(&ticks[middle..]))
}

fn share(part: u64, whole: u64) -> f64 {
    // Counts are far below 2^53.
    #[allow(clippy::cast_precision_loss)]
    let share = part as f64 / whole.max(1) as f64;
    share
}

impl Canary {
    /// The canary's share of the weights.
    #[must_use]
    pub fn weight_share(&self) -> f64 {
        let [stable, canary] = self.weights;
        share(canary.into(), u64::from(stable) + u64::from(canary))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::web::Tick;

    #[test]
    fn failures_are_told_apart_by_when_the_requests_were_due() {
        let tick = |ok, failed| Tick { ok, failed };
        let report = LoadReport {
            ticks: vec![tick(9, 1), tick(8, 2), tick(10, 0), tick(10, 0), tick(9, 1)],
            ..LoadReport::default()
        };
        let at = Duration::from_millis;
        let (before, after) = split(&report, at(100), at(150));
        assert_eq!((before.sent, before.failed), (20, 2));
        assert_eq!((after.sent, after.failed), (20, 1));
    }
}
