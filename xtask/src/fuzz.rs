//! `cargo xtask fuzz`: every parser of Undermesh's own against libFuzzer, for a while.
//!
//! Coverage is counted in the workspace's own code only: a wrapper around rustc adds the instrumentation for those
//! crates, so that everything they depend on is what other builds use too. Stable Rust can do that; a sanitizer would need
//! more, and safe code little.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;
use undermesh_lab::interrupt;

use crate::{build, programs};

/// The targets, by the names of their corpora.
const TARGETS: [&str; 6] = [
    "sniff",
    "framing",
    "authority",
    "identity",
    "certificate",
    "objects",
];

/// What LLVM adds to the instrumented crates.
const COVERAGE: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// Set for the rustc wrapper that this program is then, with no meaning elsewhere.
const WRAPPING: &str = "UNDERMESH_FUZZ_RUSTC";

/// Longest input, in bytes.
const LONGEST: u32 = 8192;

#[derive(Args)]
pub struct Options {
    /// Only this target.
    #[arg(value_parser = TARGETS)]
    target: Option<String>,
    /// How long each runs.
    #[arg(long, default_value_t = 10)]
    seconds: u32,
}

/// Whether cargo has called this program in the place of rustc, and how that went.
pub fn as_rustc() -> Option<Result<ExitCode>> {
    env::var_os(WRAPPING)?;
    let mut arguments = env::args_os().skip(1);
    let rustc = arguments.next()?;
    Some(compile(Path::new(&rustc), arguments.collect()))
}

fn compile(rustc: &Path, arguments: Vec<std::ffi::OsString>) -> Result<ExitCode> {
    let mut command = Command::new(rustc);
    let host_only = arguments.windows(2).any(|pair| {
        let [name, value] = pair else { return false };
        name == "--crate-name" && value == "build_script_build"
    });
    let names_a_crate = arguments.iter().any(|argument| argument == "--crate-name");
    command.args(arguments);
    if names_a_crate && !host_only {
        command.args(COVERAGE);
    }
    let status = command.status().context("rustc")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

pub fn run(options: &Options) -> Result<ExitCode> {
    check(options.target.as_deref(), options.seconds)?;
    Ok(ExitCode::SUCCESS)
}

/// Builds the targets and runs them, one after the other, each from its corpus. An error names the input that broke one.
pub fn check(target: Option<&str>, seconds: u32) -> Result<()> {
    build::run(&build::Options {
        ebpf_only: true,
        ..build::Options::default()
    })?;
    let directory = target_directory();
    let mut cargo = programs::cargo();
    cargo
        .args(["build", "--package", "undermesh-fuzz", "--bins"])
        .arg("--target-dir")
        .arg(&directory)
        .env("RUSTC_WORKSPACE_WRAPPER", env::current_exe()?)
        .env(WRAPPING, "1");
    build::execute(&mut cargo)?;
    let wanted = |name: &&&str| target.is_none_or(|target| target == **name);
    for name in TARGETS.iter().filter(wanted) {
        interrupt::check()?;
        run_one(&directory, name, seconds)?;
    }
    Ok(())
}

fn run_one(directory: &Path, name: &str, seconds: u32) -> Result<()> {
    println!("fuzzing {name} for {seconds} s");
    let fuzz = build::workspace().join("fuzz");
    // What is found is kept between runs, beside what was built; the corpus in the repository stays as it is.
    let found = directory.join("fuzz-corpus").join(name);
    fs::create_dir_all(&found)?;
    let artifacts = directory.join("fuzz-artifacts");
    fs::create_dir_all(&artifacts)?;
    let output = Command::new(directory.join("debug").join(format!("fuzz-{name}")))
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={LONGEST}"))
        .args(["-timeout=10", "-rss_limit_mb=1024", "-print_final_stats=1"])
        .arg(format!("-artifact_prefix={}/{name}-", artifacts.display()))
        .arg(&found)
        .arg(fuzz.join("corpus").join(name))
        .output()
        .with_context(|| format!("fuzz-{name}"))?;
    let log = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let end: Vec<&str> = log.lines().rev().take(40).collect();
        let end: Vec<&str> = end.into_iter().rev().collect();
        bail!("fuzz-{name}: {}\n{}", output.status, end.join("\n"));
    }
    for line in log.lines().filter(|line| line.starts_with("stat::number")) {
        println!("  {line}");
    }
    Ok(())
}

/// Where others are built too: what is not instrumented is shared with them.
fn target_directory() -> PathBuf {
    let target = env::var_os("CARGO_TARGET_DIR").map_or("target".into(), PathBuf::from);
    build::workspace().join(target)
}
