//! The memory that the agent may use, as its cgroup says: near the limit new connections are shed,
//! because a process that the kernel kills for its memory takes all connections of the node along.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::share::NodeShare;

/// How often it is looked: a few small files.
const LOOK: Duration = Duration::from_millis(250);
/// From so many hundredths of the limit on, new connections are shed …
const HIGH_WATER: u64 = 90;
/// … and below so many they are taken again.
const LOW_WATER: u64 = 80;
/// Version 1 says "no limit" with the greatest number of whole pages.
const UNLIMITED: u64 = 1 << 62;

/// Memory of the agent's cgroup or of one above it, whichever is nearest to its limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MemoryUse {
    /// What is used, without file pages that the kernel can drop at once.
    pub used_bytes: u64,
    /// `memory.max`, or `memory.high` where that is less; `memory.limit_in_bytes` in version 1.
    pub limit_bytes: u64,
    /// Whose limit it is.
    pub cgroup: PathBuf,
}

/// What is known of the agent's memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct MemoryStatus {
    /// None where nothing limits it.
    pub usage: Option<MemoryUse>,
    /// Whether new connections are shed.
    pub shedding: bool,
}

impl MemoryStatus {
    /// The next state: sheds from the high-water mark until it is below the low-water mark.
    fn next(&self, usage: Option<MemoryUse>) -> Self {
        let shedding = usage.as_ref().is_some_and(|now| {
            let mark = if self.shedding { LOW_WATER } else { HIGH_WATER };
            now.hundredths() >= mark
        });
        Self { usage, shedding }
    }
}

impl MemoryUse {
    fn hundredths(&self) -> u64 {
        let part = u128::from(self.used_bytes) * 100 / u128::from(self.limit_bytes.max(1));
        u64::try_from(part).unwrap_or(u64::MAX)
    }

    /// What is used and allowed in this process's cgroup and those above it, of either version,
    /// under `root`, which is `/`. None where nothing limits it.
    pub fn read(root: &Path) -> Option<Self> {
        let own = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
        let mounts = fs::read_to_string(root.join("proc/self/mountinfo")).ok()?;
        let versions = [Version::Two, Version::One].into_iter();
        versions
            .filter_map(|version| {
                let path = version.path(&own)?;
                let (mount_root, mount) = version.mount(&mounts)?;
                // A container may see a part of the tree only, and its own place in the whole one.
                let path = path.strip_prefix(mount_root).unwrap_or(path);
                let top = root.join(mount.strip_prefix("/").unwrap_or(mount));
                let own = top.join(path.strip_prefix("/").unwrap_or(path));
                own.ancestors()
                    .take_while(|directory| directory.starts_with(&top))
                    .filter_map(|directory| version.read(directory))
                    .max_by_key(Self::hundredths)
            })
            .max_by_key(Self::hundredths)
    }
}

/// Of the cgroup tree that has the memory controller: a machine may have both, but only one has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Version {
    /// Where this process is (cgroups(7), /proc/pid/cgroup).
    fn path(self, own: &str) -> Option<&Path> {
        own.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            let is_this = match self {
                Self::One => controllers.split(',').any(|name| name == "memory"),
                Self::Two => controllers.is_empty(),
            };
            is_this.then(|| Path::new(path))
        })
    }

    /// What of the tree is mounted, and where (proc_pid_mountinfo(5)).
    fn mount(self, mounts: &str) -> Option<(&Path, &Path)> {
        mounts.lines().find_map(|line| {
            let (mount, system) = line.split_once(" - ")?;
            let mut system = system.split(' ');
            let kind = system.next()?;
            let is_this = match self {
                Self::One => {
                    let options = system.nth(1)?;
                    kind == "cgroup" && options.split(',').any(|name| name == "memory")
                }
                Self::Two => kind == "cgroup2",
            };
            let mut fields = mount.split(' ').skip(3);
            let (root, point) = (fields.next()?, fields.next()?);
            is_this.then(|| (Path::new(root), Path::new(point)))
        })
    }

    fn read(self, directory: &Path) -> Option<MemoryUse> {
        let (limits, usage, droppable): (&[&str], _, _) = match self {
            Self::One => (
                &["memory.limit_in_bytes"],
                "memory.usage_in_bytes",
                "total_inactive_file ",
            ),
            Self::Two => (
                &["memory.max", "memory.high"],
                "memory.current",
                "inactive_file ",
            ),
        };
        let number = |file: &str| -> Option<u64> {
            let text = fs::read_to_string(directory.join(file)).ok()?;
            text.trim().parse().ok()
        };
        let limit_bytes = limits
            .iter()
            .filter_map(|file| number(file))
            .filter(|limit| *limit < UNLIMITED)
            .min()?;
        let statistics = fs::read_to_string(directory.join("memory.stat")).unwrap_or_default();
        let droppable: u64 = statistics
            .lines()
            .find_map(|line| line.strip_prefix(droppable)?.trim().parse().ok())
            .unwrap_or_default();
        Some(MemoryUse {
            used_bytes: number(usage)?.saturating_sub(droppable),
            limit_bytes,
            cgroup: directory.to_owned(),
        })
    }
}

/// Looks until told to stop, and has the node shed while memory is short, and others know of it.
pub(super) async fn follow(
    share: Arc<NodeShare>,
    status: Arc<Mutex<MemoryStatus>>,
    shortage: watch::Sender<bool>,
    stop: CancellationToken,
) {
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        // The kernel may have to add up a large tree for it.
        let Ok(found) = spawn_blocking(|| MemoryUse::read(Path::new("/"))).await else {
            continue;
        };
        let (was, now) = {
            let mut status = status.lock();
            let next = status.next(found);
            (std::mem::replace(&mut *status, next.clone()), next)
        };
        if was.shedding != now.shedding {
            share.set_short_of_memory(now.shedding);
            shortage.send_replace(now.shedding);
            let (used, limit) = now
                .usage
                .map_or((0, 0), |now| (now.used_bytes, now.limit_bytes));
            match now.shedding {
                true => tracing::warn!(used, limit, "memory is short: new connections are shed"),
                false => tracing::info!(used, limit, "there is memory again"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A root with these files.
    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        root
    }

    const V2: &str = "41 31 0:38 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n";
    const V1: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
        32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
        35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
        41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";

    #[test]
    fn the_cgroup_that_is_nearest_to_its_limit_counts() {
        let root = root(&[
            ("proc/self/cgroup", "0::/kubepods/pod1/agent\n"),
            ("proc/self/mountinfo", V2),
            ("sys/fs/cgroup/kubepods/pod1/agent/memory.max", "1000\n"),
            ("sys/fs/cgroup/kubepods/pod1/agent/memory.high", "max\n"),
            ("sys/fs/cgroup/kubepods/pod1/agent/memory.current", "500\n"),
            ("sys/fs/cgroup/kubepods/pod1/memory.max", "max\n"),
            ("sys/fs/cgroup/kubepods/pod1/memory.high", "800\n"),
            ("sys/fs/cgroup/kubepods/pod1/memory.current", "700\n"),
            (
                "sys/fs/cgroup/kubepods/pod1/memory.stat",
                "anon 600\ninactive_file 100\n",
            ),
            ("sys/fs/cgroup/kubepods/memory.max", "max\n"),
        ]);
        let found = MemoryUse::read(root.path()).unwrap();
        assert_eq!((found.used_bytes, found.limit_bytes), (600, 800));
        assert!(found.cgroup.ends_with("kubepods/pod1"));
    }

    #[test]
    fn version_1_is_read_where_it_has_the_controller() {
        let agent = "sys/fs/cgroup/memory/a/agent";
        let root = root(&[
            (
                "proc/self/cgroup",
                "4:memory:/a/agent\n1:cpu:/\n0::/agent\n",
            ),
            ("proc/self/mountinfo", V1),
            (&format!("{agent}/memory.limit_in_bytes"), "1000\n"),
            (&format!("{agent}/memory.usage_in_bytes"), "950\n"),
            (
                &format!("{agent}/memory.stat"),
                "inactive_file 7\ntotal_inactive_file 50\n",
            ),
            (
                "sys/fs/cgroup/memory/memory.limit_in_bytes",
                "9223372036854771712\n",
            ),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "99999\n"),
        ]);
        let found = MemoryUse::read(root.path()).unwrap();
        assert_eq!((found.used_bytes, found.limit_bytes), (900, 1000));
    }

    #[test]
    fn a_container_finds_its_own_limit_at_the_mount() {
        // With a cgroup namespace of its own, and without.
        for (own, mount) in [
            ("0::/\n", V2.to_owned()),
            (
                "0::/pod1/agent\n",
                V2.replace("0:38 / ", "0:38 /pod1/agent "),
            ),
        ] {
            let root = root(&[
                ("proc/self/cgroup", own),
                ("proc/self/mountinfo", &mount),
                ("sys/fs/cgroup/memory.max", "100\n"),
                ("sys/fs/cgroup/memory.current", "10\n"),
            ]);
            assert_eq!(MemoryUse::read(root.path()).unwrap().limit_bytes, 100);
        }
    }

    #[test]
    fn without_a_limit_there_is_nothing_to_run_short_of() {
        let root = root(&[
            ("proc/self/cgroup", "0::/agent\n"),
            ("proc/self/mountinfo", V2),
            ("sys/fs/cgroup/agent/memory.max", "max\n"),
            ("sys/fs/cgroup/agent/memory.current", "10\n"),
        ]);
        assert_eq!(MemoryUse::read(root.path()), None);
        let shedding = MemoryStatus {
            shedding: true,
            ..MemoryStatus::default()
        };
        assert!(!shedding.next(None).shedding);
    }

    #[test]
    fn shedding_begins_at_the_high_water_mark_and_ends_below_the_low_one() {
        let mut status = MemoryStatus::default();
        for (used_bytes, shedding) in [
            (899, false),
            (900, true),
            (899, true),
            (800, true),
            (799, false),
            (899, false),
            (2000, true),
        ] {
            status = status.next(Some(MemoryUse {
                used_bytes,
                limit_bytes: 1000,
                cgroup: "/".into(),
            }));
            assert_eq!(status.shedding, shedding, "{used_bytes}");
        }
    }
}
