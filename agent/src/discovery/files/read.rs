//! Looking at files without being fooled by those that write them.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// What tells whether a file changed, without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Signature {
    device: u64,
    inode: u64,
    length: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Signature {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// What reading a file came to.
#[derive(Debug)]
pub(super) enum Content {
    /// Its text, and the signature of just that text.
    Text(Signature, String),
    /// It changed while it was read: look again.
    Unsettled,
    /// It is no longer there.
    Gone,
    /// It cannot be taken, and why.
    Refused(String),
}

/// Manifests of a directory by name, in the order of names, and how many there are beyond the
/// bound. Hidden files, as editors and ConfigMap volumes have them, are none; links are followed;
/// what is no regular file is left out: opening it may block.
pub(super) fn list(
    directory: &Path,
    bound: usize,
) -> io::Result<(BTreeMap<String, Signature>, usize)> {
    let mut files = BTreeMap::new();
    let mut beyond = 0;
    for entry in fs::read_dir(directory)? {
        let Ok(name) = entry?.file_name().into_string() else {
            continue;
        };
        if !is_manifest(&name) {
            continue;
        }
        // A dangling link, or a file that is gone by now.
        let Ok(metadata) = fs::metadata(directory.join(&name)) else {
            continue;
        };
        if !metadata.is_file() {
            continue;
        }
        files.insert(name, Signature::of(&metadata));
        if files.len() > bound {
            files.pop_last();
            beyond += 1;
        }
    }
    Ok((files, beyond))
}

/// Whether a file of this name is read.
pub(super) fn is_manifest(name: &str) -> bool {
    !name.starts_with('.')
        && Path::new(name).extension().is_some_and(|extension| {
            ["yaml", "yml", "json"]
                .iter()
                .any(|known| extension == *known)
        })
}

/// Reads a file of at most this many bytes.
pub(super) fn read(path: &Path, bytes_max: u64) -> Content {
    match try_read(path, bytes_max) {
        Ok(content) => content,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Content::Gone,
        Err(error) => Content::Refused(format!("cannot be read: {error}")),
    }
}

fn try_read(path: &Path, bytes_max: u64) -> io::Result<Content> {
    // Non-blocking, in case that it became a FIFO.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)?;
    let before = file.metadata()?;
    if !before.is_file() {
        return Ok(Content::Gone);
    }
    if before.len() > bytes_max {
        return Ok(Content::Refused(format!(
            "has {} bytes, more than {bytes_max}",
            before.len()
        )));
    }
    let mut bytes = Vec::new();
    (&file).take(bytes_max + 1).read_to_end(&mut bytes)?;
    let signature = Signature::of(&before);
    let settled = Signature::of(&file.metadata()?) == signature
        && u64::try_from(bytes.len()).is_ok_and(|length| length == signature.length);
    if !settled {
        return Ok(Content::Unsettled);
    }
    Ok(match String::from_utf8(bytes) {
        Ok(text) => Content::Text(signature, text),
        Err(error) => Content::Refused(format!(
            "is not UTF-8 after byte {}",
            error.utf8_error().valid_up_to()
        )),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_manifests_are_listed_and_links_are_followed() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for name in [
            "a.yaml", "b.yml", "c.json", "d.yaml~", ".e.yaml", "f.txt", "g",
        ] {
            fs::write(path(name), "").unwrap();
        }
        fs::create_dir(path("h.yaml")).unwrap();
        nix::unistd::mkfifo(&path("i.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::os::unix::fs::symlink(path("g"), path("j.yaml")).unwrap();
        std::os::unix::fs::symlink(path("nowhere"), path("k.yaml")).unwrap();
        let (files, beyond) = list(directory.path(), 10).unwrap();
        let names: Vec<_> = files.keys().map(String::as_str).collect();
        assert_eq!(names, ["a.yaml", "b.yml", "c.json", "j.yaml"]);
        assert_eq!(beyond, 0);
    }

    #[test]
    fn files_beyond_the_bound_are_counted_and_the_first_by_name_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["c.yaml", "a.yaml", "b.yaml"] {
            fs::write(directory.path().join(name), "").unwrap();
        }
        let (files, beyond) = list(directory.path(), 2).unwrap();
        assert_eq!(files.into_keys().collect::<Vec<_>>(), ["a.yaml", "b.yaml"]);
        assert_eq!(beyond, 1);
    }

    #[test]
    fn a_file_that_cannot_be_taken_says_why() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.yaml");
        assert!(matches!(read(&path, 4), Content::Gone));
        fs::write(&path, "12345").unwrap();
        let Content::Refused(reason) = read(&path, 4) else {
            panic!("was taken");
        };
        assert_eq!(reason, "has 5 bytes, more than 4");
        fs::write(&path, b"a\xff").unwrap();
        let Content::Refused(reason) = read(&path, 4) else {
            panic!("was taken");
        };
        assert_eq!(reason, "is not UTF-8 after byte 1");
    }

    #[test]
    fn a_file_renamed_over_has_another_signature_even_with_the_same_text() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.yaml");
        fs::write(&path, "x").unwrap();
        let Content::Text(before, _) = read(&path, 4) else {
            panic!("was not taken");
        };
        fs::write(directory.path().join("b"), "x").unwrap();
        fs::rename(directory.path().join("b"), &path).unwrap();
        let Content::Text(after, text) = read(&path, 4) else {
            panic!("was not taken");
        };
        assert_eq!(text, "x");
        assert_ne!(before, after);
    }
}
