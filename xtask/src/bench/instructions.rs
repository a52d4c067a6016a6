//! `cargo xtask bench --instructions`: what runs for every connection, in instructions. Time depends
//! on the machine and its neighbours; the number of instructions shows a change of a few hundredths.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use undermesh_lab::{interrupt, machine};

use crate::{build, programs};

/// What is counted: names of `agent/benches/hot.rs`.
const FUNCTIONS: [&str; 4] = ["look-up", "decision", "connection", "logged-connection"];

/// Where the counts are kept.
const FILE: &str = "docs/performance/instructions.json";

/// A count may differ by so much from the one that is kept.
const TOLERANCE: f64 = 0.03;

/// Hash tables have other seeds in each process, which is worth up to a tenth of what looks something up: the count
/// in the middle of so many counts.
const COUNTS: usize = 9;

/// Twice so often as the first time: the difference is without what comes before and after.
const TIMES: [u64; 2] = [2_000, 12_000];

/// What is kept.
#[derive(Serialize, Deserialize)]
struct Kept {
    /// Of what the compiler was.
    rustc: String,
    /// Instructions of each function.
    instructions: BTreeMap<String, u64>,
}

/// Counts, and compares with what is kept or keeps it.
pub fn run(renew: bool) -> Result<ExitCode> {
    machine::require(&[machine::VALGRIND])?;
    let program = built()?;
    let mut counted = BTreeMap::new();
    for name in FUNCTIONS {
        counted.insert(name.to_owned(), count(&program, name)?);
    }
    let file = build::workspace().join(FILE);
    if renew {
        let kept = Kept {
            rustc: super::rustc(),
            instructions: counted,
        };
        for (name, count) in &kept.instructions {
            println!("{name:<20} {count:>8} instructions");
        }
        fs::write(&file, serde_json::to_string_pretty(&kept)? + "\n")?;
        println!("kept in {FILE}");
        return Ok(ExitCode::SUCCESS);
    }
    let text = fs::read_to_string(&file).with_context(|| format!("no counts in {FILE}"))?;
    let kept: Kept = serde_json::from_str(&text)?;
    let mut within = true;
    for (name, count) in &counted {
        let before = kept.instructions.get(name).copied().unwrap_or_default();
        let change = change(before, *count);
        let fits = change.is_some_and(|change| change.abs() <= TOLERANCE);
        within &= fits;
        let verdict = if fits { "ok" } else { "CHANGED" };
        let change = change.map_or_else(
            || "new".to_owned(),
            |change| format!("{:+.1} %", change * 100.0),
        );
        println!("{verdict:<8} {name:<20} {before:>8} -> {count:>8} instructions ({change})");
    }
    if within {
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "more than {} % away from {FILE} ({}): what was meant is kept by --instructions --renew",
        TOLERANCE * 100.0,
        kept.rustc
    );
    Ok(ExitCode::FAILURE)
}

/// By what part of it a count has changed; none if there was none.
fn change(before: u64, now: u64) -> Option<f64> {
    (before > 0).then(|| now as f64 / before as f64 - 1.0)
}

/// Builds the program that does them, and says where it is.
fn built() -> Result<PathBuf> {
    let mut cargo = programs::cargo();
    cargo.args(["bench", "--package", "undermesh", "--bench", "hot"]);
    cargo.args(["--no-run", "--message-format", "json-render-diagnostics"]);
    let output = cargo.stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "the benchmarks cannot be built");
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == "hot")
        .find_map(|message| Some(PathBuf::from(message["executable"].as_str()?)))
        .context("cargo names no program")
}

/// Instructions of one time.
fn count(program: &Path, name: &str) -> Result<u64> {
    let mut counts = Vec::with_capacity(COUNTS);
    for _ in 0..COUNTS {
        interrupt::check()?;
        counts.push(count_once(program, name)?);
    }
    counts.sort_unstable();
    Ok(counts[COUNTS / 2])
}

fn count_once(program: &Path, name: &str) -> Result<u64> {
    let [few, many] = TIMES;
    let first = collected(program, name, few)?;
    let second = collected(program, name, many)?;
    Ok(second.saturating_sub(first) / (many - few))
}

/// All instructions of a run.
fn collected(program: &Path, name: &str, times: u64) -> Result<u64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .args(["--count", name, &times.to_string()])
        .stdout(Stdio::null())
        .output()
        .context("valgrind cannot be run")?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{name} under valgrind: {text}");
    parse(&text).with_context(|| format!("valgrind says nothing of {name}: {text}"))
}

/// `==PID== Collected : N`, of callgrind's summary.
fn parse(text: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.contains("Collected : "))?;
    line.rsplit(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_found_in_what_callgrind_says() {
        let said = "==7== Events    : Ir\n==7== Collected : 123456\n==7== \n";
        assert_eq!(parse(said), Some(123_456));
        assert_eq!(parse("==7== Illegal instruction"), None);
    }

    #[test]
    fn a_change_is_told_as_a_part_of_what_was_there() {
        assert_eq!(
            change(200, 210).map(|change| (change * 100.0).round()),
            Some(5.0)
        );
        assert_eq!(change(0, 210), None);
    }
}
