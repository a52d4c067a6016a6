//! Whether failed attempts are made again.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::units::Span;
use super::{Apply, set};
use crate::mesh::policy::TrafficPolicy;
use crate::resilience::Backoff;
use crate::resilience::outcome::Code;
use crate::resilience::retry::{Condition, Repeat};
use crate::resilience::validate::Faults;

/// When a failed attempt is made again. Runs at the source. What provably never reached an
/// application is always sent again, within attempts, time and budget. A route's own `retry` comes
/// before this.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(inline)]
pub struct Retries {
    /// Attempts beyond the first. Range 0 to 10, default 2. Given without `conditions`, `httpStatuses`
    /// and `grpcStatuses`, it stands for: GatewayError, Reset, Timeout, and the gRPC statuses CANCELLED,
    /// DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, INTERNAL and UNAVAILABLE.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 10))]
    pub attempts: Option<u32>,
    /// What else is sent again. ServerError: any 5xx. GatewayError: 502, 503, 504. Reset: the
    /// connection or stream broke. Timeout: the attempt took too long. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4))]
    pub conditions: Option<Vec<RetryOn>>,
    /// HTTP statuses that are sent again. Each 400 to 599; at most 64; default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64), inner(range(min = 400, max = 599)))]
    pub http_statuses: Option<Vec<u16>>,
    /// gRPC statuses that are sent again. Each 1 to 16; default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), inner(range(min = 1, max = 16)))]
    pub grpc_statuses: Option<Vec<u8>>,
    /// The wait before an attempt. Default 25ms doubling to 250ms, all of it left to chance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backoff: Option<BackoffSpec>,
    /// The longest Retry-After that is waited for; a longer one ends the request. Range 0s to 1m,
    /// default 1s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_cap: Option<Span>,
    /// Which methods may be sent again once bytes were sent. Idempotent: GET, HEAD, OPTIONS, TRACE,
    /// PUT, DELETE. Any: the handlers vouch for it. Default Idempotent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub methods: Option<RetryMethods>,
    /// The most of a body that is kept to send it again, in bytes, for each request; a larger one is
    /// not sent again. Range 0 to 16777216, default 65536.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 16_777_216))]
    pub replay_bytes: Option<u32>,
}

/// An outcome that is worth another attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(inline)]
#[allow(missing_docs, reason = "the names are resilience's")]
pub enum RetryOn {
    ServerError,
    GatewayError,
    Reset,
    Timeout,
}

/// Which methods may be sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(inline)]
#[allow(missing_docs, reason = "the names are resilience's")]
pub enum RetryMethods {
    Idempotent,
    Any,
}

/// An exponential wait.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(inline)]
pub struct BackoffSpec {
    /// The first wait. Range 1ms to 1h.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<Span>,
    /// The longest wait. Range `base` to 24h.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cap: Option<Span>,
    /// How much of a wait is left to chance. Range 0 (none) to 1 (all of it).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub jitter: Option<f64>,
}

/// What pays for retries: within the window at most ratio × requests, or minimumRate × window if
/// that is more. Runs at the source, one for each node and destination: the budgets of several nodes
/// add up, and so do the requests that pay for them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(inline)]
pub struct RetryBudget {
    /// Retries per request. Range 0 to 1, default 0.2.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub ratio: Option<f64>,
    /// Retries per second that are allowed whatever the requests, for each node. Range 0 to 10000,
    /// default 10.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 10_000.0))]
    pub minimum_rate: Option<f64>,
    /// The window. Range 1s to 1h, default 10s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<Span>,
}

impl Apply for Retries {
    fn apply(&self, to: &mut TrafficPolicy) {
        let Self {
            attempts,
            conditions: on,
            http_statuses,
            grpc_statuses,
            backoff,
            retry_after_cap,
            methods,
            replay_bytes,
        } = self;
        let retry = &mut to.settings.retry;
        set(&mut retry.retries, *attempts);
        let conditions = &mut retry.conditions;
        let none_given = on.is_none() && http_statuses.is_none() && grpc_statuses.is_none();
        if attempts.is_some() && none_given && conditions.is_empty() {
            *conditions = Condition::usual();
        }
        if let Some(on) = on {
            conditions.retain(|one| matches!(one, Condition::Code(_)));
            conditions.extend(on.iter().copied().map(Condition::from));
        }
        if let Some(statuses) = http_statuses {
            conditions.retain(|one| !matches!(one, Condition::Code(Code::Http(_))));
            let codes = statuses.iter().copied().map(Code::Http);
            conditions.extend(codes.map(Condition::Code));
        }
        if let Some(statuses) = grpc_statuses {
            conditions.retain(|one| !matches!(one, Condition::Code(Code::Grpc(_))));
            let codes = statuses.iter().copied().map(Code::Grpc);
            conditions.extend(codes.map(Condition::Code));
        }
        if let Some(backoff) = backoff {
            backoff.apply_to(&mut retry.backoff);
        }
        set(&mut retry.retry_after_cap, retry_after_cap.map(|cap| cap.0));
        let repeat = methods.map(|methods| match methods {
            RetryMethods::Idempotent => Repeat::Idempotent,
            RetryMethods::Any => Repeat::Any,
        });
        set(&mut retry.repeat, repeat);
        set(
            &mut retry.replay_bytes,
            replay_bytes.map(|most| most as usize),
        );
    }

    fn check(&self, at: &str, faults: &mut Faults) {
        let lengths = [
            (
                "conditions",
                self.conditions.as_ref().map_or(0, Vec::len),
                4,
            ),
            (
                "httpStatuses",
                self.http_statuses.as_ref().map_or(0, Vec::len),
                64,
            ),
            (
                "grpcStatuses",
                self.grpc_statuses.as_ref().map_or(0, Vec::len),
                16,
            ),
        ];
        for (field, length, most) in lengths {
            let reason = format_args!("must be at most {most}, are {length}");
            faults.require(length <= most, at, field, reason);
        }
        if let Some(backoff) = &self.backoff {
            backoff.check(&format!("{at}.backoff"), faults);
        }
    }
}

impl From<RetryOn> for Condition {
    fn from(on: RetryOn) -> Self {
        match on {
            RetryOn::ServerError => Self::ServerError,
            RetryOn::GatewayError => Self::GatewayError,
            RetryOn::Reset => Self::Reset,
            RetryOn::Timeout => Self::Timeout,
        }
    }
}

impl BackoffSpec {
    pub(super) fn apply_to(&self, to: &mut Backoff) {
        let Self { base, cap, jitter } = self;
        set(&mut to.base, base.map(|base| base.0));
        set(&mut to.cap, cap.map(|cap| cap.0));
        set(&mut to.jitter, *jitter);
    }

    /// Only what one layer says itself: against another's, the longest wait gives way.
    pub(super) fn check(&self, at: &str, faults: &mut Faults) {
        if let (Some(base), Some(cap)) = (self.base, self.cap) {
            let reason = format_args!("must be at least base, {base}, is {cap}");
            faults.require(cap.0 >= base.0, at, "cap", reason);
        }
    }
}

impl Apply for RetryBudget {
    fn apply(&self, to: &mut TrafficPolicy) {
        let Self {
            ratio,
            minimum_rate,
            window,
        } = self;
        let budget = &mut to.settings.budget;
        set(&mut budget.ratio, *ratio);
        set(&mut budget.minimum_rate, *minimum_rate);
        set(&mut budget.window, window.map(|window| window.0));
    }
}
