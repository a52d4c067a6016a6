//! Everything that talks to `bpf(2)`: programs, maps, pins.
//!
//! [`Kernel::load`] attaches the programs or adopts what a former agent left attached; from then on
//! the other methods tell the kernel which pods and destinations belong to the mesh. What they tell
//! is pinned and outlives the agent, so that its failure mode holds without it.

mod error;
mod features;
mod holds;
mod maps;
mod object;
mod pins;
mod probes;
mod reach;
mod record;
mod staged;
mod status;
mod targets;
mod verdict_log;

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use parking_lot::Mutex;
use undermesh_common::{Address, PodConstants, Tuple};

pub use error::KernelError;
pub use probes::{PROBE_PORTS_PER_POD, ProbeCgroup, ProbeCgroupState};
pub use record::{ListenerSlot, PodRecord};
pub use status::{
    AttachPoint, FeatureStatus, ForeignProgram, KernelStatus, MapStatus, ProgramStatus,
};
pub use undermesh_common::{
    CAPTURE_MARK, DestinationClass, Family, HBONE_PORT, Intent, ListenerKind, NativeTraffic,
};

use self::maps::Maps;
use self::object::{CONNECT4, CONNECT6, LOOKUP, Loader, SETSOCKOPT, SOCK_OPS};
use self::pins::{Pins, Target};
use self::reach::Reach;
use self::staged::Staged;
use self::verdict_log::VerdictLog;
use super::sys::{self, AttachType};
use crate::mesh::CaptureTarget;

/// Where to attach and to pin.
#[derive(Debug, Clone)]
pub struct KernelOptions {
    /// Directory of a cgroup2 tree; the programs see the processes below it, which must be all
    /// pods' and the agent's own.
    pub cgroup: PathBuf,
    /// Directory on a bpffs, made if absent. A directory of the layout's hash is made in it.
    pub pins: PathBuf,
}

/// The kernel side of this node.
pub struct Kernel {
    options: KernelOptions,
    pins: Pins,
    maps: Maps,
    loader: Mutex<Loader>,
    /// What the kernel holds of [`Kernel::set_targets`].
    targets: Mutex<BTreeSet<CaptureTarget>>,
    /// Until programs of another layout are replaced.
    staged: Mutex<Option<Staged>>,
    reach: Mutex<Reach>,
    _log: Option<VerdictLog>,
}

/// The agent that attached what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Predecessor {
    Gone,
    /// It may be enrolling pods.
    Alive,
}

/// The programs at the cgroup: name, pin, hook.
const CGROUP_PROGRAMS: [(&str, &str, AttachType); 4] = [
    (SOCK_OPS, "link_sock_ops", AttachType::SockOps),
    (SETSOCKOPT, "link_setsockopt", AttachType::SetSockopt),
    (CONNECT4, "link_connect4", AttachType::Connect4),
    (CONNECT6, "link_connect6", AttachType::Connect6),
];

const LOOKUP_PREFIX: &str = "link_lookup_";

impl Kernel {
    /// Loads the programs and attaches them to the cgroup, or puts them into the links that a
    /// former agent of the same layout pinned, whose maps stay as they are. An error leaves what
    /// was attached before attached.
    ///
    /// Where programs of another layout are attached, these wait: see [`Kernel::replace_former`].
    pub fn load(options: &KernelOptions) -> Result<Self, KernelError> {
        Self::attach(options, Predecessor::Gone)
    }

    /// The same, beside an agent that still serves.
    pub fn load_beside(options: &KernelOptions) -> Result<Self, KernelError> {
        Self::attach(options, Predecessor::Alive)
    }

    fn attach(options: &KernelOptions, predecessor: Predecessor) -> Result<Self, KernelError> {
        let pins = Pins::open(&options.pins)?;
        let cgroup = File::open(&options.cgroup)
            .map_err(KernelError::file("open cgroup", &options.cgroup))?;
        let mut loader = Loader::new(pins.directory());
        let mut loaded = loader.load()?;
        let maps = Maps::new(&mut loaded)?;
        let log = loaded.log().unwrap_or_else(|error| {
            tracing::warn!(%error, "verdicts are not logged");
            None
        });
        // All through the verifier before any is attached.
        let programs = CGROUP_PROGRAMS.map(|(name, pin, kind)| {
            loaded
                .program(name)
                .map(|program| (name, pin, kind, program))
        });
        let mut staged = pins.has_former_links()?.then(Staged::default);
        for entry in programs {
            let (program, pin, kind, descriptor) = entry?;
            match &mut staged {
                Some(staged) => staged.cgroup.push((program, pin, kind, descriptor)),
                None => attach_to_cgroup(&pins, &cgroup, (program, pin, kind, &descriptor))?,
            }
        }
        let targets = targets::read(&maps.targets)?;
        let is_staged = staged.is_some();
        let kernel = Self {
            options: options.clone(),
            pins,
            maps,
            loader: Mutex::new(loader),
            targets: Mutex::new(targets),
            staged: Mutex::new(staged),
            reach: Mutex::new(Reach::Unknown),
            _log: log,
        };
        if predecessor == Predecessor::Gone {
            kernel.forget_leftover_probe_ports()?;
        }
        if !is_staged {
            kernel.look_how_far()?;
        }
        Ok(kernel)
    }

    fn look_how_far(&self) -> Result<(), KernelError> {
        let reach = Reach::probe(self)?;
        *self.reach.lock() = reach;
        if reach != Reach::Seen {
            let FeatureStatus { name, reason, .. } = reach.feature();
            tracing::warn!(feature = name, cgroup = %self.options.cgroup.display(), "{reason}");
        }
        Ok(())
    }

    /// Makes these the destinations that are captured: adds before it removes. At the bound
    /// (`bounds::TARGETS`) the former ones stay and the error names it.
    pub fn set_targets(&self, targets: &BTreeSet<CaptureTarget>) -> Result<(), KernelError> {
        targets::change(&self.maps.targets, &mut self.targets.lock(), targets)
    }

    /// Looks again which destinations the kernel holds, after another agent may have changed them.
    pub fn reread_targets(&self) -> Result<(), KernelError> {
        let mut known = self.targets.lock();
        *known = targets::read(&self.maps.targets)?;
        Ok(())
    }

    /// Adds or replaces a pod. From now on its connections to the mesh are captured.
    pub fn put_pod(&self, pod: &PodRecord) -> Result<(), KernelError> {
        self.maps.native.watch(pod.netns_cookie)?;
        self.maps.pods.put(&pod.netns_cookie, &pod.to_kernel())
    }

    /// From now on this pod's connections are native. That it is not there is no error.
    pub fn remove_pod(&self, netns_cookie: u64) -> Result<(), KernelError> {
        self.maps.pods.remove(&netns_cookie)?;
        self.maps.native.forget(netns_cookie)
    }

    /// The pods that the kernel holds, also those that a former agent put there.
    pub fn pods(&self) -> Result<Vec<PodRecord>, KernelError> {
        let entries = self.maps.pods.entries()?;
        Ok(entries
            .into_iter()
            .map(|(netns_cookie, pod)| PodRecord::from_kernel(netns_cookie, &pod))
            .collect())
    }

    /// Attaches the `sk_lookup` program to a pod's network namespace, with the pod's addresses and
    /// mode as constants. An older instance there is replaced without a moment between.
    pub fn attach_lookup(&self, netns: BorrowedFd<'_>, pod: &PodRecord) -> Result<(), KernelError> {
        let constants = PodConstants {
            netns_cookie: pod.netns_cookie,
            pod: pod.to_kernel(),
        };
        let program = self.loader.lock().lookup(&constants)?;
        if let Some(staged) = self.staged.lock().as_mut() {
            let netns = netns
                .try_clone_to_owned()
                .map_err(|source| KernelError::Attach {
                    program: LOOKUP,
                    source,
                })?;
            staged.lookups.insert(pod.netns_cookie, (program, netns));
            return Ok(());
        }
        attach_to_netns(&self.pins, netns, pod.netns_cookie, program.as_fd())
    }

    /// Detaches it, and forgets the pod's probe ports. That it is not attached is no error.
    pub fn detach_lookup(&self, netns_cookie: u64) -> Result<(), KernelError> {
        if let Some(staged) = self.staged.lock().as_mut() {
            staged.lookups.remove(&netns_cookie);
        }
        let detached = self.pins.detach(&lookup_pin(netns_cookie));
        detached.and(self.remove_probe_ports(netns_cookie))
    }

    /// Whether it is attached to a network namespace that still exists, as the kernel says, or waits
    /// to be.
    #[must_use]
    pub fn lookup_attached(&self, netns_cookie: u64) -> bool {
        if let Some(staged) = self.staged.lock().as_ref() {
            return staged.lookups.contains_key(&netns_cookie);
        }
        self.pins
            .link(&lookup_pin(netns_cookie))
            .is_some_and(|info| info.netns_inode() != 0)
    }

    /// Cookies of the network namespaces for which an instance is pinned, also by a former agent.
    #[must_use]
    pub fn lookups(&self) -> Vec<u64> {
        let names = self.pins.names(LOOKUP_PREFIX);
        names
            .iter()
            .filter_map(|name| name.strip_prefix(LOOKUP_PREFIX)?.parse().ok())
            .collect()
    }

    /// Puts a listening TCP socket into its slot, in place of another that is there. It leaves the
    /// slot by itself when it is closed.
    pub fn set_listener(
        &self,
        slot: ListenerSlot,
        socket: BorrowedFd<'_>,
    ) -> Result<(), KernelError> {
        self.maps.listeners.put(slot.key(), socket)
    }

    /// Empties a slot. That it is empty is no error.
    pub fn remove_listener(&self, slot: ListenerSlot) -> Result<(), KernelError> {
        self.maps.listeners.remove(&slot.key())
    }

    /// Whether the slot holds a socket that listens, as the kernel says.
    pub fn has_listener(&self, slot: ListenerSlot) -> Result<bool, KernelError> {
        Ok(self.maps.listeners.keys()?.contains(&slot.key()))
    }

    /// Declares a socket to be the agent's own, for as long as it is open. Call it before connect(2).
    pub fn declare(&self, socket: BorrowedFd<'_>, intent: Intent) -> Result<(), KernelError> {
        self.maps.notes.put(socket, intent.note())
    }

    /// Cookie of the network namespace whose program let an admitted connection through, as it is known
    /// from its SYN until its end; none where no pod's program saw it.
    pub fn arrived_in(
        &self,
        source: SocketAddr,
        destination: SocketAddr,
    ) -> Result<Option<u64>, KernelError> {
        let tuple = Tuple {
            source: source.ip().into(),
            destination: destination.ip().into(),
            source_port: source.port(),
            destination_port: destination.port(),
        };
        let admission = self.maps.admitted.get(&tuple)?;
        Ok(admission
            .map(|admission| admission.arrived_in)
            .filter(|&cookie| cookie != 0))
    }

    /// Every verdict by its name, and how often it was given since the maps were made.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.maps.counters()
    }

    /// What the closed native connections of a pod carried, by the class of their destination;
    /// nothing if it is not enrolled.
    #[must_use]
    pub fn native_traffic(&self, netns_cookie: u64) -> Vec<(DestinationClass, NativeTraffic)> {
        self.maps.native.of(netns_cookie)
    }

    /// Makes these the addresses of the node, at most 1,024, the lowest.
    pub fn set_node_addresses(&self, addresses: &BTreeSet<IpAddr>) -> Result<(), KernelError> {
        let table = &self.maps.node_addresses;
        let wanted: BTreeSet<Address> = addresses
            .iter()
            .take(table.bound() as usize)
            .map(|&address| address.into())
            .collect();
        let held: BTreeSet<Address> = table.keys()?.into_iter().collect();
        // Gone ones first: they make room.
        for address in held.difference(&wanted) {
            table.remove(address)?;
        }
        for address in wanted.difference(&held) {
            table.put(address, &1)?;
        }
        Ok(())
    }

    /// Detaches what agents of another layout left that was not replaced, and forgets their maps.
    /// Call it after [`Kernel::replace_former`]. Returns what it removed.
    pub fn clear_former_layouts(&self) -> Result<Vec<PathBuf>, KernelError> {
        let former = self.pins.former_layouts()?;
        for directory in &former {
            Pins::remove_layout(directory)?;
        }
        Ok(former)
    }

    /// Detaches everything and removes every pin of this layout: uninstallation.
    pub fn uninstall(&self) -> Result<(), KernelError> {
        for (_, pin, _) in CGROUP_PROGRAMS {
            self.pins.detach(pin)?;
        }
        Pins::remove_layout(self.pins.directory())
    }
}

fn attach_to_cgroup(
    pins: &Pins,
    cgroup: &File,
    (program, pin, kind, descriptor): (&'static str, &str, AttachType, &OwnedFd),
) -> Result<(), KernelError> {
    pins.attach(pin, descriptor.as_fd(), &Target::Cgroup(cgroup), kind)
        .map_err(|source| KernelError::Attach { program, source })
}

fn attach_to_netns(
    pins: &Pins,
    netns: BorrowedFd<'_>,
    netns_cookie: u64,
    program: BorrowedFd<'_>,
) -> Result<(), KernelError> {
    let (pin, target) = (lookup_pin(netns_cookie), Target::Netns(netns));
    pins.attach(&pin, program, &target, AttachType::Lookup)
        .map_err(|source| KernelError::Attach {
            program: LOOKUP,
            source,
        })
}

fn lookup_pin(netns_cookie: u64) -> String {
    format!("{LOOKUP_PREFIX}{netns_cookie}")
}

/// Cookie of the network namespace that a socket is in. No other gets it until the machine boots.
pub fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    sys::netns_cookie(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_side_is_shared_between_threads() {
        fn shared<T: Send + Sync>() {}
        shared::<Kernel>();
    }
}
