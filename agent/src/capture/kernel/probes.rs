//! The kubelet's probes: which ports of which pods, and the cgroups of those who may.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use parking_lot::Mutex;
use serde::Serialize;
use undermesh_common::{Target, bounds};

use super::holds::{Sign, sign_of_pods};
use super::maps::Table;
use super::{Kernel, KernelError, PodRecord, lookup_pin};

/// How many probe ports of one pod are admitted.
pub const PROBE_PORTS_PER_POD: usize = bounds::PROBE_PORTS_PER_POD as usize;

/// The maps, and what `/kernel` shows of them.
pub(super) struct Probes {
    pub(super) ports: Table<Target, u64>,
    pub(super) cgroups: Table<u64, u32>,
    /// What was found at the last look. Its lock is held through every change of the maps.
    seen: Mutex<Vec<ProbeCgroup>>,
}

/// A cgroup of which the processes may probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ProbeCgroup {
    /// Its directory, as it was given.
    pub path: PathBuf,
    /// The kernel's id of it; a cgroup that is made anew has another.
    pub id: Option<u64>,
    /// Whether the kernel admits its probes.
    pub state: ProbeCgroupState,
    /// What it was found to hold, where that is why it may not probe.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// How far a probing cgroup is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProbeCgroupState {
    /// Its probes are admitted.
    Known,
    /// There is no such directory (yet).
    Absent,
    /// It is no directory of a cgroup2 tree.
    NotCgroup2,
    /// It is not below the cgroup that the programs are attached to: its connections are not seen.
    OutOfReach,
    /// A pod is in it or below it, or it cannot be told that none is. So it stays until the cgroup
    /// is made anew: what held pods once is no kubelet's own.
    HoldsPods,
}

impl Probes {
    pub(super) fn new(ports: Table<Target, u64>, cgroups: Table<u64, u32>) -> Self {
        Self {
            ports,
            cgroups,
            seen: Mutex::default(),
        }
    }

    /// What the last look found.
    pub(super) fn seen(&self) -> Vec<ProbeCgroup> {
        self.seen.lock().clone()
    }

    fn set_ports(&self, pod: &PodRecord, ports: &BTreeSet<u16>) -> Result<(), KernelError> {
        let _changing = self.seen.lock();
        let addresses = [pod.v4.map(IpAddr::V4), pod.v6.map(IpAddr::V6)];
        let wanted: BTreeSet<Target> = addresses
            .into_iter()
            .flatten()
            .flat_map(|address| {
                let declared = ports.iter().take(PROBE_PORTS_PER_POD).copied();
                std::iter::once(0).chain(declared).map(move |port| Target {
                    address: address.into(),
                    port: u32::from(port),
                })
            })
            .collect();
        for target in &wanted {
            self.ports.put(target, &pod.netns_cookie)?;
        }
        self.remove(|target, owner| owner == pod.netns_cookie && !wanted.contains(target))
    }

    /// An entry that was taken over by another pod with the same address is that one's.
    fn remove(&self, is_gone: impl Fn(&Target, u64) -> bool) -> Result<(), KernelError> {
        for (target, owner) in self.ports.entries()? {
            if is_gone(&target, owner) {
                self.ports.remove(&target)?;
            }
        }
        Ok(())
    }
}

impl Kernel {
    /// Makes these the declared probe ports of a pod, at most [`PROBE_PORTS_PER_POD`], the lowest:
    /// connections to them from a probing cgroup pass to the app, in every mode and without the
    /// agent.
    pub fn set_probe_ports(
        &self,
        pod: &PodRecord,
        ports: &BTreeSet<u16>,
    ) -> Result<(), KernelError> {
        self.maps.probes.set_ports(pod, ports)
    }

    pub(super) fn remove_probe_ports(&self, netns_cookie: u64) -> Result<(), KernelError> {
        let probes = &self.maps.probes;
        let _changing = probes.seen.lock();
        probes.remove(|_, owner| owner == netns_cookie)
    }

    /// Removes the probe ports of pods that the kernel holds nothing else of: an agent died while
    /// it enrolled them.
    pub(super) fn forget_leftover_probe_ports(&self) -> Result<(), KernelError> {
        let mut known: BTreeSet<u64> = self.maps.pods.keys()?.into_iter().collect();
        known.extend(self.lookups());
        let probes = &self.maps.probes;
        let _changing = probes.seen.lock();
        probes.remove(|_, owner| !known.contains(&owner))
    }

    /// Makes the cgroups at these directories, and what is below them, those that may probe, but
    /// none that holds pods; `pods` are the cgroups of those that the model knows, in the mesh or
    /// not. To be called again from time to time: a cgroup that appears, or is made anew, or gets a
    /// pod, is found then. Returns what is known of each. An error names the bound,
    /// `bounds::PROBERS`.
    pub fn set_probe_cgroups(
        &self,
        directories: &[PathBuf],
        pods: &BTreeSet<PathBuf>,
    ) -> Result<Vec<ProbeCgroup>, KernelError> {
        let probes = &self.maps.probes;
        let mut seen = probes.seen.lock();
        let found: Vec<_> = directories
            .iter()
            .map(|path| {
                let now = self.look(path, pods);
                let held_pods = seen.iter().find(|former| {
                    former.state == ProbeCgroupState::HoldsPods
                        && (&former.path, former.id) == (&now.path, now.id)
                });
                held_pods.cloned().unwrap_or(now)
            })
            .collect();
        let wanted: BTreeSet<u64> = found
            .iter()
            .filter(|cgroup| cgroup.state == ProbeCgroupState::Known)
            .filter_map(|cgroup| cgroup.id)
            .collect();
        let held: BTreeSet<u64> = probes.cgroups.keys()?.into_iter().collect();
        // Gone ones first: they make room.
        for id in held.difference(&wanted) {
            probes.cgroups.remove(id)?;
        }
        for id in wanted.difference(&held) {
            probes.cgroups.put(id, &1)?;
        }
        seen.clone_from(&found);
        Ok(found)
    }

    fn look(&self, path: &Path, pods: &BTreeSet<PathBuf>) -> ProbeCgroup {
        let (id, state, sign) = match self.state(path, pods) {
            Ok((id, state, sign)) => (Some(id), state, sign),
            Err(_) => (None, ProbeCgroupState::Absent, None),
        };
        ProbeCgroup {
            path: path.to_owned(),
            id,
            state,
            reason: sign.map(|sign| sign.to_string()),
        }
    }

    fn state(
        &self,
        path: &Path,
        pods: &BTreeSet<PathBuf>,
    ) -> std::io::Result<(u64, ProbeCgroupState, Option<Sign>)> {
        let directory = fs::canonicalize(path)?;
        let attached = fs::canonicalize(&self.options.cgroup)?;
        let id = fs::metadata(&directory)?.ino();
        if statfs(&directory)?.filesystem_type() != CGROUP2_SUPER_MAGIC {
            return Ok((id, ProbeCgroupState::NotCgroup2, None));
        }
        let sign = if attached.starts_with(&directory) {
            Some(Sign::Attached)
        } else if directory.starts_with(&attached) {
            sign_of_pods(&directory, pods, || self.enrolled_networks())
        } else {
            return Ok((id, ProbeCgroupState::OutOfReach, None));
        };
        let state = match sign {
            Some(_) => ProbeCgroupState::HoldsPods,
            None => ProbeCgroupState::Known,
        };
        Ok((id, state, sign))
    }

    /// Inodes of the network namespaces that a program of ours is attached to.
    fn enrolled_networks(&self) -> BTreeSet<u64> {
        let lookups = self.lookups().into_iter();
        lookups
            .filter_map(|cookie| Some(self.pins.link(&lookup_pin(cookie))?.netns_inode()))
            .filter(|inode| *inode != 0)
            .collect()
    }
}
