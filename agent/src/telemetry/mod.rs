//! What the agent knows about connections and requests and tells others: the table of live
//! connections, the metrics, and the access log.
//!
//! A connection is announced with [`Telemetry::open`], which gives a [`Connection`]: a guard. It
//! stands in the table until it is closed, and it cannot be forgotten, because dropping it counts
//! as [`CloseReason::Aborted`]. The path of the bytes touches nothing but the two atomics of its
//! [`ByteCount`].
//!
//! The names of labels, of access-log fields and of the fields of [`ConnectionView`] are the same;
//! where Istio has a name for the thing, it is Istio's. `docs/metrics.md` lists them all.

mod access_log;
mod chain;
mod connection;
mod end;
mod history;
mod http;
mod hub;
mod info;
mod labels;
mod line;
mod log_queue;
mod logging;
mod process;
mod samples;
mod series;
#[cfg(test)]
pub(crate) mod testing;
mod view;

pub use self::http::{
    AttemptView, HttpProtocol, REASON_HEADER, RequestEnd, RequestEvent, RequestEvents, RequestInfo,
    RequestRecord, Requester, ResponseFlag,
};
pub use access_log::TARGET as ACCESS_LOG_TARGET;
pub use chain::error_chain;
pub use connection::{ByteCount, Connection};
pub use end::{CloseReason, End, FailureReason, Side};
pub use hub::{Telemetry, TelemetryOptions, housekeep};
pub use info::{ConnectionInfo, Direction, Party, Security};
pub use logging::{LogFormat, Logging, LoggingError};
pub use samples::{Labelled, SampleLabels};
pub use view::{ConnectionView, EndedView, Phase};
