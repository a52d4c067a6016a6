//! The CA's directory: its key, mode 0600, and its root, made on first start and kept.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use thiserror::Error;
use zeroize::Zeroizing;

use super::signer::{Signer, SignerError};
use crate::mesh::TrustDomain;

/// The private key, PKCS #8 PEM.
const KEY: &str = "ca-key.pem";
/// What agents trust, PEM.
const ROOT: &str = "root.pem";
/// Largest file that is read, in bytes.
const MAX_FILE: u64 = 64 * 1024;

/// Why the directory cannot be used.
#[derive(Debug, Error)]
pub enum StateError {
    /// A file or the directory.
    #[error("{path}: {error}")]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// Others than the owner may read the key.
    #[error("{path} has mode {mode:04o}: others may read the CA's key, expected 0600")]
    Exposed {
        /// The key.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A root without its key: a new key would make every agent distrust the CA.
    #[error("{root} is there, but its key {key} is not: put it back, or move the root away")]
    KeyLost {
        /// The root.
        root: PathBuf,
        /// Where the key should be.
        key: PathBuf,
    },
    /// What is in the files.
    #[error("{path}: {error}")]
    Signer {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        error: SignerError,
    },
}

/// Loads the CA from its directory, or makes both on first start. Two processes that start at
/// once end up with one key.
pub(super) fn open(
    directory: &Path,
    trust_domain: &TrustDomain,
    now: SystemTime,
) -> Result<Signer, StateError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |error| StateError::Io { path, error }
    };
    let signer = |error| StateError::Signer {
        path: directory.to_owned(),
        error,
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(io(directory))?;
    let (key, root) = (directory.join(KEY), directory.join(ROOT));
    if !key.try_exists().map_err(io(&key))? {
        if root.try_exists().map_err(io(&root))? {
            return Err(StateError::KeyLost { root, key });
        }
        let pem = Signer::generate_key().map_err(signer)?;
        create_once(&key, pem.as_bytes(), 0o600).map_err(io(&key))?;
    }
    let key_pem = read_key(&key)?;
    if !root.try_exists().map_err(io(&root))? {
        let pem = Signer::generate_root(&key_pem, trust_domain, now).map_err(signer)?;
        create_once(&root, pem.as_bytes(), 0o644).map_err(io(&root))?;
    }
    let root_pem = File::open(&root).and_then(read_text).map_err(io(&root))?;
    Signer::new(&key_pem, &root_pem, now).map_err(signer)
}

fn read_key(path: &Path) -> Result<Zeroizing<String>, StateError> {
    let io = |error| StateError::Io {
        path: path.to_owned(),
        error,
    };
    let file = File::open(path).map_err(io)?;
    let mode = file.metadata().map_err(io)?.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(StateError::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    read_text(file).map_err(io)
}

fn read_text(file: File) -> io::Result<Zeroizing<String>> {
    // Room from the start: a string that grows leaves copies behind.
    let mut text = Zeroizing::new(String::with_capacity(MAX_FILE as usize));
    file.take(MAX_FILE).read_to_string(&mut text)?;
    Ok(text)
}

/// Makes a file with its content and mode in one step, on disk before it has its name. A file that
/// is there already stays as it is.
fn create_once(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let temporary = path.with_extension(format!("new-{:016x}", rand::random::<u64>()));
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)
        .and_then(|mut file| {
            file.write_all(content)?;
            file.sync_all()
        })
        .and_then(|()| match std::fs::hard_link(&temporary, path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            linked => linked,
        });
    let removed = std::fs::remove_file(&temporary);
    written?;
    removed?;
    match path.parent() {
        Some(directory) => File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn open_in(directory: &Path) -> Result<Signer, StateError> {
        open(directory, &TrustDomain::default(), SystemTime::now())
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn the_key_has_mode_0600_and_its_directory_0700_from_the_first_start() {
        let base = tempfile::tempdir().unwrap();
        let directory = base.path().join("state");
        open_in(&directory).unwrap();
        assert_eq!(mode(&directory), 0o700);
        assert_eq!(mode(&directory.join(KEY)), 0o600);
        let names: Vec<_> = std::fs::read_dir(&directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(names.len(), 2, "nothing is left behind: {names:?}");
    }

    #[test]
    fn a_restart_keeps_key_and_root() {
        let base = tempfile::tempdir().unwrap();
        let first = open_in(base.path()).unwrap();
        let key = std::fs::read(base.path().join(KEY)).unwrap();
        let second = open_in(base.path()).unwrap();
        assert_eq!(first.root_pem(), second.root_pem());
        assert_eq!(key, std::fs::read(base.path().join(KEY)).unwrap());
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let base = tempfile::tempdir().unwrap();
        open_in(base.path()).unwrap();
        let key = base.path().join(KEY);
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(
            open_in(base.path()),
            Err(StateError::Exposed { mode: 0o640, .. })
        ));
    }

    #[test]
    fn a_lost_key_is_not_silently_replaced() {
        let base = tempfile::tempdir().unwrap();
        open_in(base.path()).unwrap();
        std::fs::remove_file(base.path().join(KEY)).unwrap();
        assert!(matches!(
            open_in(base.path()),
            Err(StateError::KeyLost { .. })
        ));
    }

    #[test]
    fn a_root_that_was_not_written_before_a_crash_is_made_from_the_key() {
        let base = tempfile::tempdir().unwrap();
        open_in(base.path()).unwrap();
        let key = std::fs::read(base.path().join(KEY)).unwrap();
        std::fs::remove_file(base.path().join(ROOT)).unwrap();
        open_in(base.path()).unwrap();
        assert_eq!(key, std::fs::read(base.path().join(KEY)).unwrap());
    }

    #[test]
    fn a_root_of_another_key_is_refused() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        open_in(one.path()).unwrap();
        open_in(two.path()).unwrap();
        std::fs::copy(two.path().join(ROOT), one.path().join(ROOT)).unwrap();
        assert!(matches!(
            open_in(one.path()),
            Err(StateError::Signer {
                error: SignerError::KeyMismatch,
                ..
            })
        ));
    }

    #[test]
    fn the_first_of_two_writers_wins() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("file");
        create_once(&path, b"first", 0o600).unwrap();
        create_once(&path, b"second", 0o600).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"first");
    }
}
