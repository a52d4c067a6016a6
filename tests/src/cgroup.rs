//! cgroup2 directories.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::wait;

/// Where the cgroup2 tree is mounted, as `/proc/self/mountinfo` has it.
pub fn mount_point() -> Result<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("/proc/self/mountinfo")?;
    find_mount(&table).ok_or_else(|| anyhow!("no cgroup2 tree is mounted"))
}

/// proc_pid_mountinfo(5): fields up to " - ", of which the fifth is the mount point, then the type.
fn find_mount(table: &str) -> Option<PathBuf> {
    table.lines().find_map(|line| {
        let (front, back) = line.split_once(" - ")?;
        let mut fields = front.split(' ');
        let root = fields.nth(3)?;
        let point = fields.next()?;
        (back.split(' ').next() == Some("cgroup2") && root == "/").then(|| PathBuf::from(point))
    })
}

/// A cgroup2 directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes the directory, and those above it.
    pub fn create(path: &Path) -> Result<Self> {
        fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self::at(path))
    }

    /// One that exists.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Processes directly in it.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let file = self.path.join("cgroup.procs");
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// Kills whatever runs in it and below it, and waits until nothing does. One that is gone already is fine.
    pub fn kill(&self) -> Result<()> {
        match fs::write(self.path.join("cgroup.kill"), "1") {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error).context("cgroup.kill (needs kernel 5.14)"),
        }
        let events = self.path.join("cgroup.events");
        // Not wait::until: this is clean-up, and must go on after Ctrl-C.
        for _ in 0..1_000 {
            match fs::read_to_string(&events) {
                Ok(text) if text.contains("populated 1") => {}
                _ => return Ok(()),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err(anyhow!("{} is still populated", self.path.display()))
    }

    /// Removes it and everything below it; it must be empty of processes.
    pub fn remove(&self) -> Result<()> {
        remove_tree(&self.path)
    }

    /// Waits until no process is in it.
    pub fn wait_empty(&self, limit: Duration) -> Result<()> {
        wait::until_true("a cgroup to be empty", limit, || {
            Ok(self.processes()?.is_empty())
        })
    }
}

fn remove_tree(path: &Path) -> Result<()> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| path.display().to_string()),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path).with_context(|| format!("cannot remove {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup2_mount_is_found_beside_cgroup_v1_controllers() {
        let table = "\
            31 24 0:27 / /sys/fs/cgroup rw,relatime - tmpfs cgroup rw,mode=755\n\
            32 31 0:28 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu\n\
            43 31 0:39 / /sys/fs/cgroup/unified rw,relatime shared:20 master:1 - cgroup2 cgroup2 rw\n";
        assert_eq!(
            find_mount(table),
            Some(PathBuf::from("/sys/fs/cgroup/unified"))
        );
        assert_eq!(find_mount("24 1 0:2 / / rw - ext4 /dev/vda rw\n"), None);
    }
}
