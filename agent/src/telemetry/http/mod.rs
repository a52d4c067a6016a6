//! Requests: metrics and the access log.
//!
//! A downstream connection has one [`Requester`]; each of its requests is a [`RequestRecord`], a
//! guard that counts once at its end, whatever the end is:
//!
//! ```text
//! let requester = telemetry.requester(Direction::Outbound, party, original_destination, connection.id());
//! let mut record = requester.request(RequestInfo { .. });
//! record.route(Some(&service), Some(&rule.name));
//! record.endpoint(address, workload, Security::MutualTls);
//! record.attempt(AttemptView { .. });
//! record.answered(StatusCode::OK);   // the record goes with the body
//! record.close(RequestEnd::Complete);
//! ```

mod access;
mod events;
mod flag;
mod info;
mod labels;
mod record;
mod requester;
pub(super) mod series;
mod table;
#[cfg(test)]
pub(super) mod tests;

pub use events::RequestEvent;
pub use flag::{REASON_HEADER, ResponseFlag};
pub use info::{AttemptView, HttpProtocol, RequestEnd, RequestInfo};
pub use record::{RequestEvents, RequestRecord};
pub use requester::Requester;
