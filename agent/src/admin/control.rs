//! The control socket: what changes something, for root on this node alone.
//!
//! The admin endpoint answers GET only, to whoever is on the node. What an operator may do to the
//! agent comes through a Unix socket instead, which only root can open, and whose peer the kernel
//! names (`SO_PEERCRED`).

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::listener::serve_connection;
use crate::resilience::BreakerBook;
use crate::resilience::breaker::Forced;

/// Connections at one time; those beyond are closed at once.
const CONNECTIONS: usize = 8;

/// How long to wait when accepting fails: with EMFILE it would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Path of what forces breakers.
pub const FORCE_PATH: &str = "/breakers/force";

/// What is asked of [`FORCE_PATH`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForceRequest {
    /// The destination, as `/breakers` names it.
    pub destination: String,
    /// One of its routes; none: all.
    pub route: Option<String>,
    /// What to impose; none releases.
    pub force: Option<ForceTo>,
}

/// What an operator imposes on a breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ForceTo {
    /// Rejects everything.
    Open,
    /// Passes everything.
    Closed,
}

impl From<ForceTo> for Forced {
    fn from(to: ForceTo) -> Self {
        match to {
            ForceTo::Open => Self::Open,
            ForceTo::Closed => Self::Closed,
        }
    }
}

/// What [`FORCE_PATH`] answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForceAnswer {
    /// Breakers that were forced or released.
    pub breakers: usize,
}

/// Why there is no control socket.
#[derive(Debug, Error)]
#[error("cannot listen on {path}: {source}")]
pub struct ControlError {
    /// Where.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// The control socket, bound.
#[derive(Debug)]
pub struct Control {
    socket: UnixListener,
    place: Place,
    book: Arc<dyn BreakerBook>,
}

/// Where the socket is in the file system. Taken away when dropped, unless another agent has put its
/// own there meanwhile.
#[derive(Debug)]
struct Place {
    path: PathBuf,
    inode: u64,
}

impl Control {
    /// Binds it, in place of what another agent has left or is leaving there: the last one that was
    /// started is asked. The directory is made if it is not there, for root alone.
    pub fn bind(path: &Path, book: Arc<dyn BreakerBook>) -> Result<Self, ControlError> {
        let (socket, place) = bind(path).map_err(|source| ControlError {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            socket,
            place,
            book,
        })
    }

    /// Serves until stopped.
    pub async fn run(self, stop: CancellationToken) {
        let Self {
            socket,
            place,
            book,
        } = self;
        let router = Router::new()
            .route(FORCE_PATH, post(force))
            .with_state(book);
        let permits = Arc::new(Semaphore::new(CONNECTIONS));
        let connections = TaskTracker::new();
        while let Some(accepted) = stop.run_until_cancelled(socket.accept()).await {
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection to the control socket");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(permit) = permits.clone().try_acquire_owned() else {
                continue;
            };
            if !is_permitted(&stream) {
                tracing::warn!("refused a connection to the control socket: its peer is not root");
                continue;
            }
            let (router, stop) = (router.clone(), stop.clone());
            connections.spawn(async move {
                serve_connection(stream, router, stop).await;
                drop(permit);
            });
        }
        drop((socket, place));
        connections.close();
        connections.wait().await;
    }
}

/// Whether the peer is root, or the user that this agent runs as.
fn is_permitted(stream: &UnixStream) -> bool {
    let own = nix::unistd::geteuid().as_raw();
    stream
        .peer_cred()
        .is_ok_and(|peer| peer.uid() == 0 || peer.uid() == own)
}

fn bind(path: &Path) -> io::Result<(UnixListener, Place)> {
    if let Some(directory) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)?;
    }
    // Bound aside, closed to others, and moved into place in one step: nobody finds it half made.
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".{}", std::process::id()));
    let aside = PathBuf::from(aside);
    match fs::remove_file(&aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = UnixListener::bind(&aside)?;
    fs::set_permissions(&aside, Permissions::from_mode(0o600))?;
    let inode = fs::metadata(&aside)?.ino();
    fs::rename(&aside, path)?;
    let place = Place {
        path: path.to_owned(),
        inode,
    };
    Ok((socket, place))
}

impl Drop for Place {
    fn drop(&mut self) {
        let own = fs::metadata(&self.path).is_ok_and(|there| there.ino() == self.inode);
        if own {
            // What is left is replaced by the next agent.
            _ = fs::remove_file(&self.path);
        }
    }
}

async fn force(
    State(book): State<Arc<dyn BreakerBook>>,
    Json(request): Json<ForceRequest>,
) -> Response {
    let ForceRequest {
        destination,
        route,
        force,
    } = request;
    match book.force(&destination, route.as_deref(), force.map(Into::into)) {
        Ok(breakers) => {
            tracing::info!(
                destination,
                route,
                force = ?force,
                breakers,
                "an operator forced circuit breakers"
            );
            Json(ForceAnswer { breakers }).into_response()
        }
        Err(error) => (StatusCode::NOT_FOUND, format!("{error}\n")).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::admin::breakers::testing::OneBreaker;

    fn book() -> Arc<dyn BreakerBook> {
        Arc::new(OneBreaker::default())
    }

    #[tokio::test]
    async fn the_socket_is_for_its_owner_alone() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("run/control.sock");
        let _control = Control::bind(&path, book()).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
    }

    #[tokio::test]
    async fn a_successor_takes_the_place_and_the_one_before_leaves_it_there() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("control.sock");
        let first = Control::bind(&path, book()).unwrap();
        let second = Control::bind(&path, book()).unwrap();
        drop(first);
        assert!(UnixStream::connect(&path).await.is_ok());
        drop(second);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn what_a_killed_agent_left_is_replaced() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("control.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let _control = Control::bind(&path, book()).unwrap();
        assert!(UnixStream::connect(&path).await.is_ok());
    }

    #[test]
    fn a_place_that_cannot_be_is_named_in_the_error() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let _inside = runtime.enter();
        let error = Control::bind(Path::new("/proc/no/control.sock"), book()).unwrap_err();
        assert!(error.to_string().contains("/proc/no/control.sock"));
    }
}
