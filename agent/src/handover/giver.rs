//! The running agent's side.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::channel::{Channel, Door, is_nobody};
use super::{ANSWER, BATCH, Endpoint, Entry, HandoverError, LIMIT, Reply, Request, VERSION};
use crate::capture::{Capture, Held};
use crate::identity::{CertificateState, Certificates};

/// Longest wait for a successor that gets its certificates.
const PREPARATION: Duration = Duration::from_secs(60);
/// How long accepting successors rests when it fails.
const PAUSE: Duration = Duration::from_millis(200);

/// Waits for a successor and gives it the listeners. Dropping it removes the socket.
pub struct Giver {
    door: Door,
    path: PathBuf,
    node: String,
    capture: Arc<Capture>,
    certificates: Arc<Certificates>,
    own: Vec<(Endpoint, OwnedFd)>,
}

/// A successor accepts for every pod, and waits until this agent does not any more.
pub struct Committed {
    channel: Channel,
    _held: Held,
}

impl Committed {
    /// Tells the successor that it is alone. That it has gone meanwhile is no error here: whoever
    /// supervises it starts it again.
    pub async fn released(mut self) {
        if let Err(error) = self.channel.send(&Reply::Released, &[]).await {
            tracing::warn!(%error, "the successor cannot be told that it is alone");
        }
    }
}

impl Giver {
    /// Listens at `path`, in place of what an agent left there that is gone.
    pub async fn open(
        path: &Path,
        node: &str,
        capture: Arc<Capture>,
        certificates: Arc<Certificates>,
        own: Vec<(Endpoint, OwnedFd)>,
    ) -> Result<Self, HandoverError> {
        let door = open_door(path)
            .await
            .map_err(|source| HandoverError::Listen {
                path: path.to_owned(),
                source,
            })?;
        Ok(Self {
            door,
            path: path.to_owned(),
            node: node.to_owned(),
            capture,
            certificates,
            own,
        })
    }

    /// Returns once a successor accepts for every pod. One that fails leaves all as it was.
    pub async fn serve(self) -> Committed {
        loop {
            let channel = match self.door.accept().await {
                Ok(channel) => channel,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a successor");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            match self.hand_over(channel).await {
                Ok(committed) => return committed,
                // Somebody looked whether an agent is there.
                Err(HandoverError::Gone) => {}
                Err(error) => tracing::warn!(%error, "a successor did not take over"),
            }
        }
    }

    async fn hand_over(&self, mut channel: Channel) -> Result<Committed, HandoverError> {
        channel.check_peer()?;
        let (Request::Hello { versions }, _) = channel.receive(ANSWER).await? else {
            return Err(HandoverError::Protocol("no greeting".to_owned()));
        };
        if !versions.contains(&VERSION) {
            return refuse(&mut channel, format!("this agent speaks version {VERSION}")).await;
        }
        let hello = Reply::Hello {
            version: VERSION,
            node: self.node.clone(),
        };
        channel.send(&hello, &[]).await?;
        let (Request::Take { without }, _) = channel.receive(PREPARATION).await? else {
            return Err(HandoverError::Protocol("no request".to_owned()));
        };
        // Asked now and not at the greeting: what came meanwhile would be lost as well.
        if let Some(identity) = self.holds_one_of(&without) {
            let reason = format!("this agent has a certificate for {identity}");
            return refuse(&mut channel, reason).await;
        }
        let Ok(held) = timeout(LIMIT, self.capture.hold()).await else {
            return refuse(&mut channel, "pods are being enrolled".to_owned()).await;
        };
        match self.give(&mut channel).await {
            Ok(()) => Ok(Committed {
                channel,
                _held: held,
            }),
            Err(error) => {
                // Before anything else: a successor that is only late must not think that it won.
                let refused = refuse::<()>(&mut channel, error.to_string()).await;
                tracing::warn!(%error, told = !matches!(refused, Err(HandoverError::Gone)),
                    "the successor failed; going on");
                if let Err(error) = self.capture.resume(held).await {
                    tracing::error!(%error, "not all that the successor changed was put back");
                }
                Err(error)
            }
        }
    }

    async fn give(&self, channel: &mut Channel) -> Result<(), HandoverError> {
        let pods = self.capture.listeners()?;
        let own = self
            .own
            .iter()
            .map(|(endpoint, socket)| (Entry::Own(*endpoint), socket.as_fd()));
        let all: Vec<(Entry, BorrowedFd<'_>)> = pods
            .iter()
            .map(|handed| (handed.slot.into(), handed.descriptor.as_fd()))
            .chain(own)
            .collect();
        for batch in all.chunks(BATCH) {
            let (entries, descriptors): (Vec<_>, Vec<_>) = batch.iter().copied().unzip();
            let listeners = Reply::Listeners(entries);
            channel.send(&listeners, &descriptors).await?;
        }
        channel.send(&Reply::End { total: all.len() }, &[]).await?;
        match channel.receive(LIMIT).await? {
            (Request::Accepting, _) => Ok(()),
            (other, _) => Err(HandoverError::Protocol(format!("{other:?}"))),
        }
    }

    fn holds_one_of<'a>(&self, identities: &'a [String]) -> Option<&'a String> {
        let status = self.certificates.status();
        let held: HashSet<String> = status
            .into_iter()
            .filter(|certificate| certificate.state == CertificateState::Valid)
            .map(|certificate| certificate.id.to_string())
            .collect();
        identities.iter().find(|identity| held.contains(*identity))
    }
}

impl Drop for Giver {
    fn drop(&mut self) {
        // A successor that finds it all the same sees that nobody listens there.
        let _ = fs::remove_file(&self.path);
    }
}

async fn refuse<T>(channel: &mut Channel, reason: String) -> Result<T, HandoverError> {
    let refused = Reply::Refused {
        reason: reason.clone(),
    };
    channel.send(&refused, &[]).await?;
    Err(HandoverError::Refused(reason))
}

async fn open_door(path: &Path) -> io::Result<Door> {
    use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
    if let Some(directory) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)?;
    }
    if path.exists() {
        match Channel::try_connect(path).await {
            Err(error) if is_nobody(&error) => fs::remove_file(path)?,
            // Also one whose queue is full is there.
            Ok(_) | Err(_) => return Err(io::ErrorKind::AddrInUse.into()),
        }
    }
    let door = Door::open(path)?;
    // Whoever comes before this is checked all the same.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(door)
}
