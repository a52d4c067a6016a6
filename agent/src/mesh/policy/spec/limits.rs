//! How many at once, and how often.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::units::{Span, Switch};
use super::{Apply, set};
use crate::mesh::policy::TrafficPolicy;
use crate::resilience::limit::{AdaptiveSettings, Rate};
use crate::resilience::validate::Faults;

/// How many at once.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(inline)]
pub struct Limits {
    /// Upstream connections, of all pods of a node and to all endpoints, for requests and opaque TCP
    /// together. Runs at the source: the destination sees it times the number of nodes. At the limit
    /// both wait in one line: a request within its time limits, opaque TCP for `timeouts.connect`.
    /// Range 1 to 1000000, default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub connections: Option<u32>,
    /// Requests and opaque TCP connections of a node that may wait for a connection. Runs at the
    /// source. One more is answered with 503 (overload), or reset. Range 0 to 1000000, default 1024.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub pending: Option<u32>,
    /// Requests in flight of a node, on a route. Runs at the source: the destination sees it times
    /// the number of nodes. One more is answered with 503 (overload). Range 1 to 1000000, default
    /// none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub in_flight: Option<u32>,
    /// Requests after which an upstream connection is used no more. Runs at the source. Range 1 to
    /// 4294967295, default no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4_294_967_295_u32))]
    pub requests_per_connection: Option<u32>,
    /// A limit of requests in flight that follows how long they take, from here to the last byte of
    /// the answer. Runs at the source, for all routes and pods of a node together: the destination
    /// sees it times the number of nodes. One more is answered with 503 (overload). Default off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adaptive: Option<Adaptive>,
}

/// A limit of requests in flight that shrinks when latency rises.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(inline)]
pub struct Adaptive {
    /// Disabled: no such limit. Default Enabled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<Switch>,
    /// Where it starts. Range `least` to `most`, default 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub initial: Option<u32>,
    /// Never below this. Range 1 to 1000000, default 10.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub least: Option<u32>,
    /// Never above this. Range `least` to 1000000, default 1000.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub most: Option<u32>,
    /// Latency may be so many times that of the long term before the limit shrinks. Range 1 to 10,
    /// default 4.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1.0, max = 10.0))]
    pub tolerance: Option<f64>,
    /// By how much it grows in a calm window. Range 0 to 1000, default 4.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000))]
    pub queue: Option<u32>,
    /// How much of each step is taken. Range 0.01 to 1, default 0.2.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.01, max = 1.0))]
    pub smoothing: Option<f64>,
    /// Latency is averaged over this before each step. Range 10ms to 1m, default 100ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<Span>,
    /// Windows after which the long-term latency has forgotten. Range 10 to 100000, default 600.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 10, max = 100_000))]
    pub memory: Option<u32>,
}

/// How often. Runs at the source: each node has buckets of its own, so the destination sees each
/// rate times the number of nodes that have clients of it. One request too many is answered with
/// 429, `retry-after` and the RateLimit headers; gRPC with RESOURCE_EXHAUSTED.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(inline)]
pub struct RateLimit {
    /// For each source identity of the node by itself. Default no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_source: Option<RateSpec>,
    /// For the route, or for what goes to the Service without one, of all sources of the node
    /// together. Default no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_route: Option<RateSpec>,
    /// For the Service's port, of all sources of the node and all routes together. Default no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total: Option<RateSpec>,
}

/// A token bucket.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(inline)]
pub struct RateSpec {
    /// Requests per second. Range 0.001 to 1000000000.
    #[schemars(range(min = 0.001, max = 1e9))]
    pub requests_per_second: f64,
    /// The most at once. Range 1 to 4294967295, default a second's worth.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4_294_967_295_u32))]
    pub burst: Option<u32>,
}

impl Apply for Limits {
    fn apply(&self, to: &mut TrafficPolicy) {
        let Self {
            connections,
            pending,
            in_flight,
            requests_per_connection,
            adaptive,
        } = self;
        set(&mut to.connections.connections, connections.map(Some));
        set(&mut to.connections.pending, *pending);
        set(&mut to.settings.limits.concurrency, in_flight.map(Some));
        set(
            &mut to.connections.requests_per_connection,
            requests_per_connection.map(Some),
        );
        if let Some(adaptive) = adaptive {
            adaptive.apply_to(&mut to.settings.limits.adaptive);
        }
    }

    fn check(&self, at: &str, faults: &mut Faults) {
        let Some(adaptive) = &self.adaptive else {
            return;
        };
        let at = format!("{at}.adaptive");
        for (field, value) in [
            ("initial", adaptive.initial),
            ("least", adaptive.least),
            ("most", adaptive.most),
        ] {
            faults.range(value.unwrap_or(1), 1, 1_000_000, &at, field);
        }
        if let (Some(least), Some(most)) = (adaptive.least, adaptive.most) {
            let reason = format_args!("must be at least `least`, {least}, is {most}");
            faults.require(most >= least, &at, "most", reason);
        }
    }
}

impl Adaptive {
    fn apply_to(&self, to: &mut Option<AdaptiveSettings>) {
        let Self {
            mode,
            initial,
            least,
            most,
            tolerance,
            queue,
            smoothing,
            window,
            memory,
        } = self;
        let settings = to.get_or_insert_default();
        set(&mut settings.initial, *initial);
        set(&mut settings.least, *least);
        set(&mut settings.most, *most);
        set(&mut settings.tolerance, *tolerance);
        set(&mut settings.queue, *queue);
        set(&mut settings.smoothing, *smoothing);
        set(&mut settings.window, window.map(|window| window.0));
        set(&mut settings.memory, *memory);
        if *mode == Some(Switch::Disabled) {
            *to = None;
        }
    }
}

impl Apply for RateLimit {
    fn apply(&self, to: &mut TrafficPolicy) {
        let Self {
            per_source,
            per_route,
            total,
        } = self;
        let rates = &mut to.settings.limits.rates;
        set(&mut rates.source, per_source.as_ref().map(RateSpec::rate));
        set(&mut rates.route, per_route.as_ref().map(RateSpec::rate));
        set(&mut rates.total, total.as_ref().map(RateSpec::rate));
    }
}

impl RateSpec {
    fn rate(&self) -> Option<Rate> {
        let second = self
            .requests_per_second
            .ceil()
            .clamp(1.0, f64::from(u32::MAX)) as u32;
        Some(Rate {
            per_second: self.requests_per_second,
            burst: self.burst.unwrap_or(second),
        })
    }
}
