//! Attacks by a process in a pod, root with a container's default capabilities, each with the same attack
//! where there is no defence.

mod intruder;
mod trial;

pub use intruder::{AttackOptions, AttackReport, run as attack};
pub use trial::{AttackResult, Outcome, run};

/// What is not run, and why.
pub const NOT_RUN: [(&str, &str); 2] = [
    (
        "reused_address",
        "the lab never gives an address twice, so a dead pod's cannot come back within 100 ms",
    ),
    (
        "exhaust_ports",
        "a pod's source ports towards one destination are not used up here yet",
    ),
];
