//! What survives the agent: links and maps, pinned below a directory that bears the layout's hash.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use undermesh_common::LAYOUT;

use super::KernelError;
use crate::capture::sys::{self, AttachType, LinkInfo};

/// Begin of the names of links, in every layout.
const LINK: &str = "link_";

/// A directory of pins. No dot in a pin's name: bpffs refuses it.
pub(super) struct Pins {
    root: PathBuf,
    directory: PathBuf,
}

/// What a link hangs on.
pub(super) enum Target<'a> {
    /// A cgroup directory.
    Cgroup(&'a File),
    /// A network namespace.
    Netns(BorrowedFd<'a>),
}

impl Target<'_> {
    fn descriptor(&self) -> BorrowedFd<'_> {
        match self {
            Self::Cgroup(directory) => directory.as_fd(),
            Self::Netns(netns) => *netns,
        }
    }

    /// Whether the link is attached to this very target, and not to one that is gone.
    fn is_of(&self, info: &LinkInfo) -> io::Result<bool> {
        let inode = File::from(self.descriptor().try_clone_to_owned()?)
            .metadata()?
            .ino();
        Ok(inode
            == match self {
                Self::Cgroup(_) => info.cgroup_id(),
                Self::Netns(_) => info.netns_inode(),
            })
    }
}

impl Pins {
    /// Makes the directory of this layout where it is absent.
    pub(super) fn open(root: &Path) -> Result<Self, KernelError> {
        let directory = root.join(format!("{LAYOUT:016x}"));
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(KernelError::file("make", &directory))?;
        let filesystem = statfs(&directory)
            .map_err(|errno| KernelError::file("look at", &directory)(errno.into()))?;
        if filesystem.filesystem_type() != BPF_FS_MAGIC {
            // Nothing of ours stays where nothing of ours can be.
            let _ = fs::remove_dir(&directory);
            return Err(KernelError::NotBpffs { path: root.into() });
        }
        Ok(Self {
            root: root.into(),
            directory,
        })
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Attaches a program and pins the link. A link that a former agent pinned, of whatever layout, gets
    /// the new program in place of the old one, without a moment between; one whose target is gone,
    /// or another, makes way for a new one.
    pub(super) fn attach(
        &self,
        name: &str,
        program: BorrowedFd<'_>,
        target: &Target<'_>,
        kind: AttachType,
    ) -> io::Result<()> {
        let path = self.directory.join(name);
        let former = self.former_link(name)?;
        if let Some((link, at)) = &former
            && target.is_of(&sys::link_info(link.as_fd())?)?
            && sys::update_link(link.as_fd(), program).is_ok()
        {
            if *at != path {
                sys::pin(link.as_fd(), &path)?;
                fs::remove_file(at)?;
            }
            return Ok(());
        }
        // The new one first, so that there is always one.
        let link = sys::link(program, target.descriptor(), kind)?;
        if let Some((former, at)) = former {
            take_off(former.as_fd())?;
            fs::remove_file(&at)?;
        }
        sys::pin(link.as_fd(), &path)
    }

    /// A pinned link and its place: of this layout, else of another.
    fn former_link(&self, name: &str) -> io::Result<Option<(OwnedFd, PathBuf)>> {
        let former = self.former_layouts().unwrap_or_default();
        for directory in [&self.directory].into_iter().chain(&former) {
            let path = directory.join(name);
            match sys::open_pin(&path) {
                Ok(link) => return Ok(Some((link, path))),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Whether programs of an agent of another layout are attached.
    pub(super) fn has_former_links(&self) -> Result<bool, KernelError> {
        let former = self.former_layouts()?;
        Ok(former
            .iter()
            .any(|directory| !names(directory, LINK).is_empty()))
    }

    /// Detaches and removes the pin; that there is none is no error. The program is off when it
    /// returns.
    pub(super) fn detach(&self, name: &str) -> Result<(), KernelError> {
        detach(&self.directory.join(name))
    }

    /// What the kernel says about a pinned link, none if nothing is pinned there.
    pub(super) fn link(&self, name: &str) -> Option<LinkInfo> {
        let link: OwnedFd = sys::open_pin(&self.directory.join(name)).ok()?;
        sys::link_info(link.as_fd()).ok()
    }

    /// Names of the pins that begin so.
    pub(super) fn names(&self, prefix: &str) -> Vec<String> {
        names(&self.directory, prefix)
    }

    /// Directories of other layouts: what an agent of another version left.
    pub(super) fn former_layouts(&self) -> Result<Vec<PathBuf>, KernelError> {
        let entries = fs::read_dir(&self.root).map_err(KernelError::file("read", &self.root))?;
        Ok(entries
            .filter_map(Result::ok)
            .filter(|entry| is_layout(&entry.file_name().to_string_lossy()))
            .map(|entry| entry.path())
            .filter(|path| *path != self.directory)
            .collect())
    }

    /// Detaches what is pinned in such a directory and removes it.
    pub(super) fn remove_layout(directory: &Path) -> Result<(), KernelError> {
        let entries = fs::read_dir(directory).map_err(KernelError::file("read", directory))?;
        for entry in entries {
            let path = entry.map_err(KernelError::file("read", directory))?.path();
            let is_link = path
                .file_name()
                .is_some_and(|name| name.as_encoded_bytes().starts_with(LINK.as_bytes()));
            if is_link {
                detach(&path)?;
            } else {
                fs::remove_file(&path).map_err(KernelError::file("remove", path))?;
            }
        }
        fs::remove_dir(directory).map_err(KernelError::file("remove", directory))
    }
}

fn names(directory: &Path, prefix: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let mut names: Vec<_> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect();
    names.sort();
    names
}

fn detach(path: &Path) -> Result<(), KernelError> {
    let link = match sys::open_pin(path) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(KernelError::file("open", path)(error)),
    };
    take_off(link.as_fd()).map_err(KernelError::file("detach", path))?;
    fs::remove_file(path).map_err(KernelError::file("remove", path))
}

/// At once: closing and unpinning a link take its program off some time later.
fn take_off(link: BorrowedFd<'_>) -> io::Result<()> {
    match sys::detach_link(link) {
        // What it was attached to is gone already.
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(()),
        other => other,
    }
}

fn is_layout(name: &str) -> bool {
    name.len() == 16 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hashes_are_taken_for_layouts() {
        assert!(is_layout("00ff00ff00ff00ff"));
        assert!(!is_layout("00ff00ff00ff00f"));
        assert!(!is_layout("someone_elses_x"));
        assert!(!is_layout("someone_elses_xx"));
    }
}
