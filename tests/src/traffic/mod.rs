//! Traffic of the tests' own: a server and a client that check every byte and count for themselves, so that
//! no result rests on what an agent says. The program is `undermesh-traffic`.

mod client;
pub(crate) mod control;
mod options;
mod payload;
mod report;
mod serve;

pub(crate) use client::asked_to_stop;
pub use client::run as run_client;
pub(crate) use control::listen as answer_reports;
pub use control::query;
pub use options::{ClientOptions, Kind, ServeOptions};
pub(crate) use options::{format_duration, parse_duration};
pub use payload::Pattern;
pub use report::{ClientReport, Failure, Latencies, Latency, ServerReport};
pub(crate) use serve::listen;
pub use serve::run as run_server;
