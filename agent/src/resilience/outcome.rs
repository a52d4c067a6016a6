//! How an attempt or a request ended, and whose failure it was.

use std::ops::RangeInclusive;

use serde::Serialize;

use super::validate::{Faults, Validate};

/// How one attempt, or a whole request, ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Answered as it should be.
    Success,
    /// Answered with an error that is the caller's own (404, 429): the endpoint did its work.
    CallerError(Code),
    /// The endpoint failed.
    Failure(Failure),
    /// The request provably never reached an application, so it may be sent again, whatever it is.
    Unsent(Unsent),
    /// This side refused it (a limit, a full queue): nobody's failure.
    Shed,
    /// The client went away before an answer: no verdict.
    Cancelled,
}

/// The ways in which an endpoint fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    /// It answered with a failure.
    Status(Code),
    /// The connection or stream broke after something was sent.
    Reset,
    /// No answer in the time allowed for an attempt.
    Timeout,
    /// The answer was not understood.
    Malformed,
}

/// Why a request provably never reached an application.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unsent {
    /// No connection: refused or unreachable.
    ConnectFailed,
    /// No connection within the connect timeout.
    ConnectTimeout,
    /// HTTP/2 REFUSED_STREAM (RFC 9113 §8.7).
    StreamRefused,
    /// HTTP/2 GOAWAY whose last stream id is below this stream's.
    GoingAway,
}

/// A status of the protocol that answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// An HTTP status, 100 to 599.
    Http(u16),
    /// A gRPC status, 0 to 16.
    Grpc(u8),
}

/// What an outcome says about the one that is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It works.
    Good,
    /// It fails.
    Bad,
}

impl Outcome {
    /// What a single attempt says about its endpoint; `None` is no verdict.
    ///
    /// A refused stream or a GOAWAY is an endpoint that is full or leaves in an orderly way: the
    /// attempt goes elsewhere, but it is no fault to be ejected for.
    pub const fn of_endpoint(self) -> Option<Verdict> {
        match self {
            Self::Success | Self::CallerError(_) => Some(Verdict::Good),
            Self::Failure(_) | Self::Unsent(Unsent::ConnectFailed | Unsent::ConnectTimeout) => {
                Some(Verdict::Bad)
            }
            Self::Unsent(Unsent::StreamRefused | Unsent::GoingAway)
            | Self::Shed
            | Self::Cancelled => None,
        }
    }

    /// What a final outcome says about the destination; `None` is no verdict.
    pub const fn of_destination(self) -> Option<Verdict> {
        match self {
            Self::Success | Self::CallerError(_) => Some(Verdict::Good),
            Self::Failure(_) | Self::Unsent(_) => Some(Verdict::Bad),
            Self::Shed | Self::Cancelled => None,
        }
    }

    /// The status that came back, if one did.
    pub const fn code(self) -> Option<Code> {
        match self {
            Self::CallerError(code) | Self::Failure(Failure::Status(code)) => Some(code),
            _ => None,
        }
    }

    /// The snake_case name for metric labels.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::CallerError(_) => "caller_error",
            Self::Failure(Failure::Status(_)) => "status",
            Self::Failure(Failure::Reset) => "reset",
            Self::Failure(Failure::Timeout) => "timeout",
            Self::Failure(Failure::Malformed) => "malformed",
            Self::Unsent(Unsent::ConnectFailed) => "connect_failed",
            Self::Unsent(Unsent::ConnectTimeout) => "connect_timeout",
            Self::Unsent(Unsent::StreamRefused) => "stream_refused",
            Self::Unsent(Unsent::GoingAway) => "going_away",
            Self::Shed => "shed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// gRPC's status codes, by number (grpc.io/docs/guides/status-codes).
pub mod grpc {
    /// OK.
    pub const OK: u8 = 0;
    /// CANCELLED.
    pub const CANCELLED: u8 = 1;
    /// UNKNOWN: also what most servers make of an exception.
    pub const UNKNOWN: u8 = 2;
    /// DEADLINE_EXCEEDED.
    pub const DEADLINE_EXCEEDED: u8 = 4;
    /// RESOURCE_EXHAUSTED.
    pub const RESOURCE_EXHAUSTED: u8 = 8;
    /// INTERNAL.
    pub const INTERNAL: u8 = 13;
    /// UNAVAILABLE.
    pub const UNAVAILABLE: u8 = 14;
    /// DATA_LOSS.
    pub const DATA_LOSS: u8 = 15;
}

/// Which HTTP statuses are the endpoint's failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpClassifier {
    /// Statuses that are failures of the endpoint. Default 500–599.
    pub failures: Vec<RangeInclusive<u16>>,
}

impl Default for HttpClassifier {
    fn default() -> Self {
        Self {
            failures: vec![500..=599],
        }
    }
}

impl HttpClassifier {
    /// The outcome of an answer with this status.
    pub fn classify(&self, status: u16) -> Outcome {
        if self.failures.iter().any(|range| range.contains(&status)) {
            Outcome::Failure(Failure::Status(Code::Http(status)))
        } else if status >= 400 {
            Outcome::CallerError(Code::Http(status))
        } else {
            Outcome::Success
        }
    }
}

impl Validate for HttpClassifier {
    fn check(&self, at: &str, faults: &mut Faults) {
        for range in &self.failures {
            let fine = *range.start() >= 100 && *range.end() <= 599 && range.start() <= range.end();
            faults.require(
                fine,
                at,
                "failures",
                format_args!("must be ranges within 100 to 599, is {range:?}"),
            );
        }
    }
}

/// Which gRPC statuses are the endpoint's failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrpcClassifier {
    /// Default UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE, DATA_LOSS.
    pub failures: Vec<u8>,
}

impl Default for GrpcClassifier {
    fn default() -> Self {
        use grpc::{DATA_LOSS, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE, UNKNOWN};
        Self {
            failures: vec![UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE, DATA_LOSS],
        }
    }
}

impl GrpcClassifier {
    /// The outcome of an answer with this `grpc-status`, from headers, trailers-only or trailers. An
    /// HTTP answer without any is classified by [`HttpClassifier`].
    pub fn classify(&self, status: u8) -> Outcome {
        if self.failures.contains(&status) {
            Outcome::Failure(Failure::Status(Code::Grpc(status)))
        } else if status == grpc::OK {
            Outcome::Success
        } else {
            Outcome::CallerError(Code::Grpc(status))
        }
    }
}

impl Validate for GrpcClassifier {
    fn check(&self, at: &str, faults: &mut Faults) {
        for status in &self.failures {
            faults.range(*status, 1, 16, at, "failures");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_shed_is_nobodys_failure_and_a_cancellation_is_no_verdict() {
        for outcome in [Outcome::Shed, Outcome::Cancelled] {
            assert_eq!(outcome.of_endpoint(), None);
            assert_eq!(outcome.of_destination(), None);
        }
    }

    #[test]
    fn a_connect_failure_counts_like_a_failed_request() {
        let outcome = Outcome::Unsent(Unsent::ConnectFailed);
        assert_eq!(outcome.of_endpoint(), Some(Verdict::Bad));
        assert_eq!(outcome.of_destination(), Some(Verdict::Bad));
    }

    #[test]
    fn an_orderly_goodbye_is_not_held_against_the_endpoint() {
        assert_eq!(Outcome::Unsent(Unsent::GoingAway).of_endpoint(), None);
        assert_eq!(Outcome::Unsent(Unsent::StreamRefused).of_endpoint(), None);
    }

    #[test]
    fn http_and_grpc_statuses_are_told_apart_into_failures_of_endpoint_and_caller() {
        let http = HttpClassifier::default();
        assert_eq!(http.classify(200), Outcome::Success);
        assert_eq!(http.classify(404), Outcome::CallerError(Code::Http(404)));
        assert_eq!(
            http.classify(503),
            Outcome::Failure(Failure::Status(Code::Http(503)))
        );
        let grpc = GrpcClassifier::default();
        assert_eq!(grpc.classify(0), Outcome::Success);
        assert_eq!(grpc.classify(5), Outcome::CallerError(Code::Grpc(5)));
        assert_eq!(
            grpc.classify(14),
            Outcome::Failure(Failure::Status(Code::Grpc(14)))
        );
    }

    #[test]
    fn a_classifier_can_be_configured_and_says_which_range_is_wrong() {
        let teapot = HttpClassifier {
            failures: vec![418..=418],
        };
        assert_eq!(teapot.classify(500), Outcome::CallerError(Code::Http(500)));
        assert_eq!(teapot.classify(418).of_endpoint(), Some(Verdict::Bad));
        let wrong = HttpClassifier {
            failures: vec![500..=700],
        };
        let faults = wrong.validate().unwrap_err();
        assert_eq!(faults[0].field, "failures");
        assert!(faults[0].reason.contains("500..=700"));
    }
}
