//! `cargo xtask test`: every test there is.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use undermesh_lab::{interrupt, machine, remove_stale};

use crate::{fuzz, kernels, programs};

#[derive(Args)]
pub struct Options {
    /// Only end-to-end tests whose name holds this.
    #[arg(value_name = "NAME")]
    filter: Option<String>,
    #[command(flatten)]
    kernels: kernels::Options,
}

/// For each target: enough to see that it runs and that no old find is back. `cargo xtask fuzz` looks for new ones.
const FUZZ_SECONDS: u32 = 4;

/// Needs root: half of the tests make namespaces and load eBPF programs, and none is left out in silence.
pub fn run(options: &Options) -> Result<ExitCode> {
    machine::require_root()?;
    if options.kernels.kernels {
        return kernels::run(&options.kernels);
    }
    let mut clock = Clock::default();
    let outcome = steps(options, &mut clock);
    // What a test left that was killed.
    for stale in remove_stale()? {
        println!("removed {stale}, which a test left behind");
    }
    if let Err(error) = &outcome {
        println!("{error:#}");
    }
    clock.print();
    // The end of the output says how it went, as the tests' own summaries do.
    println!("{} passed, {} failed", clock.passed, clock.failed);
    Ok(if outcome.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn steps(options: &Options, clock: &mut Clock) -> Result<()> {
    clock.time("build", || programs::build().map(|_| ()))?;
    const LAB: &str = "undermesh-lab";
    let unit = ["test", "--no-fail-fast", "--workspace", "--exclude", LAB];
    let lab = [
        "test",
        "--no-fail-fast",
        "--package",
        LAB,
        "--lib",
        "--bins",
    ];
    let examples = ["test", "--no-fail-fast", "--package", LAB, "--doc"];
    let end_to_end = ["test", "--no-fail-fast", "--package", LAB, "--test", "*"];
    let mut failures = Vec::new();
    let mut suite = |name: &'static str, arguments: &[&str], more: &[&str]| -> Result<()> {
        interrupt::check()?;
        if let Err(error) = clock.tests(name, arguments, more) {
            failures.push(error);
        }
        Ok(())
    };
    if options.filter.is_none() {
        // The other side of the agent's TLS.
        machine::require(&[machine::OPENSSL])?;
        suite("unit tests", &unit, &[])?;
        suite("unit tests of the lab", &lab, &[])?;
        suite("examples of the lab", &examples, &[])?;
    }
    let mut more = vec!["--test-threads=1"];
    more.extend(options.filter.as_deref());
    suite("end to end", &end_to_end, &more)?;
    if options.filter.is_none() {
        interrupt::check()?;
        if let Err(error) = clock.counted("oldest kernel", kernels::oldest) {
            failures.push(error);
        }
        interrupt::check()?;
        if let Err(error) = clock.time("fuzzing", || fuzz::check(None, FUZZ_SECONDS)) {
            failures.push(error);
        }
    }
    interrupt::check()?;
    match failures.into_iter().next() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Where time went, and how many tests passed.
#[derive(Default)]
struct Clock {
    steps: Vec<(&'static str, Duration)>,
    passed: u64,
    failed: u64,
}

impl Clock {
    fn time<T>(&mut self, name: &'static str, step: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        println!("== {name}");
        let outcome = step();
        self.steps.push((name, start.elapsed()));
        outcome
    }

    fn tests(&mut self, name: &'static str, arguments: &[&str], more: &[&str]) -> Result<()> {
        let mut cargo = programs::cargo();
        cargo
            .args(arguments)
            .arg("--")
            .args(more)
            .env("UNDERMESH_BIN_DIR", programs::dir())
            .env("RUST_BACKTRACE", "0");
        self.counted(name, || summarized(&mut cargo))
    }

    fn counted(
        &mut self,
        name: &'static str,
        tests: impl FnOnce() -> (u64, u64, Result<()>),
    ) -> Result<()> {
        let (passed, failed, outcome) = self.time(name, || Ok(tests()))?;
        self.passed += passed;
        self.failed += failed;
        outcome
    }

    fn print(&self) {
        println!("\n== where time went");
        for (name, duration) in &self.steps {
            println!("{:>8.1} s  {name}", duration.as_secs_f64());
        }
    }
}

/// Runs cargo test, shows its output as it comes, and adds up its summaries.
fn summarized(cargo: &mut std::process::Command) -> (u64, u64, Result<()>) {
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;

    let mut passed = 0;
    let mut failed = 0;
    let outcome = (|| {
        let mut child = cargo.stdout(Stdio::piped()).spawn()?;
        if let Some(output) = child.stdout.take() {
            for line in BufReader::new(output).split(b'\n') {
                let line = line?;
                let line = String::from_utf8_lossy(&line);
                println!("{line}");
                if let Some((more_passed, more_failed)) = summary(&line) {
                    passed += more_passed;
                    failed += more_failed;
                }
            }
        }
        let status = child.wait()?;
        anyhow::ensure!(status.success(), "{cargo:?} failed: {status}");
        Ok(())
    })();
    (passed, failed, outcome)
}

/// `test result: ok. 17 passed; 0 failed; …`
pub fn summary(line: &str) -> Option<(u64, u64)> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let count = |what: &str| {
        let mut parts = counts.split("; ");
        let part = parts.find_map(|part| part.strip_suffix(what))?;
        part.trim().parse().ok()
    };
    Some((count("passed")?, count("failed")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_of_cargo_test_is_understood() {
        let line =
            "test result: FAILED. 17 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out";
        assert_eq!(summary(line), Some((17, 2)));
        assert_eq!(summary("test a ... ok"), None);
    }
}
