//! Every kind of connect, made by a program in a pod and counted on three sides: by the client, by the server
//! and by the agents.

mod client;
mod kind;
mod trial;

pub use client::{ConnectOptions, ConnectReport, give, run as make};
pub use kind::{Expected, Kind};
pub use trial::{Extent, KindResult, run};
