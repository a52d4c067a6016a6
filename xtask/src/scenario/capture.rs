//! Every kind of connect, on v4 and v6.

use anyhow::Result;
use clap::ValueEnum;
use serde_json::{Map, Value, json};
use undermesh_lab::connects::{self, Extent, Kind};

use crate::programs;
use crate::report::Checks;

pub fn run() -> Result<(Checks, Map<String, Value>)> {
    let binaries = programs::build()?;
    println!(
        "{:<26} {:>9} {:>8} {:>8} {:>8} {:>8} {:>12}",
        "kind", "expected", "attempts", "right", "server", "agents", "destination"
    );
    let by_kind = connects::run(
        Some(binaries),
        Extent::Full,
        Kind::value_variants(),
        |result| {
            println!(
                "{:<26} {:>9} {:>8} {:>8} {:>8} {:>8} {:>12} {}",
                result.kind,
                result.expected,
                result.attempts,
                result.right,
                result.server,
                result.agents,
                result.destination,
                result.errors.first().map_or("", String::as_str)
            );
        },
    )?;
    let attempts: u64 = by_kind.iter().map(|result| result.attempts).sum();
    let right: u64 = by_kind.iter().map(|result| result.right).sum();
    let mut checks = Checks::default();
    checks.more_than("attempts", attempts, 0);
    checks.equal("right", right, attempts);
    let mut body = Map::new();
    body.insert("attempts".to_owned(), attempts.into());
    body.insert("by_kind".to_owned(), json!(by_kind));
    Ok((checks, body))
}
