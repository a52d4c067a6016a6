//! Verdicts of the kernel programs in the agent's log (`RUST_LOG=undermesh::kernel=debug`). Only debug
//! builds embed programs that write them.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Weak};
use std::thread;

use aya::Ebpf;
use aya_log::EbpfLogger;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How many milliseconds the reader waits for records before it looks whether it is still wanted.
const PATIENCE_MS: u8 = 200;

/// Hands the programs' records to `tracing`.
struct ToTracing;

impl log::Log for ToTracing {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        tracing::enabled!(target: "undermesh::kernel", tracing::Level::DEBUG)
    }

    fn log(&self, record: &log::Record<'_>) {
        tracing::debug!(target: "undermesh::kernel", "{}", record.args());
    }

    fn flush(&self) {}
}

/// Reads records until it is dropped.
pub(super) struct VerdictLog(#[allow(dead_code, reason = "its end is the reader's")] Arc<()>);

impl VerdictLog {
    /// None if the programs write none. Records that nobody reads in time are lost: the kernel's
    /// buffer is bounded, and no verdict waits for it.
    pub(super) fn start(ebpf: &mut Ebpf) -> io::Result<Option<Self>> {
        let Ok(records) = EbpfLogger::init_with_logger(ebpf, ToTracing) else {
            return Ok(None);
        };
        let wanted = Arc::new(());
        let reader = Arc::downgrade(&wanted);
        thread::Builder::new()
            .name("verdict-log".to_owned())
            .spawn(move || read(records, &reader))?;
        Ok(Some(Self(wanted)))
    }
}

fn read(mut records: EbpfLogger<ToTracing>, wanted: &Weak<()>) {
    while wanted.strong_count() > 0 {
        let mut ready = [PollFd::new(records.as_fd(), PollFlags::POLLIN)];
        // An interrupted wait only looks earlier.
        let _ = poll(&mut ready, PollTimeout::from(PATIENCE_MS));
        records.flush();
    }
}
