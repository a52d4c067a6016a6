//! What commands leave for other programs: an envelope that is always the same, and what is the command's own.

use std::fmt::Display;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::{Map, Value, json};
use undermesh_lab::machine;

use crate::build;

/// Version of the shape of the envelope.
const SCHEMA: u32 = 1;

/// One thing that had to be so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    name: &'static str,
    passed: bool,
    observed: String,
    expected: String,
}

/// The checks of a command.
#[derive(Debug, Default)]
pub struct Checks(Vec<Check>);

impl Checks {
    /// `observed` must equal `expected`.
    pub fn equal<T: PartialEq + Display>(&mut self, name: &'static str, observed: T, expected: T) {
        let passed = observed == expected;
        self.add(name, passed, observed, expected);
    }

    /// `observed` must be more than `bound`.
    pub fn more_than(&mut self, name: &'static str, observed: u64, bound: u64) {
        self.add(name, observed > bound, observed, format!("> {bound}"));
    }

    /// `observed` must be less than `bound`.
    pub fn less_than(&mut self, name: &'static str, observed: u64, bound: u64) {
        self.add(name, observed < bound, observed, format!("< {bound}"));
    }

    fn add(
        &mut self,
        name: &'static str,
        passed: bool,
        observed: impl Display,
        expected: impl Display,
    ) {
        self.0.push(Check {
            name,
            passed,
            observed: observed.to_string(),
            expected: expected.to_string(),
        });
    }

    /// Whether all of them hold; without any, nothing was shown.
    pub fn passed(&self) -> bool {
        !self.0.is_empty() && self.0.iter().all(|check| check.passed)
    }

    /// Prints them as a table.
    pub fn print(&self) {
        for check in &self.0 {
            println!(
                "  {} {:<28} {} (expected {})",
                if check.passed { "ok    " } else { "FAILED" },
                check.name,
                check.observed,
                check.expected
            );
        }
    }
}

/// Puts the envelope around `body`.
pub fn envelope(command: &str, start: Instant, checks: &Checks, body: Map<String, Value>) -> Value {
    let mut report = json!({
        "schema": SCHEMA,
        "command": command,
        "commit": commit(),
        "kernel": machine::kernel(),
        "cpus": machine::cpus(),
        "seconds": (start.elapsed().as_secs_f64() * 1e3).round() / 1e3,
        "passed": checks.passed(),
        "checks": checks.0,
    });
    if let Some(report) = report.as_object_mut() {
        report.extend(body);
    }
    report
}

/// Writes JSON for people and programs.
pub fn write(file: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    fs::write(file, text).with_context(|| file.display().to_string())
}

/// A ratio that is no number, because nothing was measured, is the worst.
pub fn thousandths(ratio: f64) -> u64 {
    if !ratio.is_finite() {
        return u64::MAX;
    }
    // Ratios of latencies are small and positive.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let whole = (ratio * 1e3).round() as u64;
    whole
}

/// The commit that was built, with `-dirty` where the tree differs from it.
pub fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git")
            .current_dir(build::workspace())
            .args(arguments)
            .output()
            .ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    match git(&["rev-parse", "HEAD"]) {
        Some(commit) => match git(&["status", "--porcelain", "--untracked-files=no"]) {
            Some(changes) if changes.is_empty() => commit,
            _ => format!("{commit}-dirty"),
        },
        None => "unknown".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_check_that_fails_fails_the_command() {
        let mut checks = Checks::default();
        assert!(!checks.passed());
        checks.equal("same", 1, 1);
        assert!(checks.passed());
        checks.less_than("less", 1, 2);
        assert!(checks.passed());
        checks.more_than("more", 0, 0);
        assert!(!checks.passed());
        let report = envelope("demo", Instant::now(), &checks, Map::new());
        assert_eq!(report["passed"], false);
        assert_eq!(report["checks"][2]["expected"], "> 0");
    }
}
