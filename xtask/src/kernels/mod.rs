//! The tests of the kernel programs and of capture under Debian's kernels, in a machine without hardware: the
//! oldest kernel that is supported must not be one that nobody has tried.

mod instructions;
mod machine;
mod packages;

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use clap::Args;
use serde_json::Value;
use undermesh_lab::interrupt;

use self::instructions::Instructions;
use self::machine::{Job, Outcome};
use self::packages::{Kernel, VERSIONS, Version};
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

/// All kernels, one after another, and a table of what came of it.
pub fn run(options: &Options) -> Result<ExitCode> {
    let mut counted = Instructions::default();
    let (mut rows, mut failures) = (Vec::new(), Vec::new());
    for version in VERSIONS {
        interrupt::check()?;
        match one(version, &[OF_PROGRAMS, OF_CAPTURE], &mut counted) {
            Ok(outcomes) => rows.extend(outcomes),
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
    print!("{}", table(&rows));
    failures.extend(rows.iter().filter_map(Row::failure));
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(ExitCode::SUCCESS)
}

/// The programs under the oldest kernel, for every run of the tests: how many passed and failed, and why it is no
/// success.
pub fn oldest() -> (u64, u64, Result<()>) {
    let mut counted = Instructions::default();
    let rows = match one(VERSIONS[0], &[OF_PROGRAMS], &mut counted) {
        Ok(rows) => rows,
        Err(error) => return (0, 1, Err(error)),
    };
    let checked = counted.check(VERSIONS[0].name);
    let (passed, failed) = rows.iter().fold((0, 0), |(passed, failed), row| {
        (passed + row.passed, failed + row.failed)
    });
    let broken: Vec<String> = rows.iter().filter_map(Row::failure).collect();
    let outcome = match broken.is_empty() {
        true => checked,
        false => Err(anyhow!(broken.join("\n"))),
    };
    (passed, failed, outcome)
}

/// What came of one test program under one kernel.
#[derive(Debug)]
struct Row {
    /// As `uname -r` says.
    release: String,
    tests: &'static str,
    passed: u64,
    failed: u64,
    took: Duration,
    /// What the program said at its end; none if it did not come to one.
    status: Option<i32>,
}

impl Row {
    fn of(kernel: &Kernel, tests: &'static str, outcome: Option<&Outcome>) -> Self {
        let (passed, failed) = outcome.and_then(summary).unwrap_or_default();
        Self {
            release: kernel.release.clone(),
            tests,
            passed,
            failed,
            took: outcome.map_or(Duration::ZERO, |outcome| outcome.took),
            status: outcome.and_then(|outcome| outcome.status),
        }
    }

    fn is_right(&self) -> bool {
        self.status == Some(0) && self.passed > 0 && self.failed == 0
    }

    fn failure(&self) -> Option<String> {
        let Self {
            release,
            tests,
            passed,
            failed,
            ..
        } = self;
        let end = self.end();
        let text = format!("{tests} under {release}: {end}; {passed} passed, {failed} failed");
        (!self.is_right()).then_some(text)
    }

    fn end(&self) -> String {
        match self.status {
            _ if self.is_right() => "right".to_owned(),
            Some(status) => format!("status {status}"),
            None => "did not come to its end".to_owned(),
        }
    }
}

fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<28} {:<10} {:>7} {:>7} {:>8}\n",
        "kernel", "tests", "passed", "failed", "seconds"
    );
    for row in rows {
        text.push_str(&format!(
            "{:<28} {:<10} {:>7} {:>7} {:>8.0}  {}\n",
            row.release,
            row.tests,
            row.passed,
            row.failed,
            row.took.as_secs_f64(),
            row.end()
        ));
    }
    text
}

/// What came of each test program.
fn one(version: Version, tests: &[Tests], counted: &mut Instructions) -> Result<Vec<Row>> {
    ensure!(
        std::env::consts::ARCH == "x86_64",
        "only x86-64 machines are emulated, with programs of the machine's own kind"
    );
    debian::install(&PACKAGES)?;
    let kernel = packages::kernel(version)?;
    let jobs = test_programs(tests)?;
    println!("booting {}", kernel.release);
    let outcomes = machine::run(&kernel, &jobs, LIMIT)?;
    let rows = jobs.iter().map(|job| {
        let outcome = outcomes.iter().find(|outcome| outcome.name == job.name);
        if let Some(outcome) = outcome {
            counted.read(version.name, &outcome.lines);
        }
        Row::of(&kernel, job.name, outcome)
    });
    Ok(rows.collect())
}

fn summary(outcome: &Outcome) -> Option<(u64, u64)> {
    outcome.lines.iter().find_map(|line| test::summary(line))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_program_that_came_to_its_end_with_tests_and_no_failure_is_right() {
        let row = |passed, failed, status| Row {
            release: "6.1.0-x".to_owned(),
            tests: "kernel",
            passed,
            failed,
            took: Duration::from_secs(90),
            status,
        };
        assert_eq!(row(52, 0, Some(0)).failure(), None);
        for wrong in [
            row(0, 0, Some(0)),
            row(51, 1, Some(101)),
            row(51, 1, Some(0)),
            row(52, 0, None),
        ] {
            assert!(wrong.failure().is_some(), "{wrong:?}");
        }
        let text = table(&[row(52, 0, Some(0)), row(3, 0, None)]);
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[1].contains("52") && lines[1].ends_with("90  right"),
            "{text}"
        );
        assert!(lines[2].ends_with("did not come to its end"), "{text}");
    }
}
