//! Puts the kernel programs where `capture::kernel` embeds them.

use std::path::Path;
use std::{env, fs, process};

use undermesh_common::LAYOUT_TAG;

const SHIPPED: &str = "target/bpf/undermesh-ebpf";
/// The same with every verdict in the agent's log.
const LOGGING: &str = "target/bpf/undermesh-ebpf-log";

fn main() {
    let manifest = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    let workspace = Path::new(&manifest).parent().unwrap_or(Path::new(".."));
    let debug = env::var("PROFILE").is_ok_and(|profile| profile == "debug");
    let object = workspace.join(if debug { LOGGING } else { SHIPPED });
    println!("cargo::rerun-if-changed={}", object.display());
    if let Err(reason) = embed(&object) {
        println!(
            "cargo::error=the kernel programs ({}) {reason}: run `cargo xtask build`",
            object.display()
        );
        process::exit(1);
    }
}

/// The reason why not, as error.
fn embed(object: &Path) -> Result<(), String> {
    let programs = fs::read(object).map_err(|error| format!("cannot be read: {error}"))?;
    let fits = programs
        .windows(LAYOUT_TAG.len())
        .any(|bytes| bytes == LAYOUT_TAG);
    if !fits {
        return Err("were built for another layout of keys and values".to_owned());
    }
    let copy = Path::new(&env::var("OUT_DIR").unwrap_or_default()).join("undermesh-ebpf");
    fs::write(&copy, programs).map_err(|error| format!("cannot be copied: {error}"))
}
