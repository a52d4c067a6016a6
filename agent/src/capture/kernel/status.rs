//! The kernel side as `/kernel` shows it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use serde::Serialize;
use undermesh_common::{LAYOUT, bounds};

use super::{
    CGROUP_PROGRAMS, Kernel, KernelError, LOOKUP_PREFIX, ProbeCgroup, features, maps::Maps,
};
use crate::capture::sys;

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
    /// Cgroups of which the processes may probe the pods, as they were found at the last look.
    pub probe_cgroups: Vec<ProbeCgroup>,
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

impl Kernel {
    /// What the kernel says at this moment.
    #[must_use]
    pub fn status(&self) -> KernelStatus {
        KernelStatus {
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
                .map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned()),
            layout: format!("{LAYOUT:016x}"),
            pins: self.pins.directory().to_owned(),
            former_layouts: self.pins.former_layouts().unwrap_or_default(),
            programs: self.programs(),
            foreign_programs: self.foreign_programs(),
            probe_cgroups: self.maps.probes.seen(),
            maps: self.map_fill(),
            verdicts: self.counters().into_iter().collect(),
            features: features::all()
                .chain([self.reach.lock().feature()])
                .collect(),
        }
    }

    fn programs(&self) -> Vec<ProgramStatus> {
        let at_cgroup = CGROUP_PROGRAMS.iter().map(|(_, pin, _)| {
            self.program(pin, |info| match info.cgroup_id() {
                0 => AttachPoint::Detached,
                id => AttachPoint::Cgroup {
                    id,
                    path: self.options.cgroup.clone(),
                },
            })
        });
        let lookups = self.pins.names(LOOKUP_PREFIX);
        let at_netns = lookups.iter().map(|pin| {
            self.program(pin, |info| match info.netns_inode() {
                0 => AttachPoint::Detached,
                inode => AttachPoint::Netns { inode },
            })
        });
        at_cgroup.chain(at_netns).collect()
    }

    fn program(
        &self,
        pin: &str,
        attach_point: impl FnOnce(&sys::LinkInfo) -> AttachPoint,
    ) -> ProgramStatus {
        let info = self.pins.link(pin);
        ProgramStatus {
            name: pin.trim_start_matches("link_").to_owned(),
            attached: info.as_ref().map_or(AttachPoint::Detached, attach_point),
            program_id: info.map_or(0, |info| info.program_id),
            link_id: info.map_or(0, |info| info.id),
        }
    }

    fn foreign_programs(&self) -> Vec<ForeignProgram> {
        let Ok(cgroup) = File::open(&self.options.cgroup) else {
            return Vec::new();
        };
        let mut foreign = Vec::new();
        for (_, pin, kind) in CGROUP_PROGRAMS {
            let own = self.pins.link(pin).map(|info| info.program_id);
            let all = sys::attached(cgroup.as_fd(), kind).unwrap_or_default();
            foreign.extend(
                all.into_iter()
                    .filter(|id| Some(*id) != own)
                    .map(|program_id| ForeignProgram {
                        hook: pin.trim_start_matches("link_"),
                        program_id,
                    }),
            );
        }
        foreign
    }

    fn map_fill(&self) -> Vec<MapStatus> {
        fn fill<K>(name: &'static str, bound: u32, keys: Result<Vec<K>, KernelError>) -> MapStatus {
            MapStatus {
                name,
                entries: keys.ok().map(|keys| keys.len()),
                bound,
            }
        }
        let Maps {
            pods,
            targets,
            admitted,
            listeners,
            probes,
            node_addresses,
            ..
        } = &self.maps;
        let (ports, probers) = (&probes.ports, &probes.cgroups);
        vec![
            fill(pods.name(), pods.bound(), pods.keys()),
            fill(targets.name(), targets.bound(), targets.keys()),
            fill(admitted.name(), admitted.bound(), admitted.keys()),
            fill("LISTENERS", bounds::LISTENERS, listeners.keys()),
            fill(
                node_addresses.name(),
                node_addresses.bound(),
                node_addresses.keys(),
            ),
            fill(ports.name(), ports.bound(), ports.keys()),
            fill(probers.name(), probers.bound(), probers.keys()),
        ]
    }
}
