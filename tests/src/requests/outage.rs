//! Every server of a Service fails every request for a while, and comes back.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;

use super::breakers::{self, Transition, Watch};
use super::{Tell, policy};
use crate::web::{Behaviour, LoadOptions, LoadReport, WebOptions, WebReport};
use crate::{Binaries, Lab, PodSpec, ServiceSpec, Side, Traffic, wait};

const PORT: u16 = 80;
const TARGET: u16 = 8080;
const SERVERS: [(&str, Side); 4] = [
    ("api-1", Side::A),
    ("api-2", Side::B),
    ("api-3", Side::A),
    ("api-4", Side::B),
];
const FINISH: Duration = Duration::from_secs(30);
const SETTLE: Duration = Duration::from_secs(10);
/// How long servers that come back take for an answer: as long as a probe is under way, so that a reader of the
/// metrics can see a breaker half open.
const WARMING_MS: u64 = 150;
const WARMING: Duration = Duration::from_millis(800);

/// Whether something is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Switch {
    /// It is.
    #[default]
    On,
    /// It is not.
    Off,
}

/// How the run is made.
#[derive(Debug, Clone)]
pub struct OutageOptions {
    /// The circuit breaker.
    pub breaker: Switch,
    /// The retry budget.
    pub budget: Switch,
    /// Requests a second.
    pub rate: u32,
    /// Before the servers fail.
    pub before: Duration,
    /// While they fail.
    pub outage: Duration,
    /// After they came back.
    pub after: Duration,
}

impl Default for OutageOptions {
    fn default() -> Self {
        Self {
            breaker: Switch::On,
            budget: Switch::On,
            rate: 300,
            before: Duration::from_secs(2),
            outage: Duration::from_secs(6),
            after: Duration::from_secs(5),
        }
    }
}

/// What the client saw in all.
#[derive(Debug, Clone, Serialize)]
pub struct Client {
    /// Requests sent.
    pub sent: u64,
    /// Of these, answered 2xx.
    pub ok: u64,
    /// The others.
    pub by_reason: BTreeMap<String, u64>,
}

/// What happened while the servers failed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Phase {
    /// Requests that the client sent.
    pub sent: u64,
    /// Requests that the servers received.
    pub upstream_received: u64,
    /// The second by the first.
    pub amplification: f64,
    /// How long it was, in seconds.
    pub seconds: f64,
}

/// What was counted.
#[derive(Debug, Clone, Serialize)]
pub struct Outage {
    /// By the client.
    pub client: Client,
    /// By the servers, in all.
    pub upstream_received: u64,
    /// While every request failed, as the servers count it.
    pub amplification: f64,
    /// The figures behind it.
    pub outage: Phase,
    /// Changes of the breaker's state, as the client's agent exports it.
    pub transitions: Vec<Transition>,
    /// Requests that the open breaker rejected.
    pub rejected: u64,
    /// From the moment at which the servers were well again to the last request that was not answered 2xx.
    pub recover_ms: u64,
}

impl Outage {
    /// Runs it, and tells what happens; nothing is left behind.
    pub fn run(binaries: Option<Binaries>, options: &OutageOptions, tell: &Tell) -> Result<Self> {
        let mut builder = Lab::builder().pod(PodSpec::new("client").on(Side::A));
        for (name, side) in SERVERS {
            let pod = PodSpec::new(name).on(side).label("app", "api");
            builder = builder.pod(pod.service_account("api").port("http", TARGET));
        }
        builder = builder
            .service(ServiceSpec::new("api").http(PORT, TARGET))
            .document(policy::route("api", PORT, &[("api", 1)]))
            .document(policy::traffic_policy("api", spec(options)));
        if let Some(binaries) = binaries {
            builder = builder.binaries(binaries);
        }
        let lab = builder.start()?;
        Run::new(&lab)?.measure(options, tell)
    }
}

fn spec(options: &OutageOptions) -> serde_json::Value {
    let mut spec = json!({});
    if options.breaker == Switch::Off {
        spec["breaker"] = json!({"mode": "Disabled"});
    }
    if options.budget == Switch::Off {
        spec["retryBudget"] = json!({"ratio": 1.0, "minimumRate": 10_000.0});
    }
    spec
}

struct Run<'a> {
    lab: &'a Lab,
    servers: Vec<Traffic<WebReport>>,
}

impl<'a> Run<'a> {
    fn new(lab: &'a Lab) -> Result<Self> {
        let servers = SERVERS
            .iter()
            .map(|(name, _)| lab.pod(name)?.serve_web(&WebOptions::new(name, TARGET)))
            .collect::<Result<_>>()?;
        Ok(Self { lab, servers })
    }

    fn behave(&self, behaviour: &Behaviour) -> Result<()> {
        self.servers
            .iter()
            .try_for_each(|server| server.behave(behaviour))
    }

    fn received(&self) -> Result<u64> {
        let mut received = 0;
        for server in &self.servers {
            received += server.report()?.received;
        }
        Ok(received)
    }

    fn measure(&self, options: &OutageOptions, tell: &Tell) -> Result<Outage> {
        let client = self.lab.pod("client")?;
        let agent = self.lab.node(Side::A)?.agent();
        let to = self.lab.service("api", PORT)?;
        let warm = LoadOptions::new(to).rate(50).connections(4);
        let report = client.start_load(&warm)?.finish(FINISH)?;
        ensure!(report.failed() == 0, "before the outage: {report:?}");

        let (received_before, rejected_before) = (self.received()?, breakers::rejected(&agent)?);
        let start = Instant::now();
        let watch = Watch::start(self.lab.node(Side::A)?.agent(), start);
        let whole = options.before + options.outage + options.after;
        let load = client.start_load(
            &LoadOptions::new(to)
                .rate(options.rate)
                .connections(64)
                .during(whole),
        )?;
        tell(&format!(
            "{} requests a second to {} servers",
            options.rate,
            SERVERS.len()
        ));
        wait::pause(options.before)?;

        tell("every server fails every request from now on");
        let began = Instant::now();
        self.behave(&Behaviour::failing(503))?;
        let (sent, received) = (load.report()?.sent, self.received()?);
        wait::pause(options.outage)?;
        let phase = phase(
            load.report()?.sent - sent,
            self.received()? - received,
            began.elapsed(),
        );
        let well = Instant::now();
        tell("the servers are well again, and slow at first");
        self.behave(&Behaviour {
            delay_ms: WARMING_MS,
            ..Behaviour::default()
        })?;
        wait::pause(WARMING)?;
        self.behave(&Behaviour::default())?;

        let report = load.finish(whole + FINISH)?;
        wait::until_true("the servers' last requests", SETTLE, || {
            Ok(self.received()? - received_before >= report.ok)
        })?;
        let mut transitions = watch.finish()?;
        breakers::explain(&agent, &mut transitions)?;
        for transition in &transitions {
            tell(&transition.to_string());
        }
        Ok(Outage {
            amplification: phase.amplification,
            outage: phase,
            transitions,
            upstream_received: self.received()? - received_before,
            rejected: breakers::rejected(&agent)? - rejected_before,
            recover_ms: recovered(&report, well - start),
            client: Client {
                sent: report.sent,
                ok: report.ok,
                by_reason: report.by_reason,
            },
        })
    }
}

fn phase(sent: u64, upstream_received: u64, lasted: Duration) -> Phase {
    // Counts are far below 2^53.
    #[allow(clippy::cast_precision_loss)]
    let amplification = upstream_received as f64 / sent.max(1) as f64;
    Phase {
        sent,
        upstream_received,
        amplification,
        seconds: lasted.as_secs_f64(),
    }
}

/// From `well` to the end of the last tick with a failure.
fn recovered(report: &LoadReport, well: Duration) -> u64 {
    let last = report.ticks.iter().rposition(|tick| tick.failed > 0);
    let end = last.map_or(Duration::ZERO, |last| {
        LoadReport::TICK * u32::try_from(last + 1).unwrap_or(u32::MAX)
    });
    u64::try_from(end.saturating_sub(well).as_millis()).unwrap_or(u64::MAX)
}

impl Outage {
    /// The most requests that the servers may have received while all failed: a fifth of those sent may be repeated,
    /// and ten a second.
    #[must_use]
    pub fn most_received(&self) -> u64 {
        // Counts are far below 2^53 and positive.
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss
        )]
        let most = (self.outage.sent as f64 * 1.2 + self.outage.seconds * 10.0).ceil() as u64;
        most
    }

    /// Whether the breaker was seen to go through all of its states, in order.
    pub fn went_round(&self) -> Result<()> {
        let mut wanted = ["open", "half_open", "closed"].iter();
        let mut next = wanted.next();
        for transition in &self.transitions {
            if next.is_some_and(|state| transition.to == *state) {
                next = wanted.next();
            }
        }
        match next {
            None => Ok(()),
            Some(state) => Err(anyhow::anyhow!("{state} was not seen")),
        }
        .with_context(|| format!("{:?}", self.transitions))
    }
}
