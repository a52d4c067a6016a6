//! A unix socket that gives the report so far to whoever connects. Its path works across network namespaces.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;

/// Asks a running traffic program for its report.
pub fn query<R: DeserializeOwned>(path: &Path) -> Result<R> {
    let mut stream = UnixStream::connect(path).with_context(|| path.display().to_string())?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    serde_json::from_str(&text).with_context(|| format!("report: {text:.200}"))
}

/// Listens at once, so that the path is there when this returns, and answers from then on.
pub(crate) fn listen<R: Serialize + Send + 'static>(
    path: PathBuf,
    report: Arc<dyn Fn() -> R + Send + Sync>,
) -> Result<()> {
    let listener = UnixListener::bind(&path).with_context(|| path.display().to_string())?;
    tokio::spawn(async move {
        loop {
            let Ok((mut stream, _)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            if let Ok(text) = serde_json::to_vec(&report()) {
                // Whoever asked and went away does not need it.
                let _ = stream.write_all(&text).await;
            }
        }
    });
    Ok(())
}
