//! `cargo xtask scenario cells`: the failure table's cells in which no agent ends by itself, for pods of both modes.

use anyhow::Result;
use serde_json::{Map, json};
use undermesh_lab::cells::{self, Mode};

use super::Shown;
use crate::programs;
use crate::report::Checks;

/// Of each kind in each cell.
const CONNECTIONS: u64 = 200;

pub fn run() -> Result<Shown> {
    let binaries = programs::build()?;
    let mut checks = Checks::default();
    let mut all = Vec::new();
    for (mode, check) in [
        (Mode::Strict, "strict, not as it should be"),
        (Mode::Permissive, "permissive, not as it should be"),
    ] {
        let results = cells::run(Some(binaries.clone()), mode, CONNECTIONS, |result| {
            println!("{:?} {}: {:?}", result.mode, result.cell, result.counts);
            if !result.status.is_empty() {
                println!("    {}", result.status);
            }
        })?;
        let wrong: Vec<String> = results
            .iter()
            .filter(|result| !result.wrong.is_empty())
            .map(|result| format!("{}: {}", result.cell, result.wrong.join(", ")))
            .collect();
        checks.equal(check, wrong.join("; "), String::new());
        all.extend(results);
    }
    let mut body = Map::new();
    body.insert("connections".to_owned(), CONNECTIONS.into());
    body.insert("cells".to_owned(), json!(all));
    Ok((checks, body))
}
