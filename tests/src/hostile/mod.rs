//! Attacks by a process in a pod, root with a container's default capabilities, each with the same attack
//! where there is no defence.

mod admin;
mod field;
mod floods;
mod intruder;
mod kernel;
mod ports;
mod posing;
mod raw;
mod reuse;
mod trial;

pub use intruder::{AttackOptions, AttackReport, run as attack};
pub use trial::{AttackResult, Outcome, run};
