//! What a lab leaves on disk, so that another command can find it, and everything of it can be removed.

use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, umount2};
use serde::{Deserialize, Serialize};

use crate::cgroup::{self, Cgroup};

const BASE: &str = "/run/undermesh-lab";
const STATE: &str = "lab.json";
const LOCK: &str = "lock";

/// A lab as other commands see it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LabState {
    /// Its name.
    pub id: String,
    /// Its directory.
    pub dir: PathBuf,
    /// Its cgroup2 directory.
    pub cgroup: PathBuf,
    /// Programs that it runs.
    pub binaries: Binaries,
    /// Nodes.
    pub nodes: Vec<NodeRecord>,
    /// Pods.
    pub pods: Vec<PodRecord>,
    /// Services.
    pub services: Vec<ServiceRecord>,
    /// Trust domain of the mesh.
    pub trust_domain: String,
    /// Address of the CA.
    pub ca: SocketAddr,
}

/// Programs that a lab runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Binaries {
    /// `undermesh`.
    pub agent: PathBuf,
    /// `undermesh-traffic`.
    pub traffic: PathBuf,
    /// `undermesh-load`.
    pub load: PathBuf,
}

impl Binaries {
    /// All programs in one directory.
    #[must_use]
    pub fn in_dir(dir: &Path) -> Self {
        Self {
            agent: dir.join("undermesh"),
            traffic: dir.join("undermesh-traffic"),
            load: dir.join("undermesh-load"),
        }
    }

    /// In the directory that `UNDERMESH_BIN_DIR` names. Without it the agent is that of the release build, and
    /// the traffic program the one that was built with the program that runs (cargo does that for tests).
    pub fn find() -> Result<Self> {
        if let Some(dir) = std::env::var_os("UNDERMESH_BIN_DIR") {
            return Ok(Self::in_dir(Path::new(&dir)));
        }
        let own = std::env::current_exe()?;
        // target/debug/xtask, or target/debug/deps/some_test-0123456789abcdef.
        let profile = own
            .ancestors()
            .skip(1)
            .find(|dir| dir.ends_with("debug") || dir.ends_with("release"))
            .with_context(|| format!("{} is not in a target directory", own.display()))?;
        Ok(Self {
            agent: profile.with_file_name("release").join("undermesh"),
            traffic: profile.join("undermesh-traffic"),
            load: profile.join("undermesh-load"),
        })
    }
}

/// A simulated node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Its name.
    pub name: String,
    /// 1 or 2: part of its addresses.
    pub index: u8,
    /// File of its network namespace.
    pub netns: PathBuf,
    /// Its part of the cgroup2 tree; what an agent attaches to.
    pub cgroup: PathBuf,
    /// Logs, the token and a bpffs.
    pub dir: PathBuf,
    /// Its address on the wire between the nodes.
    pub address: IpAddr,
}

/// A pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRecord {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.namespace`.
    pub namespace: String,
    /// Its node.
    pub node: String,
    /// Its number on the node: part of its addresses, and the name of its link begins with `p<index>`.
    pub index: u16,
    /// File of its network namespace.
    pub netns: PathBuf,
    /// Its cgroup2 directory.
    pub cgroup: PathBuf,
    /// Logs and what its programs need.
    pub dir: PathBuf,
    /// Addresses, IPv4 first.
    pub ips: Vec<IpAddr>,
    /// `spec.serviceAccountName`.
    pub service_account: String,
    /// `strict`, `permissive` or `outside`.
    pub mode: String,
    /// What it runs.
    pub command: Vec<String>,
}

impl PodRecord {
    /// `namespace.name`: unique, and fit for a file name.
    #[must_use]
    pub fn key(&self) -> String {
        format!("{}.{}", self.namespace, self.name)
    }

    /// Its SPIFFE id, if it is to be in the mesh.
    #[must_use]
    pub fn identity(&self, trust_domain: &str) -> Option<String> {
        let Self {
            namespace,
            service_account,
            ..
        } = self;
        self.meshed()
            .then(|| format!("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}"))
    }

    /// Whether it is to be in the mesh.
    #[must_use]
    pub fn meshed(&self) -> bool {
        self.mode != "outside"
    }
}

/// A Service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceRecord {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.namespace`.
    pub namespace: String,
    /// Its addresses, IPv4 first; none for a headless one.
    pub vips: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<u16>,
}

impl LabState {
    /// Where the lab `id` lives.
    #[must_use]
    pub fn dir_of(id: &str) -> PathBuf {
        Path::new(BASE).join(id)
    }

    /// The state of the lab `id`.
    pub fn load(id: &str) -> Result<Self> {
        let file = Self::dir_of(id).join(STATE);
        let text = fs::read_to_string(&file)
            .with_context(|| format!("no lab {id:?} is up ({})", file.display()))?;
        serde_json::from_str(&text).with_context(|| file.display().to_string())
    }

    /// Writes it, in one step.
    pub fn save(&self) -> Result<()> {
        let temporary = self.dir.join("lab.json.new");
        fs::write(&temporary, serde_json::to_vec_pretty(self)?)?;
        fs::rename(&temporary, self.dir.join(STATE))?;
        Ok(())
    }

    /// The node of that name.
    pub fn node(&self, name: &str) -> Result<&NodeRecord> {
        self.nodes
            .iter()
            .find(|node| node.name == name)
            .with_context(|| {
                let names: Vec<_> = self.nodes.iter().map(|node| node.name.as_str()).collect();
                format!("no node {name:?}; there are {}", names.join(", "))
            })
    }

    /// The pod of that name, or `namespace/name`.
    pub fn pod(&self, name: &str) -> Result<&PodRecord> {
        let fits = |pod: &&PodRecord| match name.split_once('/') {
            Some((namespace, name)) => pod.namespace == namespace && pod.name == name,
            None => pod.name == name,
        };
        let mut found = self.pods.iter().filter(fits);
        match (found.next(), found.next()) {
            (Some(pod), None) => Ok(pod),
            (Some(_), Some(_)) => bail!("more than one pod {name:?}: say namespace/name"),
            (None, _) => {
                let names: Vec<_> = self.pods.iter().map(|pod| pod.name.as_str()).collect();
                bail!("no pod {name:?}; there are {}", names.join(", "))
            }
        }
    }
}

/// Held by the process that a lab belongs to: the kernel lets go of it when that process ends, however it does.
#[derive(Debug)]
pub(super) struct Ownership(Option<Flock<File>>);

/// Makes the directory of a lab and takes its lock.
pub(super) fn claim(id: &str) -> Result<Ownership> {
    let valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if id.is_empty() || id.len() > 24 || !id.chars().all(valid) {
        bail!("{id:?} is no name for a lab: 1 to 24 of a-z, 0-9, '-'");
    }
    let dir = LabState::dir_of(id);
    fs::create_dir_all(BASE)?;
    fs::create_dir(&dir)
        .with_context(|| format!("lab {id:?} exists already ({})", dir.display()))?;
    let file = File::create(dir.join(LOCK))?;
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, error)| error)
        .context("lock of a new lab")?;
    Ok(Ownership(Some(lock)))
}

impl Ownership {
    /// From now on the lab lives until it is taken down by name.
    pub fn give_up(&mut self, dir: &Path) -> Result<()> {
        fs::remove_file(dir.join(LOCK))?;
        self.0 = None;
        Ok(())
    }
}

/// Removes labs whose owner has ended without removing them. Gives back their names.
pub fn remove_stale() -> Result<Vec<String>> {
    let Ok(entries) = fs::read_dir(BASE) else {
        return Ok(Vec::new());
    };
    let mut removed = Vec::new();
    for entry in entries {
        let entry = entry?;
        // A lab without a lock file is meant to stay; one whose lock is held has an owner.
        let Ok(file) = File::open(entry.path().join(LOCK)) else {
            continue;
        };
        let Ok(_lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
            continue;
        };
        if let Ok(id) = entry.file_name().into_string() {
            take_down(&id)?;
            removed.push(id);
        }
    }
    Ok(removed)
}

/// The cgroup2 directory of a lab.
pub(super) fn cgroup_of(id: &str) -> Result<PathBuf> {
    Ok(cgroup::mount_point()?.join(format!("undermesh-lab-{id}")))
}

/// Removes all of a lab, however much of it there is: it needs no record, only the name. Goes on after an
/// error, and gives back the first.
pub(super) fn take_down(id: &str) -> Result<()> {
    let dir = LabState::dir_of(id);
    let cgroup = Cgroup::at(&cgroup_of(id)?);
    let steps = [
        cgroup.kill(),
        unmount_below(&dir),
        cgroup.remove(),
        remove_dir(&dir),
    ];
    // Only if it was the last.
    let _ = fs::remove_dir(BASE);
    steps
        .into_iter()
        .find(Result::is_err)
        .unwrap_or(Ok(()))
        .with_context(|| format!("cannot remove all of lab {id:?}"))
}

fn unmount_below(dir: &Path) -> Result<()> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    // Later mounts may lie on earlier ones.
    let mut below: Vec<&str> = points
        .filter(|point| Path::new(point).starts_with(dir))
        .collect();
    below.reverse();
    for point in below {
        umount2(point, MntFlags::MNT_DETACH).with_context(|| format!("umount {point}"))?;
    }
    Ok(())
}

fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| dir.display().to_string())
        }
        _ => Ok(()),
    }
}
