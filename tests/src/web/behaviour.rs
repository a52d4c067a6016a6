//! How a server behaves, changed while it runs.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

/// Longest description of a behaviour.
const LONGEST: u64 = 4096;
const TAKEN: &str = "taken";

/// What a server does with a request. Shares are from 0 to 1 and are kept exactly: with 0.25 every fourth request
/// is hit, whichever connection it comes on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Behaviour {
    /// Share of requests that are answered with `status`.
    pub fail: f64,
    /// Status of those.
    pub status: u16,
    /// Share of requests whose connection is cut without an answer.
    pub cut: f64,
    /// Milliseconds that every answer takes.
    pub delay_ms: u64,
    /// Bytes of an answer's body.
    pub body: usize,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            fail: 0.0,
            status: 503,
            cut: 0.0,
            delay_ms: 0,
            body: 1024,
        }
    }
}

/// What becomes of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Answer,
    Fail(u16),
    Cut,
}

impl Behaviour {
    /// Fails every request with this status.
    #[must_use]
    pub fn failing(status: u16) -> Self {
        Self {
            fail: 1.0,
            status,
            ..Self::default()
        }
    }

    /// What becomes of the request with this number, the first being 0.
    pub(super) fn fate(&self, number: u64) -> Fate {
        if hits(self.cut, number) {
            Fate::Cut
        } else if hits(self.fail, number) {
            Fate::Fail(self.status)
        } else {
            Fate::Answer
        }
    }
}

/// Whether `share` of all numbers includes this one, evenly.
fn hits(share: f64, number: u64) -> bool {
    // Numbers of requests are far below 2^53.
    #[allow(clippy::cast_precision_loss)]
    let (before, after) = (number as f64 * share, (number + 1) as f64 * share);
    after.floor() > before.floor()
}

/// Where the server whose reports come from `control` is told how to behave.
pub(super) fn socket(control: &Path) -> PathBuf {
    control.with_extension("behaviour")
}

/// Tells the server whose reports come from `control` how to behave from now on.
pub fn behave(control: &Path, behaviour: &Behaviour) -> Result<()> {
    let path = socket(control);
    let mut stream = UnixStream::connect(&path).with_context(|| path.display().to_string())?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(&serde_json::to_vec(behaviour)?)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer == TAKEN, "{}: {answer}", path.display());
    Ok(())
}

/// Listens for behaviours from now on.
pub(super) fn listen(control: &Path, current: Arc<Mutex<Behaviour>>) -> Result<()> {
    let path = socket(control);
    let listener = UnixListener::bind(&path).with_context(|| path.display().to_string())?;
    tokio::spawn(async move {
        loop {
            let Ok((mut stream, _)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let mut text = Vec::new();
            let read = (&mut stream).take(LONGEST).read_to_end(&mut text).await;
            let answer = match read.map(|_| serde_json::from_slice(&text)) {
                Ok(Ok(behaviour)) => {
                    *current.lock().unwrap_or_else(PoisonError::into_inner) = behaviour;
                    TAKEN.to_owned()
                }
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
            // Whoever asked and went away does not need it.
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_the_requests_is_hit_exactly_and_evenly() {
        for (share, expected) in [(0.0, 0), (0.1, 100), (0.25, 250), (1.0, 1000)] {
            let behaviour = Behaviour {
                fail: share,
                ..Behaviour::default()
            };
            let fails = |number: &u64| behaviour.fate(*number) == Fate::Fail(503);
            assert_eq!((0..1000).filter(fails).count(), expected, "{share}");
        }
        let quarter = Behaviour {
            cut: 0.25,
            ..Behaviour::default()
        };
        let cut: Vec<u64> = (0..12)
            .filter(|&number| quarter.fate(number) == Fate::Cut)
            .collect();
        assert_eq!(cut, [3, 7, 11]);
    }
}
