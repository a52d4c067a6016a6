//! Take-over: a successor receives the listening sockets of a running agent over a unix socket,
//! begins to accept, and lets the old one drain. No accept queue is lost and no new connection is
//! refused, in either mode.
//!
//! ```text
//! successor                                      running agent
//!   hello {versions} ───────────────────────────►
//!   ◄───────────────────── hello {version, node}
//!   (waits for its certificates)
//!   take {without} ─────────────────────────────►  refused if it has a certificate for one of these;
//!                                                  else enrolment and verification rest
//!   ◄────────── listeners [slot …] + descriptors   in batches, then `end {total}`
//!   (lays every pod, then accepts beside the old one)
//!   accepting ──────────────────────────────────►  stops accepting, lets go of the rest
//!   ◄──────────────────────────────── released     drains until its deadline and exits
//! ```
//!
//! Until `accepting` was read the running agent is the agent: if the successor goes away or takes
//! longer than [`LIMIT`], it puts its listeners back and goes on. If the running agent goes away,
//! the successor is the agent, with the listeners that it has got. From `accepting` on the
//! successor is.

mod channel;
mod giver;
mod successor;

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::capture::kernel::{Family, ListenerKind, ListenerSlot};

pub use giver::{Committed, Giver};
pub use successor::{Predecessor, Taken};

/// What this agent speaks.
const VERSION: u16 = 1;
/// Longest time from `take` to `accepting`.
pub const LIMIT: Duration = Duration::from_secs(10);
/// Longest wait for an answer to anything else.
const ANSWER: Duration = Duration::from_secs(5);
/// Only root's.
const SOCKETS: &str = "/run/undermesh";
/// Descriptors in one message; the kernel takes 253 (`SCM_MAX_FD`).
const BATCH: usize = 64;

/// Where agents that hold the same pins meet, if nothing else is said. Named after the directory itself and
/// not its path: two nodes of one machine never meet, and two mounts of one bpffs always do. A file and not
/// an abstract name, because root of a container in the node's network could bind or reach that.
pub fn default_socket(pins: &Path) -> io::Result<PathBuf> {
    let directory = fs::metadata(pins)?;
    let (device, inode) = (directory.dev(), directory.ino());
    Ok(Path::new(SOCKETS).join(format!("hand-over-{device:x}-{inode:x}")))
}

/// A listener of the agent itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Endpoint {
    /// The admin endpoint.
    Admin,
    /// Metrics.
    Metrics,
    /// Readiness.
    Readiness,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Request {
    Hello {
        versions: Vec<u16>,
    },
    Take {
        /// Identities that the successor needs and holds no valid certificate of.
        without: Vec<String>,
    },
    Accepting,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Reply {
    Hello { version: u16, node: String },
    Listeners(Vec<Entry>),
    End { total: usize },
    Released,
    Refused { reason: String },
}

/// Says what a descriptor of the same message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Entry {
    Pod {
        netns_cookie: u64,
        family: WireFamily,
        kind: WireKind,
    },
    Own(Endpoint),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum WireFamily {
    V4,
    V6,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum WireKind {
    Outbound,
    Inbound,
    Hbone,
}

impl From<ListenerSlot> for Entry {
    fn from(slot: ListenerSlot) -> Self {
        Self::Pod {
            netns_cookie: slot.netns_cookie,
            family: match slot.family {
                Family::V4 => WireFamily::V4,
                Family::V6 => WireFamily::V6,
            },
            kind: match slot.kind {
                ListenerKind::Outbound => WireKind::Outbound,
                ListenerKind::Inbound => WireKind::Inbound,
                ListenerKind::Hbone => WireKind::Hbone,
            },
        }
    }
}

fn slot(netns_cookie: u64, family: WireFamily, kind: WireKind) -> ListenerSlot {
    ListenerSlot {
        netns_cookie,
        family: match family {
            WireFamily::V4 => Family::V4,
            WireFamily::V6 => Family::V6,
        },
        kind: match kind {
            WireKind::Outbound => ListenerKind::Outbound,
            WireKind::Inbound => ListenerKind::Inbound,
            WireKind::Hbone => ListenerKind::Hbone,
        },
    }
}

/// Why listeners are not handed over.
#[derive(Debug, Error)]
pub enum HandoverError {
    /// The socket cannot be made.
    #[error("cannot listen on {}", path.display())]
    Listen {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A running agent was to be taken over, and there is none.
    #[error("no agent answers at {}", path.display())]
    Nobody {
        /// Where it was looked for.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The other process is not root's.
    #[error("the other process belongs to user {0}, not to root")]
    NotRoot(u32),
    /// The other side does not want to.
    #[error("refused: {0}")]
    Refused(String),
    /// The other side went away.
    #[error("the other side went away")]
    Gone,
    /// The other side did not answer in time.
    #[error("no answer in time")]
    Late,
    /// What came is not what may come.
    #[error("unexpected message: {0}")]
    Protocol(String),
    /// The successor lacks what the running agent has.
    #[error("{0}; the running agent goes on")]
    Unready(String),
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

#[cfg(test)]
mod tests;
