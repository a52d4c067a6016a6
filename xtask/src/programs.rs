//! The release programs that labs run.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;
use undermesh_lab::{Binaries, interrupt};

use crate::build;

/// Builds agent and traffic program with optimisation, and says where they are. Those in the directory that
/// `UNDERMESH_BIN_DIR` names are taken as they are.
pub fn build() -> Result<Binaries> {
    if let Some(given) = given()? {
        return Ok(given);
    }
    build::run(&build::Options {
        release: true,
        ..build::Options::default()
    })?;
    interrupt::check()?;
    build_traffic()
}

/// The same, with the agent as it is shipped.
pub fn build_dist() -> Result<Binaries> {
    if let Some(given) = given()? {
        return Ok(given);
    }
    println!("building the agent as it is shipped, which takes some minutes");
    build::run(&build::Options {
        dist: true,
        ..build::Options::default()
    })?;
    interrupt::check()?;
    let agent = target().join(build::DIST).join("undermesh");
    Ok(Binaries {
        agent,
        ..build_traffic()?
    })
}

fn given() -> Result<Option<Binaries>> {
    if env::var_os("UNDERMESH_BIN_DIR").is_none() {
        return Ok(None);
    }
    let given = Binaries::find()?;
    println!(
        "not building: UNDERMESH_BIN_DIR names {}",
        given.agent.display()
    );
    Ok(Some(given))
}

/// Builds the programs that run in pods alone.
pub fn build_traffic() -> Result<Binaries> {
    build::execute(cargo().args(["build", "--release", "--package", "undermesh-lab", "--bins"]))?;
    interrupt::check()?;
    Ok(Binaries::in_dir(&dir()))
}

/// The directory of the programs.
pub fn dir() -> PathBuf {
    if let Some(dir) = env::var_os("UNDERMESH_BIN_DIR") {
        return dir.into();
    }
    target().join("release")
}

fn target() -> PathBuf {
    let target = env::var_os("CARGO_TARGET_DIR").map_or("target".into(), PathBuf::from);
    build::workspace().join(target)
}

/// cargo, at the root of the workspace.
pub fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(build::workspace());
    cargo
}
