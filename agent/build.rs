//! Puts the kernel programs where `capture::kernel` embeds them.

use std::path::Path;
use std::{env, fs, process};

const OBJECT: &str = "target/bpf/undermesh-ebpf";

fn main() {
    let manifest = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    let workspace = Path::new(&manifest).parent().unwrap_or(Path::new(".."));
    let object = workspace.join(OBJECT);
    println!("cargo::rerun-if-changed={}", object.display());
    let copy = Path::new(&env::var("OUT_DIR").unwrap_or_default()).join("undermesh-ebpf");
    if let Err(error) = fs::copy(&object, &copy) {
        println!(
            "cargo::error=the kernel programs are not built ({}: {error}): run `cargo xtask build`",
            object.display()
        );
        process::exit(1);
    }
}
