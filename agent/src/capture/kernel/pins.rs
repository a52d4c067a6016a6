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

    /// Attaches a program and pins the link. A link that a former agent pinned gets the new program
    /// in place of the old one, without a moment between; one whose target is gone, or another,
    /// makes way for a new one.
    pub(super) fn attach(
        &self,
        name: &str,
        program: BorrowedFd<'_>,
        target: &Target<'_>,
        kind: AttachType,
    ) -> Result<(), io::Error> {
        let path = self.directory.join(name);
        let former = match sys::open_pin(&path) {
            Ok(link) => Some(link),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        if let Some(link) = &former
            && target.is_of(&sys::link_info(link.as_fd())?)?
            && sys::update_link(link.as_fd(), program).is_ok()
        {
            return Ok(());
        }
        // The new one first, so that there is always one.
        let link = sys::link(program, target.descriptor(), kind)?;
        if former.is_some() {
            fs::remove_file(&path)?;
        }
        sys::pin(link.as_fd(), &path)
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
        let Ok(entries) = fs::read_dir(&self.directory) else {
            return Vec::new();
        };
        let mut names: Vec<_> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.starts_with(prefix))
            .collect();
        names.sort();
        names
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
                .is_some_and(|name| name.as_encoded_bytes().starts_with(b"link_"));
            if is_link {
                detach(&path)?;
            } else {
                fs::remove_file(&path).map_err(KernelError::file("remove", path))?;
            }
        }
        fs::remove_dir(directory).map_err(KernelError::file("remove", directory))
    }
}

fn detach(path: &Path) -> Result<(), KernelError> {
    let link = match sys::open_pin(path) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(KernelError::file("open", path)(error)),
    };
    match sys::detach_link(link.as_fd()) {
        // What it was attached to is gone already.
        Err(error) if error.raw_os_error() != Some(libc::ENOLINK) => {
            return Err(KernelError::file("detach", path)(error));
        }
        _ => {}
    }
    fs::remove_file(path).map_err(KernelError::file("remove", path))
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
