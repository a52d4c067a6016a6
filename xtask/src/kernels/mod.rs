//! The tests of the kernel programs and of capture under Debian's kernels, in a machine without hardware: the
//! oldest kernel that is supported must not be one that nobody has tried.

mod instructions;
mod machine;
mod packages;

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use serde_json::Value;
use undermesh_lab::interrupt;

use self::instructions::Instructions;
use self::machine::{Job, Outcome};
use self::packages::{VERSIONS, Version};
use crate::{debian, programs, test};

/// What to try.
#[derive(Args)]
#[group(id = "tests_of_kernels")]
pub struct Options {
    /// Only the tests of the kernel programs and of capture, under every kernel that is supported, in qemu.
    #[arg(long)]
    pub kernels: bool,
    /// Write the numbers of instructions to their file instead of comparing them.
    #[arg(long, requires = "kernels")]
    renew: bool,
}

/// For one kernel, tests and all. Two idle CPUs take less than three minutes; an emulated machine on a busy one
/// takes its time.
const LIMIT: Duration = Duration::from_secs(2_400);
/// The machine, what packs its files, and what loads its modules.
const PACKAGES: [&str; 6] = [
    "qemu-system-x86",
    "cpio",
    "kmod",
    "binutils",
    "procps",
    "iproute2",
];
/// A test program of the agent, by the name of cargo's target, and which of its tests.
type Tests = (&'static str, &'static str);
/// The programs: they wait for the kernel more than they compute.
const OF_PROGRAMS: Tests = ("kernel", "--test-threads=4 --show-output");
/// Pods that are enrolled. They have deadlines, so they do not compete for the slow CPUs.
const OF_CAPTURE: Tests = ("undermesh", "--test-threads=1 capture::");

/// All kernels, one after another.
pub fn run(options: &Options) -> Result<ExitCode> {
    let mut counted = Instructions::default();
    let mut failures = Vec::new();
    for version in VERSIONS {
        interrupt::check()?;
        match one(version, &[OF_PROGRAMS, OF_CAPTURE], &mut counted) {
            Ok((passed, failed)) => println!("{}: {passed} passed, {failed} failed", version.name),
            Err(error) => failures.push(format!("{}: {error:#}", version.name)),
        }
        if !options.renew
            && let Err(error) = counted.check(version.name)
        {
            failures.push(format!("{error:#}"));
        }
    }
    if options.renew {
        counted.write()?;
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(ExitCode::SUCCESS)
}

/// The programs under the oldest kernel, for every run of the tests: how many passed and failed, and why it is no
/// success.
pub fn oldest() -> (u64, u64, Result<()>) {
    let mut counted = Instructions::default();
    let outcome = one(VERSIONS[0], &[OF_PROGRAMS], &mut counted);
    let checked = counted.check(VERSIONS[0].name);
    match outcome {
        Ok((passed, failed)) => (passed, failed, checked),
        Err(error) => (0, 1, Err(error)),
    }
}

/// How many tests passed and failed; an error if any failed or was not run.
fn one(version: Version, tests: &[Tests], counted: &mut Instructions) -> Result<(u64, u64)> {
    ensure!(
        std::env::consts::ARCH == "x86_64",
        "only x86-64 machines are emulated, with programs of the machine's own kind"
    );
    debian::install(&PACKAGES)?;
    let kernel = packages::kernel(version)?;
    let jobs = test_programs(tests)?;
    println!("booting {}", kernel.release);
    let outcomes = machine::run(&kernel, &jobs, LIMIT)?;
    let (mut passed, mut failed, mut broken) = (0, 0, Vec::new());
    for job in &jobs {
        let outcome = outcomes.iter().find(|outcome| outcome.name == job.name);
        let Some(outcome) = outcome else {
            broken.push(format!("{} did not run", job.name));
            continue;
        };
        counted.read(version.name, &outcome.lines);
        let (more_passed, more_failed) = summary(outcome)?;
        passed += more_passed;
        failed += more_failed;
        if outcome.status != Some(0) || more_passed == 0 {
            broken.push(format!("{}: status {:?}", job.name, outcome.status));
        }
    }
    ensure!(
        broken.is_empty(),
        "under {}: {}; {passed} passed, {failed} failed",
        kernel.release,
        broken.join(", ")
    );
    Ok((passed, failed))
}

fn summary(outcome: &Outcome) -> Result<(u64, u64)> {
    let mut lines = outcome.lines.iter();
    let counts = lines.find_map(|line| test::summary(line));
    counts.with_context(|| format!("{} has no summary: the machine went off", outcome.name))
}

/// Built as for any run of the tests; cargo says where they are.
fn test_programs(tests: &[Tests]) -> Result<Vec<Job>> {
    let mut cargo = programs::cargo();
    cargo
        .args([
            "test",
            "--no-run",
            "--package",
            "undermesh",
            "--lib",
            "--test",
            "kernel",
        ])
        .args(["--message-format", "json-render-diagnostics"])
        .stdout(Stdio::piped());
    let mut child = cargo.spawn().context("cannot run cargo")?;
    let output = child.stdout.take().context("cargo has no output")?;
    let mut found: Vec<(String, PathBuf)> = Vec::new();
    for line in BufReader::new(output).lines() {
        let message: Value = serde_json::from_str(&line?)?;
        let name = message.pointer("/target/name").and_then(Value::as_str);
        let file = message.pointer("/executable").and_then(Value::as_str);
        // The agent itself has the library's name.
        let is_test = message.pointer("/profile/test") == Some(&Value::Bool(true));
        if let (Some(name), Some(file), true) = (name, file, is_test) {
            found.push((name.to_owned(), file.into()));
        }
    }
    let status = child.wait()?;
    ensure!(status.success(), "{cargo:?} failed: {status}");
    let mut jobs = Vec::new();
    for &(name, arguments) in tests {
        let Some((_, program)) = found.iter().find(|(target, _)| target == name) else {
            bail!("cargo built no tests named {name}");
        };
        jobs.push(Job {
            name,
            program: program.clone(),
            arguments,
        });
    }
    Ok(jobs)
}
