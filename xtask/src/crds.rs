//! The definitions of Undermesh's own kinds, written anew from the types that read them.

use std::env;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Writes `deploy/crds`. The test that compares the files with the types does it.
pub fn run() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let status = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(root)
        .args(["test", "-p", "undermesh", "--lib", "discovery::crds::"])
        .env("UNDERMESH_WRITE_CRDS", "1")
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "the definitions were not written");
    Ok(())
}
