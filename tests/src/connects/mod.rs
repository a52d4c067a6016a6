//! Every kind of connect, made by a program in a pod and counted on three sides: by the client, by the server
//! and by the agents.

mod client;
mod kind;
mod trial;

pub use client::{ConnectOptions, ConnectReport, run as make};
pub use kind::{Expected, Kind};
pub use trial::{Extent, KindResult, run};

/// What is not run, and why.
pub const NOT_RUN: [(&str, &str); 1] = [(
    "past_the_limit",
    "the answer to a pod's connection beyond 16,384 is counted as pod_full; it is not measured here yet",
)];
