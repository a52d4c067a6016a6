//! Which endpoint a request goes to.

use http::HeaderName;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::units::Span;
use super::{Apply, set};
use crate::mesh::policy::{HashKey, Locality, TrafficPolicy};
use crate::resilience::Algorithm;
use crate::resilience::validate::Faults;

/// How an endpoint is chosen. Runs at the source, on each node by itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(inline)]
pub struct Balancing {
    /// PeakEwma: the better of two at random, by latency times requests in flight. LeastRequest: the
    /// better of two at random, by requests in flight. RoundRobin. Weighted: at random, by weight.
    /// RingHash and Maglev: consistent hashing by `hash`. Default PeakEwma.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub algorithm: Option<BalancingAlgorithm>,
    /// What RingHash and Maglev hash: the first of these that a request has; a request that has none
    /// goes to any endpoint. Default the source. At most 8.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 8))]
    pub hash: Option<Vec<HashOn>>,
    /// Hashing: no endpoint takes more than this many times the mean load, as this node sees it.
    /// Range 1.05 to 10, default 1.25.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1.05, max = 10.0))]
    pub bounded_load: Option<f64>,
    /// RingHash: points per endpoint and unit of weight. Range 1 to 1024, default 64.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub ring_points: Option<u32>,
    /// Maglev: entries of the table, made a prime. Range 13 to 5000011, default 65537.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 13, max = 5_000_011))]
    pub maglev_table: Option<u32>,
}

/// How an endpoint is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(inline)]
#[allow(missing_docs, reason = "the names are resilience::Algorithm's")]
pub enum BalancingAlgorithm {
    PeakEwma,
    LeastRequest,
    RoundRobin,
    Weighted,
    RingHash,
    Maglev,
}

/// One of `header`, `cookie` and `source`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(inline)]
pub struct HashOn {
    /// The header of this name.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub header: Option<String>,
    /// The cookie of this name.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub cookie: Option<String>,
    /// Pod: the pod that asks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<HashSource>,
}

/// What of the source is hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(inline)]
pub enum HashSource {
    /// The pod that asks.
    Pod,
}

/// Which endpoints come first. Runs at the source, on each node by itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(inline)]
pub struct LocalitySpec {
    /// Any: all endpoints are alike. Zone: those of the client's zone, then of its region, then the
    /// others. Node: those of the client's node, then as Zone. Default Any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefer: Option<Prefer>,
    /// A tier keeps its traffic until less than 1 / overprovisioning of its endpoints stand; then
    /// the rest overflows to the next. Range 1 to 10, default 1.4.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1.0, max = 10.0))]
    pub overprovisioning: Option<f64>,
}

/// Which endpoints come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(inline)]
#[allow(missing_docs, reason = "the names are Locality's")]
pub enum Prefer {
    Any,
    Zone,
    Node,
}

/// How an endpoint that is new, or came back, warms up. Runs at the source: each node warms it up by
/// itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(inline)]
pub struct SlowStart {
    /// Over how long. Range 0s (off) to 1h, default 10s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<Span>,
    /// What it gets at first, relative to a warm one. Range 0.01 to 1, default 0.1.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.01, max = 1.0))]
    pub minimum: Option<f64>,
}

impl Apply for Balancing {
    fn apply(&self, to: &mut TrafficPolicy) {
        let Self {
            algorithm,
            hash,
            bounded_load,
            ring_points,
            maglev_table,
        } = self;
        let balance = &mut to.settings.balance;
        set(&mut balance.algorithm, algorithm.map(Into::into));
        set(&mut balance.bounded_load, *bounded_load);
        set(&mut balance.ring_points, *ring_points);
        set(&mut balance.maglev_table, *maglev_table);
        let keys = |hash: &Vec<HashOn>| hash.iter().filter_map(HashOn::key).collect();
        set(&mut to.hash, hash.as_ref().map(keys));
    }

    fn check(&self, at: &str, faults: &mut Faults) {
        let hash = self.hash.as_deref().unwrap_or_default();
        faults.range(hash.len(), 0, 8, at, "hash");
        for (index, on) in hash.iter().enumerate() {
            let fine = on.is_one_of() && on.key().is_some();
            let reason = "must be one of header, cookie and source, with a name that can be one";
            faults.require(fine, at, &format!("hash[{index}]"), reason);
        }
    }
}

impl HashOn {
    fn is_one_of(&self) -> bool {
        let Self {
            header,
            cookie,
            source,
        } = self;
        let given = [header.is_some(), cookie.is_some(), source.is_some()];
        given.into_iter().filter(|given| *given).count() == 1
    }

    fn key(&self) -> Option<HashKey> {
        if let Some(name) = &self.header {
            return HeaderName::try_from(name.as_str())
                .ok()
                .map(HashKey::Header);
        }
        if let Some(name) = &self.cookie {
            // A cookie's name is a token (RFC 6265 section 4.1.1), as a header's is.
            return HeaderName::try_from(name.as_str())
                .is_ok()
                .then(|| HashKey::Cookie(name.as_str().into()));
        }
        self.source.map(|HashSource::Pod| HashKey::Source)
    }
}

impl From<BalancingAlgorithm> for Algorithm {
    fn from(algorithm: BalancingAlgorithm) -> Self {
        match algorithm {
            BalancingAlgorithm::PeakEwma => Self::PeakEwma,
            BalancingAlgorithm::LeastRequest => Self::LeastRequest,
            BalancingAlgorithm::RoundRobin => Self::RoundRobin,
            BalancingAlgorithm::Weighted => Self::Weighted,
            BalancingAlgorithm::RingHash => Self::RingHash,
            BalancingAlgorithm::Maglev => Self::Maglev,
        }
    }
}

impl Apply for LocalitySpec {
    fn apply(&self, to: &mut TrafficPolicy) {
        let Self {
            prefer,
            overprovisioning,
        } = self;
        let preferred = prefer.map(|prefer| match prefer {
            Prefer::Any => Locality::Any,
            Prefer::Zone => Locality::Zone,
            Prefer::Node => Locality::Node,
        });
        set(&mut to.locality, preferred);
        set(&mut to.settings.balance.overprovisioning, *overprovisioning);
    }
}

impl Apply for SlowStart {
    fn apply(&self, to: &mut TrafficPolicy) {
        let Self { window, minimum } = self;
        let balance = &mut to.settings.balance;
        set(&mut balance.slow_start, window.map(|window| window.0));
        set(&mut balance.slow_start_minimum, *minimum);
    }
}
