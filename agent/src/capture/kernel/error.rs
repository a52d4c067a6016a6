//! What can go wrong between the agent and the kernel.

use std::io;
use std::path::PathBuf;

use aya::EbpfError;
use aya::maps::MapError;
use aya::programs::ProgramError;
use thiserror::Error;

/// Why the kernel side does not do what was asked.
#[derive(Debug, Error)]
pub enum KernelError {
    /// A file, directory or pin could not be used.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Pins can only lie on a bpffs.
    #[error("{path} is not on a bpffs: mount one (mount -t bpf bpf {path})")]
    NotBpffs {
        /// The directory for pins.
        path: PathBuf,
    },
    /// The object does not load: maps could not be made, or pinned ones do not fit.
    #[error("the kernel programs do not load: {0}")]
    Object(#[from] EbpfError),
    /// The embedded object lacks what the agent expects: it is of another version.
    #[error("the embedded object has no {0}: run `cargo xtask build` and build the agent again")]
    Missing(&'static str),
    /// The verifier refused a program, or memory is short.
    #[error("program {program} does not load: {source}")]
    Program {
        /// Its name.
        program: &'static str,
        /// The kernel's answer, with the verifier's log.
        source: ProgramError,
    },
    /// A program could not be attached.
    #[error("program {program} cannot be attached: {source}")]
    Attach {
        /// Its name.
        program: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A map is at its bound.
    #[error("map {map} is full: it holds at most {bound} entries")]
    Full {
        /// Its name.
        map: &'static str,
        /// Its bound.
        bound: u32,
    },
    /// Any other answer of a map.
    #[error("map {map}: {source}")]
    Map {
        /// Its name.
        map: &'static str,
        /// The kernel's answer.
        source: MapError,
    },
}

impl KernelError {
    pub(super) fn file(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }
}
