//! How many instructions the verifier looks at and the kernel keeps, by program and kernel: held against a file,
//! so that a change is seen when it is made.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

use crate::build::workspace;

const HEADER: &str = "\
# Instructions of the kernel programs as they are shipped, by kernel: those that the verifier looked at (at most
# 1,000,000), and those of the program as the kernel keeps it. `cargo xtask test` compares; after a change that is
# meant, `cargo xtask test --kernels --renew` writes this file.
";

/// By kernel and program.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Instructions(BTreeMap<(String, String), Counts>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Counts {
    verified: u32,
    translated: u32,
}

impl Instructions {
    /// Takes the lines that the test of the programs prints: `instructions NAME VERIFIED TRANSLATED JITED`. The
    /// last, in bytes, depends on where the kernel lies in memory, and is not compared.
    pub fn read(&mut self, kernel: &str, lines: &[String]) {
        for line in lines {
            let words: Vec<&str> = line.split_whitespace().collect();
            if let ["instructions", program, verified, translated, _] = words[..]
                && let (Ok(verified), Ok(translated)) = (verified.parse(), translated.parse())
            {
                self.0.insert(
                    (kernel.to_owned(), program.to_owned()),
                    Counts {
                        verified,
                        translated,
                    },
                );
            }
        }
    }

    /// Holds what was counted under one kernel against the file.
    pub fn check(&self, kernel: &str) -> Result<()> {
        let path = path();
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let changes = self.changes(&Self::parse(&text), kernel);
        if changes.is_empty() {
            return Ok(());
        }
        bail!(
            "the instructions of programs changed, in {}; if that is meant, `cargo xtask test --kernels --renew` writes \
             the file anew:\n{}",
            path.display(),
            changes.join("\n")
        )
    }

    /// Writes the file.
    pub fn write(&self) -> Result<()> {
        let path = path();
        fs::write(&path, self.to_text()).with_context(|| path.display().to_string())?;
        println!("wrote {}", path.display());
        Ok(())
    }

    fn changes(&self, former: &Self, kernel: &str) -> Vec<String> {
        let of = |all: &Self| -> BTreeMap<String, Counts> {
            let here = all.0.iter().filter(|((on, _), _)| on == kernel);
            here.map(|((_, program), counts)| (program.clone(), *counts))
                .collect()
        };
        let (now, then) = (of(self), of(former));
        if now.is_empty() {
            return vec![format!("{kernel}: nothing was counted")];
        }
        let programs: std::collections::BTreeSet<&String> = now.keys().chain(then.keys()).collect();
        let shown = |counts: Option<&Counts>| match counts {
            Some(counts) => format!("{} verified, {} kept", counts.verified, counts.translated),
            None => "none".to_owned(),
        };
        programs
            .into_iter()
            .filter(|program| now.get(*program) != then.get(*program))
            .map(|program| {
                let (was, is) = (shown(then.get(program)), shown(now.get(program)));
                format!("  {kernel} {program}: {was} before, {is} now")
            })
            .collect()
    }

    fn to_text(&self) -> String {
        let mut text = HEADER.to_owned();
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{:<8} {:<22} {:>9} {:>6}",
            "# kernel", "program", "verified", "kept"
        );
        for ((kernel, program), counts) in &self.0 {
            let (verified, translated) = (counts.verified, counts.translated);
            let _ = writeln!(
                text,
                "{kernel:<8} {program:<22} {verified:>9} {translated:>6}"
            );
        }
        text
    }

    fn parse(text: &str) -> Self {
        let mut all = Self::default();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let words: Vec<&str> = line.split_whitespace().collect();
            if let [kernel, program, verified, translated] = words[..] {
                let line = format!("instructions {program} {verified} {translated} 0");
                all.read(kernel, &[line]);
            }
        }
        all
    }
}

fn path() -> PathBuf {
    workspace().join("ebpf-programs/instructions.txt")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(kernel: &str, line: &str) -> Instructions {
        let mut all = Instructions::default();
        all.read(kernel, &["noise".to_owned(), line.to_owned()]);
        all
    }

    #[test]
    fn a_file_is_read_as_it_was_written() {
        let all = counted("6.1", "instructions connect4 1200 300 1500");
        assert_eq!(Instructions::parse(&all.to_text()), all);
    }

    #[test]
    fn every_difference_is_named_and_nothing_counted_is_one() {
        let former = counted("6.1", "instructions connect4 1200 300 1500");
        assert!(former.changes(&former, "6.1").is_empty());
        let more = counted("6.1", "instructions connect4 1201 300 1500");
        assert_eq!(
            more.changes(&former, "6.1"),
            ["  6.1 connect4: 1200 verified, 300 kept before, 1201 verified, 300 kept now"]
        );
        let other = counted("6.1", "instructions lookup 1 1 1");
        assert_eq!(other.changes(&former, "6.1").len(), 2);
        assert_eq!(former.changes(&former, "6.12").len(), 1);
    }
}
