//! Noticing that files change.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::StreamExt;
use inotify::{Event, EventMask, EventStream, Inotify, WatchDescriptor, WatchMask};
use tokio::time::Instant;

use super::read::is_manifest;

/// How long a file that is open for writing is left alone, counted from its last change. Whoever
/// holds it open longer gets it read as it is.
const WRITER_PATIENCE: Duration = Duration::from_secs(2);

/// Bytes of events taken at once. More of them wait in the kernel, and of too many there it tells.
const EVENT_BYTES: usize = 4096;

/// A watch on a directory.
pub(super) struct Watch {
    directory: PathBuf,
    events: EventStream<[u8; EVENT_BYTES]>,
    descriptor: Option<WatchDescriptor>,
}

/// What was noticed since the last look.
#[derive(Debug, Default)]
pub(super) struct Noticed {
    touched: BTreeSet<String>,
    /// Files with unfinished writes, and when the last was seen.
    writing: BTreeMap<String, Instant>,
}

impl Noticed {
    /// Files to read whatever they look like, since the last call. Those that are being written
    /// stay for the next.
    pub(super) fn take(&mut self, now: Instant) -> (BTreeSet<String>, BTreeSet<String>) {
        self.writing
            .retain(|_, last| now.duration_since(*last) < WRITER_PATIENCE);
        let busy: BTreeSet<String> = self.writing.keys().cloned().collect();
        let (later, touched) = std::mem::take(&mut self.touched)
            .into_iter()
            .partition(|name| busy.contains(name));
        self.touched = later;
        (touched, busy)
    }

    /// When to look at the latest, because of somebody who does not finish.
    pub(super) fn patience_ends(&self) -> Option<Instant> {
        self.writing
            .values()
            .min()
            .map(|last| *last + WRITER_PATIENCE)
    }

    fn absorb(&mut self, event: &Event<std::ffi::OsString>, now: Instant) {
        let name = event.name.as_ref().and_then(|name| name.to_str());
        let Some(name) = name.filter(|name| is_manifest(name)) else {
            return;
        };
        if event.mask.contains(EventMask::MODIFY) {
            self.writing.insert(name.to_owned(), now);
        } else {
            self.writing.remove(name);
        }
        self.touched.insert(name.to_owned());
    }
}

impl Watch {
    pub(super) fn new(directory: &Path) -> io::Result<Self> {
        let mut watch = Self {
            directory: directory.to_owned(),
            events: Inotify::init()?.into_event_stream([0; EVENT_BYTES])?,
            descriptor: None,
        };
        watch.renew()?;
        Ok(watch)
    }

    /// Watches what the directory's path leads to now: it may have been replaced.
    pub(super) fn renew(&mut self) -> io::Result<()> {
        let mask = WatchMask::CREATE
            | WatchMask::MODIFY
            | WatchMask::CLOSE_WRITE
            | WatchMask::ATTRIB
            | WatchMask::MOVE
            | WatchMask::DELETE
            | WatchMask::ONLYDIR;
        let mut watches = self.events.watches();
        let descriptor = watches.add(&self.directory, mask)?;
        let old = self.descriptor.replace(descriptor.clone());
        if let Some(old) = old.filter(|old| *old != descriptor) {
            // Gone already, if the old directory is.
            let _ = watches.remove(old);
        }
        Ok(())
    }

    /// Waits until something happens in the directory. Loses nothing if it is dropped meanwhile.
    pub(super) async fn notice(&mut self, noticed: &mut Noticed) -> io::Result<()> {
        match self.events.next().await {
            Some(Ok(event)) => {
                noticed.absorb(&event, Instant::now());
                Ok(())
            }
            Some(Err(error)) => Err(error),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn until_touched(watch: &mut Watch, noticed: &mut Noticed, name: &str) {
        let wait = async {
            while !noticed.touched.contains(name) {
                watch.notice(noticed).await.unwrap();
            }
        };
        tokio::time::timeout(Duration::from_secs(10), wait)
            .await
            .expect("nothing was noticed");
    }

    #[tokio::test]
    async fn a_file_that_is_being_written_is_busy_until_it_is_closed() {
        use std::io::Write;
        let directory = tempfile::tempdir().unwrap();
        let mut watch = Watch::new(directory.path()).unwrap();
        let mut noticed = Noticed::default();
        let mut file = std::fs::File::create(directory.path().join("a.yaml")).unwrap();
        file.write_all(b"kind: Po").unwrap();
        let mut last = Instant::now();
        while noticed.writing.is_empty() {
            watch.notice(&mut noticed).await.unwrap();
            last = Instant::now();
        }
        let (touched, busy) = noticed.take(last);
        assert!(touched.is_empty());
        assert_eq!(busy, BTreeSet::from(["a.yaml".to_owned()]));

        drop(file);
        while !noticed.writing.is_empty() {
            watch.notice(&mut noticed).await.unwrap();
        }
        let (touched, busy) = noticed.take(last);
        assert_eq!(touched, BTreeSet::from(["a.yaml".to_owned()]));
        assert!(busy.is_empty());
    }

    #[test]
    fn a_writer_that_does_not_finish_is_not_waited_for_without_end() {
        let start = Instant::now();
        let name = "a.yaml".to_owned();
        let mut noticed = Noticed {
            touched: BTreeSet::from([name.clone()]),
            writing: BTreeMap::from([(name.clone(), start)]),
        };
        assert_eq!(noticed.patience_ends(), Some(start + WRITER_PATIENCE));
        let (touched, busy) = noticed.take(start + WRITER_PATIENCE);
        assert_eq!(touched, BTreeSet::from([name]));
        assert!(busy.is_empty());
        assert_eq!(noticed.patience_ends(), None);
    }

    #[tokio::test]
    async fn a_directory_that_was_replaced_is_watched_again() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("manifests");
        std::fs::create_dir(&path).unwrap();
        let mut watch = Watch::new(&path).unwrap();
        std::fs::rename(&path, parent.path().join("old")).unwrap();
        std::fs::create_dir(&path).unwrap();
        watch.renew().unwrap();
        let mut noticed = Noticed::default();
        std::fs::write(path.join("a.yaml"), "").unwrap();
        until_touched(&mut watch, &mut noticed, "a.yaml").await;
    }
}
