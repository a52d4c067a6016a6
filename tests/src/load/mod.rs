//! Load that is measured: one client on one processor, one server on another, and what they counted in one
//! window of time. The program is `undermesh-load`.
//!
//! `undermesh-traffic` checks every byte and is bound by that; this one moves bytes and keeps time.

mod client;
mod clock;
mod http;
mod options;
mod report;
mod serve;

pub use client::run as run_load;
pub use options::{LoadKind, LoadOptions, SinkOptions};
pub use report::{LoadReport, Microseconds, SinkReport};
pub use serve::run as run_sink;

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// Keeps the calling thread, and threads that it starts, on one processor.
pub fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("cannot run on CPU {cpu}"))
}

/// Keeps a processor from halting until it is killed, or at the latest for `limit`; to be run under
/// SCHED_IDLE, where whatever else wants the processor gets it at once.
pub fn spin(cpu: usize, limit: Duration) -> Result<()> {
    pin(cpu)?;
    let end = Instant::now() + limit;
    while Instant::now() < end {
        std::hint::spin_loop();
    }
    Ok(())
}
