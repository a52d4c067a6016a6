//! Network namespaces of pods, and the thread that enters them.

use std::any::Any;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Socket, Type};
use thiserror::Error;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};

use super::sys;

/// How many jobs may wait for one worker; at the bound, callers wait for a place.
const QUEUE: usize = 128;

/// Why something could not be done in a network namespace.
#[derive(Debug, Error)]
pub enum NetnsError {
    /// The path names nothing (any more).
    #[error("network namespace {path} is gone")]
    Gone {
        /// As the manifest gives it.
        path: PathBuf,
    },
    /// The path cannot be opened.
    #[error("cannot open network namespace {path}")]
    Open {
        /// As the manifest gives it.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It was opened, but cannot be entered.
    #[error("cannot enter the network namespace")]
    Enter(#[source] io::Error),
    /// Its cookie cannot be read.
    #[error("cannot read the network namespace's cookie")]
    Cookie(#[source] io::Error),
    /// The pod would share it with the host.
    #[error("the network namespace is the node's own")]
    Host,
    /// The worker could not be started.
    #[error("cannot start a worker for network namespaces")]
    Start(#[source] io::Error),
    /// The worker ended, or the job panicked: {0}.
    #[error("the worker for network namespaces failed: {0}")]
    Worker(String),
}

/// An open network namespace of a pod. It lives for as long as this does.
#[derive(Debug)]
pub struct Netns {
    file: Arc<File>,
    cookie: u64,
    path: PathBuf,
    inode: (u64, u64),
}

impl Netns {
    /// Opens the namespace at a path. Refuses the node's own.
    pub async fn open(path: &Path, worker: &NetnsWorker) -> Result<Self, NetnsError> {
        let (file, inode) = open_file(path)?;
        let file = Arc::new(file);
        let cookie = worker
            .enter(&file, current_cookie)
            .await?
            .map_err(NetnsError::Cookie)?;
        if worker.host_cookies.contains(&cookie) {
            return Err(NetnsError::Host);
        }
        Ok(Self {
            file,
            cookie,
            path: path.to_owned(),
            inode,
        })
    }

    /// Its cookie: never reused while the kernel runs.
    #[must_use]
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Whether the path still leads to it. Once it does not, nobody but us holds it.
    #[must_use]
    pub fn is_there(&self) -> bool {
        fs::metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == self.inode)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn open_file(path: &Path) -> Result<(File, (u64, u64)), NetnsError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => NetnsError::Gone {
            path: path.to_owned(),
        },
        _ => NetnsError::Open {
            path: path.to_owned(),
            source,
        },
    };
    // Not blocking: a path that names a FIFO must not hold the worker.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    Ok((file, (metadata.dev(), metadata.ino())))
}

fn current_cookie() -> io::Result<u64> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    sys::netns_cookie(socket.as_fd())
}

type Job = Box<dyn FnOnce(Result<(), NetnsError>) + Send>;

struct Task {
    netns: Arc<File>,
    job: Job,
}

/// A thread that enters network namespaces: setns(2) is per thread, so no thread of the runtime
/// may do it. Cloning gives another handle to the same thread, which ends with the last.
#[derive(Clone)]
pub struct NetnsWorker {
    queue: mpsc::Sender<Task>,
    host_cookies: Arc<[u64]>,
}

impl NetnsWorker {
    /// Starts the thread. It must be called on the runtime that is to serve what jobs open.
    pub fn start(name: &str) -> Result<Self, NetnsError> {
        let home = File::open("/proc/thread-self/ns/net").map_err(NetnsError::Start)?;
        let own = current_cookie().map_err(NetnsError::Cookie)?;
        let (queue, tasks) = mpsc::channel(QUEUE);
        let runtime = Handle::current();
        let (found, host) = std::sync::mpsc::sync_channel(1);
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let _entered = runtime.enter();
                let _ = found.send(init_cookie(&home));
                serve(tasks, &home);
            })
            .map_err(NetnsError::Start)?;
        let init = host
            .recv()
            .map_err(|error| NetnsError::Worker(error.to_string()))?;
        Ok(Self {
            queue,
            host_cookies: std::iter::once(own).chain(init).collect(),
        })
    }

    /// Runs a job inside a namespace and gives back what it returns. A job must not block: all
    /// pods share the thread.
    pub async fn run<T, F>(&self, netns: &Netns, job: F) -> Result<T, NetnsError>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        self.enter(&netns.file, job).await
    }

    /// Has a job run inside a namespace some time soon, which nobody waits for. Where too many wait
    /// already it is dropped.
    pub fn submit(&self, netns: &Netns, job: impl FnOnce() + Send + 'static) {
        let job: Job = Box::new(move |entered| {
            if entered.is_ok() && catch_unwind(AssertUnwindSafe(job)).is_err() {
                tracing::error!("a job in a network namespace panicked");
            }
        });
        let netns = netns.file.clone();
        // A full queue, or a worker that ended: then the job's callers learn of it from the next.
        let _ = self.queue.try_send(Task { netns, job });
    }

    async fn enter<T, F>(&self, netns: &Arc<File>, job: F) -> Result<T, NetnsError>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let (done, result) = oneshot::channel();
        let job: Job = Box::new(move |entered| {
            let outcome = entered.and_then(|()| {
                catch_unwind(AssertUnwindSafe(job))
                    .map_err(|panic| NetnsError::Worker(panic_text(panic.as_ref())))
            });
            let _ = done.send(outcome);
        });
        let ended = || NetnsError::Worker("it ended".to_owned());
        self.queue
            .send(Task {
                netns: netns.clone(),
                job,
            })
            .await
            .map_err(|_| ended())?;
        result.await.map_err(|_| ended())?
    }
}

fn serve(mut tasks: mpsc::Receiver<Task>, home: &File) {
    while let Some(Task { netns, job }) = tasks.blocking_recv() {
        let entered = setns(&netns, CloneFlags::CLONE_NEWNET);
        drop(netns);
        match entered {
            Ok(()) => {
                job(Ok(()));
                // Harmless for the next job, which enters its own; but until then this thread
                // keeps the pod's namespace alive.
                if let Err(error) = setns(home, CloneFlags::CLONE_NEWNET) {
                    tracing::error!(%error, "cannot return to the node's network namespace");
                }
            }
            Err(errno) => job(Err(NetnsError::Enter(errno.into()))),
        }
    }
}

/// Cookie of the namespace of process 1, which is the host's where the agent shares its processes.
fn init_cookie(home: &File) -> Option<u64> {
    let init = File::open("/proc/1/ns/net").ok()?;
    setns(&init, CloneFlags::CLONE_NEWNET).ok()?;
    let cookie = current_cookie().ok();
    if let Err(error) = setns(home, CloneFlags::CLONE_NEWNET) {
        tracing::error!(%error, "cannot return to the node's network namespace");
    }
    cookie
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a job panicked".to_owned())
}

/// Looks for namespaces by cookie among those that the node names: `/run/netns` and those of its
/// processes. For what a former agent left behind in pods that no manifest names any more.
pub async fn find(cookies: &[u64], worker: &NetnsWorker) -> Vec<Netns> {
    let mut seen = std::collections::BTreeSet::new();
    let mut found = Vec::new();
    for path in named_namespaces() {
        if found.len() == cookies.len() {
            break;
        }
        let Ok(metadata) = fs::metadata(&path) else {
            continue;
        };
        if !seen.insert((metadata.dev(), metadata.ino())) {
            continue;
        }
        if let Ok(netns) = Netns::open(&path, worker).await
            && cookies.contains(&netns.cookie)
        {
            found.push(netns);
        }
    }
    found
}

fn named_namespaces() -> Vec<PathBuf> {
    let entries = |directory: &str| {
        fs::read_dir(directory)
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
            .map(|entry| entry.path())
    };
    let is_process = |path: &PathBuf| {
        path.file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.bytes().all(|c| c.is_ascii_digit()))
    };
    entries("/run/netns")
        .chain(
            entries("/proc")
                .filter(is_process)
                .map(|p| p.join("ns/net")),
        )
        .collect()
}
