//! The kernel side as `/kernel` shows it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

/// Programs, maps, verdicts, features: what the kernel says at this moment, not what was asked.
#[derive(Debug, Clone, Serialize)]
pub struct KernelStatus {
    /// Release of the kernel.
    pub kernel: String,
    /// Hash of the layout that programs and maps share.
    pub layout: String,
    /// Directory of the pins.
    pub pins: PathBuf,
    /// Directories of pins that agents of another layout left; their programs still run.
    pub former_layouts: Vec<PathBuf>,
    /// Our programs.
    pub programs: Vec<ProgramStatus>,
    /// Programs of others on the same cgroup and hook: one that rewrites addresses sends captured
    /// connections astray.
    pub foreign_programs: Vec<ForeignProgram>,
    /// Our maps.
    pub maps: Vec<MapStatus>,
    /// How often each verdict was given, since the maps were made.
    pub verdicts: BTreeMap<&'static str, u64>,
    /// What this kernel can do.
    pub features: Vec<FeatureStatus>,
}

/// One attached program.
#[derive(Debug, Clone, Serialize)]
pub struct ProgramStatus {
    /// Name of its pin.
    pub name: String,
    /// Where it is attached.
    pub attached: AttachPoint,
    /// The kernel's number of the program.
    pub program_id: u32,
    /// The kernel's number of the link.
    pub link_id: u32,
}

/// Where a program is attached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AttachPoint {
    /// To a cgroup.
    Cgroup {
        /// Inode of its directory.
        id: u64,
        /// Path that was given.
        path: PathBuf,
    },
    /// To a network namespace.
    Netns {
        /// Its inode.
        inode: u64,
    },
    /// To nothing any more: its target is gone, or no link is pinned.
    Detached,
}

/// A program of somebody else.
#[derive(Debug, Clone, Serialize)]
pub struct ForeignProgram {
    /// The hook.
    pub hook: &'static str,
    /// The kernel's number of the program.
    pub program_id: u32,
}

/// How full a map is.
#[derive(Debug, Clone, Serialize)]
pub struct MapStatus {
    /// Its name.
    pub name: &'static str,
    /// Entries now, none if the kernel did not tell.
    pub entries: Option<usize>,
    /// Entries at most.
    pub bound: u32,
}

/// A feature of the kernel.
#[derive(Debug, Clone, Serialize)]
pub struct FeatureStatus {
    /// Its name.
    pub name: &'static str,
    /// Whether it is used.
    pub used: bool,
    /// How that is known, or why not.
    pub reason: &'static str,
}
