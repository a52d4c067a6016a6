//! The embedded object: loading it, once for the node and once more for every pod's `sk_lookup`.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use aya::maps::{Array, Map};
use aya::programs::{Program, ProgramError, ProgramFd};
use aya::{Ebpf, EbpfLoader};
use undermesh_common::PodConstants;

use super::KernelError;
use super::verdict_log::VerdictLog;

pub(super) static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/undermesh-ebpf"));

/// Maps that all programs share, and the names of their pins.
const SHARED_MAPS: [(&str, &str); 12] = [
    ("PODS", "pods"),
    ("PROBES", "probes"),
    ("PROBERS", "probers"),
    ("TARGETS", "targets"),
    ("ADMITTED", "admitted"),
    ("LISTENERS", "listeners"),
    ("VERDICTS", "verdicts"),
    ("NATIVE", "native"),
    ("WATCHED", "watched"),
    ("NODE_ADDRESSES", "node_addresses"),
    ("NOTES", "notes"),
    (LOGS, LOGS_PIN),
];

/// In the programs of debug builds only.
const LOGS: &str = "AYA_LOGS";
const LOGS_PIN: &str = "logs";

/// A map of its own for each `sk_lookup` instance.
const CONSTANTS: &str = "CONSTANTS";

pub(super) const CONNECT4: &str = "undermesh_connect4";
pub(super) const CONNECT6: &str = "undermesh_connect6";
pub(super) const SETSOCKOPT: &str = "undermesh_setsockopt";
pub(super) const SOCK_OPS: &str = "undermesh_sock_ops";
pub(super) const LOOKUP: &str = "undermesh_lookup";

/// Loads the object with the maps that are pinned in one directory, or pins new ones there.
///
/// There is one for the whole life of the agent: making one parses the kernel's own BTF, which
/// takes up to 50 ms; loading takes a fraction of a millisecond. The parsed BTF is 35 MiB, and only
/// CO-RE relocations need it, of which programs in Rust have none: it is let go of at once.
pub(super) struct Loader {
    loader: EbpfLoader<'static>,
}

impl Loader {
    pub(super) fn new(pins: &Path) -> Self {
        // A buffer of records has one reader: each agent has its own, and the former one keeps its.
        let _ = std::fs::remove_file(pins.join(LOGS_PIN));
        let mut loader = EbpfLoader::new();
        loader.btf(None);
        for (map, pin) in SHARED_MAPS {
            loader.map_pin_path(map, pins.join(pin));
        }
        Self { loader }
    }

    pub(super) fn load(&mut self) -> Result<Loaded, KernelError> {
        Ok(Loaded {
            ebpf: self.loader.load(OBJECT)?,
        })
    }

    /// The `sk_lookup` program of one pod.
    pub(super) fn lookup(&mut self, constants: &PodConstants) -> Result<OwnedFd, KernelError> {
        let mut loaded = self.load()?;
        // It stays in `loaded` until the verifier has seen the program, which names it by descriptor.
        let map = loaded.map_mut(CONSTANTS)?;
        Array::<_, PodConstants>::try_from(map)
            .and_then(|mut array| array.set(0, constants, 0))
            .map_err(|source| KernelError::Map {
                map: CONSTANTS,
                source,
            })?;
        loaded.program(LOOKUP)
    }
}

/// Maps made or opened, programs ready for the verifier.
pub(super) struct Loaded {
    ebpf: Ebpf,
}

impl Loaded {
    pub(super) fn take_map(&mut self, name: &'static str) -> Result<Map, KernelError> {
        self.ebpf.take_map(name).ok_or(KernelError::Missing(name))
    }

    /// Follows what the programs write to the log, if they do.
    pub(super) fn log(&mut self) -> io::Result<Option<VerdictLog>> {
        VerdictLog::start(&mut self.ebpf)
    }

    fn map_mut(&mut self, name: &'static str) -> Result<&mut Map, KernelError> {
        self.ebpf.map_mut(name).ok_or(KernelError::Missing(name))
    }

    /// Hands a program to the verifier. It lives as long as the descriptor or a link.
    pub(super) fn program(&mut self, name: &'static str) -> Result<OwnedFd, KernelError> {
        let program = self
            .ebpf
            .program_mut(name)
            .ok_or(KernelError::Missing(name))?;
        load(program)
            .and_then(|descriptor| Ok(descriptor.as_fd().try_clone_to_owned()?))
            .map_err(|source| KernelError::Program {
                program: name,
                source,
            })
    }
}

/// The verifier gives up with EAGAIN when a signal reaches the thread meanwhile; libbpf, too, tries
/// five times.
const VERIFIER_TRIES: u32 = 5;

fn load(program: &mut Program) -> Result<&ProgramFd, ProgramError> {
    for _ in 1..VERIFIER_TRIES {
        match verify(program) {
            Err(ProgramError::LoadError { io_error, .. })
                if io_error.kind() == io::ErrorKind::WouldBlock => {}
            verified => {
                verified?;
                return program.fd();
            }
        }
    }
    verify(program)?;
    program.fd()
}

fn verify(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSockopt(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}
