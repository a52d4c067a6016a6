//! Whether a failed attempt is made again, when, and with how much time.
//!
//! Three questions, in this order: is the outcome one that another attempt may mend; may this
//! request be sent again at all; and is there an attempt, time and budget left. What provably never
//! reached an application may always be sent again, whatever the method and whatever the policy.

use std::time::Duration;

use rand::Rng;

use super::backoff::Backoff;
use super::budget::{Deposit, Purse};
use super::hedge::Hedge;
use super::outcome::{Code, Failure, Outcome, grpc};
use super::time::Timestamp;
use super::timeout::Deadline;
use super::validate::{Faults, Validate, join};

/// When and how requests of a route are retried.
#[derive(Clone, Debug, PartialEq)]
pub struct RetryPolicy {
    /// Attempts beyond the first. Range 0 to 10, default 2.
    pub retries: u32,
    /// What is retried besides what never reached an application. Default nothing: a route asks for
    /// it. A route that gives a number but no condition gets [`Condition::usual`].
    pub conditions: Vec<Condition>,
    /// The wait before an attempt. Default 25 ms doubling to 250 ms, all of it by chance.
    pub backoff: Backoff,
    /// The longest `Retry-After` that is waited for; a longer one ends the request. Range 0 to
    /// 60 s, default 1 s.
    pub retry_after_cap: Duration,
    /// Which methods may be sent again once bytes were sent.
    pub repeat: Repeat,
    /// The most of a body that is kept to send it again, in bytes. Range 0 to 16 MiB, default
    /// 64 KiB; a body that is larger is not replayed.
    pub replay_bytes: usize,
    /// A second attempt before the first has failed. Default none.
    pub hedge: Option<Hedge>,
}

/// An outcome that is worth another attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Any 5xx.
    ServerError,
    /// 502, 503, 504.
    GatewayError,
    /// The connection or stream broke, or the answer was not understood.
    Reset,
    /// The attempt took too long.
    Timeout,
    /// This very status.
    Code(Code),
}

/// Which requests may be sent again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repeat {
    /// Those whose method is idempotent (RFC 9110 §9.2.2).
    #[default]
    Idempotent,
    /// All: the route vouches for its handlers.
    Any,
}

/// What a request is, as far as sending it again goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nature {
    /// Its method's.
    pub method: Method,
    /// Its body's.
    pub body: Body,
}

/// Whether doing it twice is doing it once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// GET, HEAD, OPTIONS, TRACE: also may be hedged.
    Safe,
    /// PUT, DELETE.
    Idempotent,
    /// POST, PATCH, CONNECT, and what nobody knows.
    Other,
}

impl Method {
    /// By name, case-sensitive as RFC 9110 has it.
    pub fn named(name: &str) -> Self {
        match name {
            "GET" | "HEAD" | "OPTIONS" | "TRACE" => Self::Safe,
            "PUT" | "DELETE" => Self::Idempotent,
            _ => Self::Other,
        }
    }
}

/// Whether the body can be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// There is none.
    None,
    /// It is wholly buffered.
    Buffered,
    /// It is still streaming, or was larger than is kept.
    Streaming,
}

/// What is known of a failed attempt besides its outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Whether any part of the answer went to the client already.
    pub answer: Answer,
    /// `Retry-After` of the answer, as a wait from now.
    pub retry_after: Option<Duration>,
}

/// How far the answer got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Answer {
    /// Nothing was passed on.
    #[default]
    Held,
    /// The client has seen some of it: it cannot be taken back.
    Begun,
}

/// What to do after an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Wait so long, then try again, elsewhere first.
    Retry {
        /// The wait.
        after: Duration,
    },
    /// The outcome is final.
    Stop(Stop),
}

/// Why there is no further attempt; the label of the metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stop {
    /// It succeeded, or nobody failed.
    Done,
    /// The outcome is not one to retry.
    NotRetriable,
    /// The request may not be sent twice.
    NotRepeatable,
    /// The client has seen part of the answer.
    AnswerBegun,
    /// No attempt is left.
    AttemptsSpent,
    /// The deadline would pass first.
    DeadlineNear,
    /// The destination asks to wait for longer than the cap.
    RetryAfterTooLong,
    /// The budget is spent: the original error goes through.
    BudgetSpent,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            retries: 2,
            conditions: Vec::new(),
            backoff: Backoff {
                base: Duration::from_millis(25),
                cap: Duration::from_millis(250),
                jitter: 1.0,
            },
            retry_after_cap: Duration::from_secs(1),
            repeat: Repeat::default(),
            replay_bytes: 64 * 1024,
            hedge: None,
        }
    }
}

impl RetryPolicy {
    /// The policy of a route that asks for retries. Without a condition, a number alone would retry
    /// next to nothing (others do so): the usual ones are meant.
    pub fn of_route(retries: u32, conditions: Vec<Condition>) -> Self {
        Self {
            retries,
            conditions: if conditions.is_empty() {
                Condition::usual()
            } else {
                conditions
            },
            ..Self::default()
        }
    }
}

impl Condition {
    /// Gateway errors, broken streams, and the gRPC codes that Envoy and Linkerd agree on.
    pub fn usual() -> Vec<Self> {
        use grpc::{CANCELLED, DEADLINE_EXCEEDED, INTERNAL, RESOURCE_EXHAUSTED, UNAVAILABLE};
        let codes = [
            CANCELLED,
            DEADLINE_EXCEEDED,
            INTERNAL,
            RESOURCE_EXHAUSTED,
            UNAVAILABLE,
        ];
        let grpc = codes.into_iter().map(|code| Self::Code(Code::Grpc(code)));
        [Self::GatewayError, Self::Reset, Self::Timeout]
            .into_iter()
            .chain(grpc)
            .collect()
    }

    fn meets(self, outcome: Outcome) -> bool {
        match (self, outcome) {
            (Self::Code(wanted), _) => outcome.code() == Some(wanted),
            (Self::ServerError, _) => matches!(outcome.code(), Some(Code::Http(500..=599))),
            (Self::GatewayError, _) => matches!(outcome.code(), Some(Code::Http(502..=504))),
            (Self::Reset, Outcome::Failure(Failure::Reset | Failure::Malformed)) => true,
            (Self::Timeout, Outcome::Failure(Failure::Timeout)) => true,
            _ => false,
        }
    }
}

impl Validate for RetryPolicy {
    fn check(&self, at: &str, faults: &mut Faults) {
        faults.range(self.retries, 0, 10, at, "retries");
        self.backoff.check(&join(at, "backoff"), faults);
        faults.duration(
            self.retry_after_cap,
            Duration::ZERO,
            Duration::from_secs(60),
            at,
            "retryAfterCap",
        );
        faults.range(self.replay_bytes, 0, 16 << 20, at, "replayBytes");
        for condition in &self.conditions {
            let fine = !matches!(condition, Condition::Code(Code::Http(code)) if !(400..=599).contains(code))
                && !matches!(condition, Condition::Code(Code::Grpc(code)) if !(1..=16).contains(code));
            faults.require(
                fine,
                at,
                "codes",
                format_args!("must be 400 to 599, or gRPC 1 to 16, is {condition:?}"),
            );
        }
        if let Some(hedge) = &self.hedge {
            hedge.check(&join(at, "hedge"), faults);
        }
    }
}

/// The attempts of one request.
#[derive(Debug)]
pub struct Retries {
    nature: Nature,
    deadline: Deadline,
    deposit: Deposit,
    made: u32,
}

impl Retries {
    /// A request begins: it pays into the budget, once.
    pub fn begin(budget: &impl Purse, nature: Nature, deadline: Deadline, now: Timestamp) -> Self {
        Self {
            nature,
            deadline,
            deposit: budget.deposit(now),
            made: 0,
        }
    }

    /// An attempt has ended: what now?
    pub fn next(
        &mut self,
        policy: &RetryPolicy,
        outcome: Outcome,
        facts: Facts,
        budget: &impl Purse,
        rng: &mut (impl Rng + ?Sized),
        now: Timestamp,
    ) -> Decision {
        match self.wait(policy, outcome, facts, rng, now) {
            Err(why) => Decision::Stop(why),
            // Asked last: a retry that will not happen must not cost one.
            Ok(_) if budget.withdraw(&self.deposit, now).is_err() => {
                Decision::Stop(Stop::BudgetSpent)
            }
            Ok(after) => {
                self.made += 1;
                Decision::Retry { after }
            }
        }
    }

    /// The first attempt has not answered yet: may a second be made beside it?
    pub fn hedge(
        &mut self,
        policy: &RetryPolicy,
        waited: Duration,
        budget: &impl Purse,
        now: Timestamp,
    ) -> bool {
        let Some(hedge) = &policy.hedge else {
            return false;
        };
        let due = self.nature.method == Method::Safe
            && self.nature.body != Body::Streaming
            && self.made < hedge.attempts.min(policy.retries)
            && waited >= hedge.after
            && self.deadline.allows(Duration::ZERO, now)
            && budget.withdraw(&self.deposit, now).is_ok();
        self.made += u32::from(due);
        due
    }

    /// What has become of the body since: one that outgrew what is kept cannot be sent again.
    pub const fn set_body(&mut self, body: Body) {
        self.nature.body = body;
    }

    /// Attempts granted beyond the first.
    pub const fn made(&self) -> u32 {
        self.made
    }

    /// Whether the policy knows of a further attempt.
    pub const fn are_left(&self, policy: &RetryPolicy) -> bool {
        self.made < policy.retries
    }

    /// Whether a failure of this request could be mended by another attempt at all: such a request
    /// may be the probe of an ejected endpoint.
    pub fn can_repeat(&self, policy: &RetryPolicy) -> bool {
        self.are_left(policy) && self.is_repeatable(policy)
    }

    fn is_repeatable(&self, policy: &RetryPolicy) -> bool {
        let method = self.nature.method != Method::Other || policy.repeat == Repeat::Any;
        method && self.nature.body != Body::Streaming
    }

    fn wait(
        &self,
        policy: &RetryPolicy,
        outcome: Outcome,
        facts: Facts,
        rng: &mut (impl Rng + ?Sized),
        now: Timestamp,
    ) -> Result<Duration, Stop> {
        let unsent = matches!(outcome, Outcome::Unsent(_));
        match outcome {
            Outcome::Success | Outcome::Shed | Outcome::Cancelled => return Err(Stop::Done),
            _ if unsent
                || policy
                    .conditions
                    .iter()
                    .any(|condition| condition.meets(outcome)) => {}
            _ => return Err(Stop::NotRetriable),
        }
        if facts.answer == Answer::Begun {
            return Err(Stop::AnswerBegun);
        }
        // What was never sent has its body still, unless it was streamed away.
        let repeatable = if unsent {
            self.nature.body != Body::Streaming
        } else {
            self.is_repeatable(policy)
        };
        if !repeatable {
            return Err(Stop::NotRepeatable);
        }
        if !self.are_left(policy) {
            return Err(Stop::AttemptsSpent);
        }
        let backoff = policy.backoff.wait(self.made, rng);
        let wait = match facts.retry_after {
            Some(asked) if asked > policy.retry_after_cap => return Err(Stop::RetryAfterTooLong),
            Some(asked) => asked.max(backoff),
            None => backoff,
        };
        if self.deadline.allows(wait, now) {
            Ok(wait)
        } else {
            Err(Stop::DeadlineNear)
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
#[path = "retry_tests.rs"]
mod tests;
