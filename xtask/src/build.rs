//! `cargo xtask build`: the kernel programs first, then the agent, which embeds them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use crate::toolchain::{Core, Toolchain};

const TARGET: &str = "bpfel-unknown-none";
const PROGRAM: &str = "undermesh-ebpf";

/// What to build.
#[derive(Args, Default)]
pub struct Options {
    /// Only the kernel programs, which always are optimised.
    #[arg(long, conflicts_with_all = ["release", "dist"])]
    pub ebpf_only: bool,
    /// The agent with optimisation.
    #[arg(long, conflicts_with = "dist")]
    pub release: bool,
    /// The agent as it is shipped: optimised as one program with all libraries, which takes several times as long.
    #[arg(long)]
    pub dist: bool,
}

/// The cargo profile of what is shipped.
pub const DIST: &str = "dist";

/// The kernel programs come twice: as they are shipped, and with the verdicts in the agent's log,
/// for its debug builds.
const OBJECTS: [(&str, &[&str]); 2] = [
    ("undermesh-ebpf", &[]),
    ("undermesh-ebpf-log", &["--features", "log"]),
];

/// Builds, and leaves the kernel programs in `target/bpf`.
pub fn run(options: &Options) -> Result<()> {
    let workspace = workspace();
    let toolchain = Toolchain::find_or_install(&workspace)?;
    println!("eBPF toolchain: {toolchain}");
    for (object, features) in OBJECTS {
        ebpf(&workspace, &toolchain, object, features)?;
    }
    if options.ebpf_only {
        return Ok(());
    }
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(&workspace)
        .args(["build", "--package", "undermesh"]);
    if options.dist {
        println!("building the agent as it is shipped, which takes some minutes");
        cargo.args(["--profile", DIST]);
    } else if options.release {
        cargo.arg("--release");
    }
    execute(&mut cargo)
}

/// The root of the workspace.
pub fn workspace() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_owned()
}

/// Runs a command to its end; an error names it.
pub fn execute(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot run {command:?}"))?;
    ensure!(status.success(), "{command:?} failed: {status}");
    Ok(())
}

fn ebpf(workspace: &Path, toolchain: &Toolchain, object: &str, features: &[&str]) -> Result<()> {
    // A target directory of its own: it is another compiler than the rest of the workspace's.
    let target = workspace.join("target/ebpf");
    let mut cargo = toolchain.cargo();
    cargo
        .current_dir(workspace.join("ebpf-programs"))
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", toolchain.linker())
        // Added to the flags in that folder's configuration. The verifier's messages and the shipped
        // binary name source lines, not the machine on which they were built.
        .env(
            "CARGO_TARGET_BPFEL_UNKNOWN_NONE_RUSTFLAGS",
            remap(workspace),
        )
        .args(["build", "--release", "--target", TARGET, "--target-dir"])
        .arg(&target)
        .args(features);
    if toolchain.core() == Core::FromSource {
        cargo.args(["-Z", "build-std=core"]);
    }
    execute(&mut cargo)?;
    let built = target.join(TARGET).join("release").join(PROGRAM);
    let place = workspace.join("target/bpf");
    fs::create_dir_all(&place).with_context(|| format!("cannot make {}", place.display()))?;
    let place = place.join(object);
    // Copied to the side and renamed, so that a build of the agent never reads half of it; not at
    // all where nothing changed, so that the agent is not built again.
    let programs = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    if fs::read(&place).is_ok_and(|former| former == programs) {
        println!("kernel programs: {} (unchanged)", place.display());
        return Ok(());
    }
    let fresh = place.with_extension("new");
    fs::write(&fresh, &programs).with_context(|| format!("cannot write {}", fresh.display()))?;
    fs::rename(&fresh, &place).with_context(|| format!("cannot write {}", place.display()))?;
    println!(
        "kernel programs: {} ({} bytes)",
        place.display(),
        programs.len()
    );
    Ok(())
}

/// Flags that cut the workspace's and cargo's own directories off file names.
fn remap(workspace: &Path) -> String {
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(env::home_dir()?.join(".cargo")));
    let mut flags = format!("--remap-path-prefix={}=undermesh", workspace.display());
    if let Some(home) = home {
        flags.push_str(&format!(" --remap-path-prefix={}=cargo", home.display()));
    }
    flags
}
