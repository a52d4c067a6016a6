//! The release programs that labs run.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;
use undermesh_lab::{Binaries, interrupt};

use crate::build;

/// The cargo profile of everything that is not [`build::DIST`].
const RELEASE: &str = "release";

/// Builds agent and traffic program with optimisation, and says where they are. Those in the directory that
/// `UNDERMESH_BIN_DIR` names are taken as they are.
pub fn build() -> Result<Binaries> {
    let options = build::Options {
        release: true,
        ..build::Options::default()
    };
    built(&options, RELEASE)
}

/// The same, with the agent as it is shipped, which takes some minutes more.
pub fn build_dist() -> Result<Binaries> {
    let options = build::Options {
        dist: true,
        ..build::Options::default()
    };
    built(&options, build::DIST)
}

fn built(options: &build::Options, profile: &str) -> Result<Binaries> {
    if env::var_os("UNDERMESH_BIN_DIR").is_some() {
        let built = Binaries::find()?;
        println!(
            "not building: UNDERMESH_BIN_DIR names {}",
            built.agent.display()
        );
        return Ok(built);
    }
    build::run(options)?;
    interrupt::check()?;
    let agent = target().join(profile).join("undermesh");
    Ok(Binaries {
        agent,
        ..build_traffic()?
    })
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
    target().join(RELEASE)
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
