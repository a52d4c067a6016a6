//! HTTP of the tests' own: a server that misbehaves on demand, and a client that sends at a given rate, so that
//! what a client saw and what a server received is counted by neither of the agents. Both are subcommands of
//! `undermesh-traffic`.

mod attack;
mod behaviour;
mod load;
mod options;
mod report;
mod serve;

pub use attack::{HttpAttack, HttpAttackOptions, HttpAttackReport, run as run_attack};
pub use behaviour::{Behaviour, behave};
pub use load::run as run_load;
pub use options::{LoadOptions, WebOptions};
pub use report::{LoadReport, Tick, WebReport};
pub use serve::run as run_web;

/// Header in which a server says its name.
pub const SERVED_BY: &str = "x-served-by";
/// Header in which a server says which path it was asked for.
pub const ASKED_FOR: &str = "x-asked-for";
/// Header in which the mesh says why an answer is its own.
pub const REASON: &str = "x-undermesh-reason";
/// Header in which the mesh numbers the attempts of a request.
pub const ATTEMPT: &str = "x-undermesh-attempt";
