//! The node agent of Undermesh. Its folders tell the story of a connection in the order in which
//! it happens: see `docs/architecture.md`.

pub mod admin;
pub mod agent;
pub mod capture;
pub mod cli;
pub mod discovery;
pub mod fairness;
pub mod handover;
pub mod http;
pub mod identity;
pub mod inbound;
pub mod mesh;
pub mod outbound;
pub mod relay;
pub mod resilience;
pub mod telemetry;
pub mod tunnel;
pub mod watchdog;
pub mod workers;
