//! The agent's resilience module, built without the agent, and a simulation around it.
//!
//! The module is compiled from the agent's own source, so that what is simulated, model-checked
//! and measured here is what the agent runs, and none of it needs an eBPF object or a root shell.

#[path = "../../agent/src/resilience/mod.rs"]
pub mod resilience;

pub mod canvas;
pub mod policy;
pub mod report;
pub mod scenario;
pub mod server;
pub mod svg;
pub mod world;
