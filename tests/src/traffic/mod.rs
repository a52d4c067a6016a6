//! Traffic of the tests' own: a server and a client that check every byte and count for themselves, so that
//! no result rests on what an agent says. The program is `undermesh-traffic`.

mod client;
mod control;
mod options;
mod payload;
mod report;
mod serve;

pub use client::run as run_client;
pub use control::query;
pub use options::{ClientOptions, Kind, ServeOptions};
pub use payload::Pattern;
pub use report::{ClientReport, Failure, Latencies, Latency, ServerReport};
pub use serve::run as run_server;
