//! Desired state from a directory of manifests, see `docs/manifests.md`.

mod directory;
mod document;
mod read;
mod status;
mod tree;
mod watch;

pub use status::{DocumentError, ERRORS_LISTED, FileStatus, NoticedBy};

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch::{Receiver, Sender, channel};
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::directory::{Directory, Next};
use self::watch::{Noticed, Watch};
use super::Outcome;
use crate::mesh::{SharedSnapshot, Snapshot};

/// Where to read and how.
#[derive(Debug, Clone)]
pub struct FileSourceOptions {
    /// The directory; its subdirectories are not read.
    pub directory: PathBuf,
    /// The node of this agent.
    pub node: Arc<str>,
    /// How much is read.
    pub limits: Limits,
    /// How long it must be quiet before changed files are read. Default 50 ms.
    pub quiet: Duration,
    /// After which time they are read although it is not. Default 1 s.
    pub patience: Duration,
    /// How often all files are looked at whatever the kernel told. Default 10 s.
    pub rescan: Duration,
}

impl FileSourceOptions {
    /// The defaults for this directory and node.
    #[must_use]
    pub fn new(directory: impl Into<PathBuf>, node: &str) -> Self {
        Self {
            directory: directory.into(),
            node: node.into(),
            limits: Limits::default(),
            quiet: Duration::from_millis(50),
            patience: Duration::from_secs(1),
            rescan: Duration::from_secs(10),
        }
    }
}

/// How much is read. What is beyond is refused, and the status says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a file. Default 16 MiB.
    pub file_bytes: u64,
    /// Files, the first by name. Default 32,768.
    pub files: usize,
    /// Objects of all files. Default 262,144.
    pub objects: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            file_bytes: 16 << 20,
            files: 1 << 15,
            objects: 1 << 18,
        }
    }
}

/// Why a source cannot start.
#[derive(Debug, Error)]
pub enum FileSourceError {
    /// The directory is not there, or is not ours to read.
    #[error("manifests cannot be read from {}: {source}", directory.display())]
    Directory {
        /// The directory.
        directory: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A directory of manifests, read and followed.
#[derive(Debug)]
pub struct FileSource {
    status: Receiver<Arc<FileStatus>>,
    generations: Receiver<u64>,
}

impl FileSource {
    /// Reads the directory, puts what it says in force, and follows it on the current runtime until
    /// `stop`. Documents that are wrong are no error: see [`FileSource::status`].
    ///
    /// The first reading is done when this returns; it blocks the caller for its time.
    pub fn start(
        options: FileSourceOptions,
        snapshot: SharedSnapshot,
        stop: CancellationToken,
    ) -> Result<Arc<Self>, FileSourceError> {
        let mut directory = open(&options)?;
        // First the watch, then the look: nothing falls between them.
        let watch = Watch::new(&options.directory)
            .inspect_err(|error| warn!(%error, "changes of manifests are noticed by polling only"))
            .ok();
        let (_, next) = directory.look(&BTreeSet::new(), &BTreeSet::new());
        let (status, status_seen) = channel(Arc::new(FileStatus::default()));
        let (generations, generations_seen) = channel(0);
        let mut follower = Follower {
            publisher: Publisher {
                snapshot,
                status,
                generations,
            },
            directory: Some(directory),
            noticed: Noticed::default(),
            watch,
            options,
        };
        follower.publish(Outcome::Changed);
        tokio::spawn(follower.run(next, stop));
        Ok(Arc::new(Self {
            status: status_seen,
            generations: generations_seen,
        }))
    }

    /// Number of the snapshot in force, and its changes.
    #[must_use]
    pub fn generations(&self) -> Receiver<u64> {
        self.generations.clone()
    }

    /// What was read and what is wrong with it.
    #[must_use]
    pub fn status(&self) -> Arc<FileStatus> {
        self.status.borrow().clone()
    }

    /// The same, and its changes.
    #[must_use]
    pub fn statuses(&self) -> Receiver<Arc<FileStatus>> {
        self.status.clone()
    }
}

/// Reads a directory once: for checking manifests without an agent.
pub fn load_once(options: &FileSourceOptions) -> Result<(Snapshot, FileStatus), FileSourceError> {
    let mut directory = open(options)?;
    directory.look(&BTreeSet::new(), &BTreeSet::new());
    Ok((directory.cluster().snapshot().clone(), directory.status()))
}

fn open(options: &FileSourceOptions) -> Result<Directory, FileSourceError> {
    let path = options.directory.clone();
    match std::fs::read_dir(&path) {
        Ok(_) => Ok(Directory::new(path, &options.node, options.limits)),
        Err(source) => Err(FileSourceError::Directory {
            directory: path,
            source,
        }),
    }
}

/// The task that follows a directory.
struct Follower {
    publisher: Publisher,
    /// Lent to a blocking thread while that looks at files; lost if that thread panicked.
    directory: Option<Directory>,
    noticed: Noticed,
    watch: Option<Watch>,
    options: FileSourceOptions,
}

impl Follower {
    async fn run(mut self, mut next: Next, stop: CancellationToken) {
        loop {
            let look = async {
                self.wait(next).await;
                self.look().await
            };
            next = tokio::select! {
                () = stop.cancelled() => return,
                next = look => match next {
                    Some(next) => next,
                    None => return,
                },
            };
        }
    }

    /// Waits for a change and then for quiet, or for the next rescan.
    async fn wait(&mut self, next: Next) {
        let start = Instant::now();
        let mut rescan = start + self.options.rescan;
        if next == Next::LookAgain {
            rescan = start + self.options.quiet;
        }
        if let Some(end) = self.noticed.patience_ends() {
            rescan = rescan.min(end);
        }
        if !self.notice_until(rescan).await {
            self.renew();
            return;
        }
        let latest = Instant::now() + self.options.patience;
        while self
            .notice_until(latest.min(Instant::now() + self.options.quiet))
            .await
        {
            if Instant::now() >= latest {
                return;
            }
        }
    }

    /// Whether something was noticed before this time.
    async fn notice_until(&mut self, deadline: Instant) -> bool {
        let Some(watch) = &mut self.watch else {
            sleep_until(deadline).await;
            return false;
        };
        match timeout_at(deadline, watch.notice(&mut self.noticed)).await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                warn!(%error, "changes of manifests are noticed by polling only");
                self.watch = None;
                false
            }
            Err(_) => false,
        }
    }

    fn renew(&mut self) {
        match &mut self.watch {
            // An error here is the directory's, which the look reports.
            Some(watch) => drop(watch.renew()),
            None => self.watch = Watch::new(&self.options.directory).ok(),
        }
    }

    /// Looks at the files on a blocking thread. None if that is not possible any more.
    async fn look(&mut self) -> Option<Next> {
        let mut directory = self.directory.take()?;
        let (touched, busy) = self.noticed.take(Instant::now());
        let looked = tokio::task::spawn_blocking(move || {
            let (outcome, next) = directory.look(&touched, &busy);
            (directory, outcome, next)
        });
        let (directory, outcome, next) = looked
            .await
            .inspect_err(|error| warn!(%error, "manifests are no longer followed"))
            .ok()?;
        self.directory = Some(directory);
        self.publish(outcome);
        Some(next)
    }

    fn publish(&mut self, outcome: Outcome) {
        let noticed_by = match self.watch {
            Some(_) => NoticedBy::Inotify,
            None => NoticedBy::Polling,
        };
        if let Some(directory) = &self.directory {
            self.publisher.publish(directory, noticed_by, outcome);
        }
    }
}

/// Where the outside looks.
struct Publisher {
    snapshot: SharedSnapshot,
    status: Sender<Arc<FileStatus>>,
    generations: Sender<u64>,
}

impl Publisher {
    fn publish(&self, directory: &Directory, noticed_by: NoticedBy, outcome: Outcome) {
        let before = self.status.borrow().clone();
        let mut status = FileStatus {
            noticed_by,
            generation: before.generation,
            last_change: before.last_change.clone(),
            ..directory.status()
        };
        if outcome == Outcome::Changed {
            status.generation += 1;
            status.last_change = OffsetDateTime::now_utc()
                .format(&Rfc3339)
                .unwrap_or_default();
            let snapshot = directory.cluster().snapshot().clone();
            self.snapshot.store(Arc::new(snapshot));
        }
        report(&before, &status);
        let generation = status.generation;
        self.status.send_if_modified(|current| {
            let modified = **current != status;
            if modified {
                *current = Arc::new(status);
            }
            modified
        });
        self.generations.send_if_modified(|current| {
            let modified = *current != generation;
            *current = generation;
            modified
        });
    }
}

/// Logs each error once, and that it is over.
fn report(before: &FileStatus, now: &FileStatus) {
    let known: BTreeSet<&DocumentError> = before.errors.iter().collect();
    let current: BTreeSet<&DocumentError> = now.errors.iter().collect();
    for error in current.difference(&known) {
        warn!(%error, "manifest refused; what was in force stays");
    }
    for error in known.difference(&current) {
        info!(%error, "manifest error is over");
    }
    for (kind, count) in &now.ignored {
        if before.ignored.get(kind) != Some(count) {
            info!(kind, count, "manifests of a kind that is not read");
        }
    }
    if now.generation != before.generation {
        info!(generation = now.generation, objects = ?now.objects, "manifests in force");
    }
}

#[cfg(test)]
mod route_tests;
#[cfg(test)]
mod tests;
