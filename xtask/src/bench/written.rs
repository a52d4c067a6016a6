//! The figures of docs/performance.md, and its plots. What people wrote around them stays.

use std::fmt::Write as _;
use std::fs;
use std::time::Instant;

use anyhow::{Context, Result};
use undermesh_lab::machine;

use super::lines::{Line, Lines};
use super::plots::{self, PLOTS};
use super::ratios::Ratio;
use super::rows::{Figure, Path, Proxy};
use super::{Options, Versions, number};
use crate::{build, report};

const BEGIN: &str = "<!-- begin of what `cargo xtask bench --report` writes -->";
const END: &str = "<!-- end of what `cargo xtask bench --report` writes -->";

pub fn write(
    options: &Options,
    start: Instant,
    lines: &Lines,
    ratios: &[Ratio],
    versions: &Versions,
) -> Result<()> {
    let docs = build::workspace().join("docs");
    let folder = docs.join("performance");
    fs::create_dir_all(&folder)?;
    let mut text = measured_with(options, start, versions);
    text.push_str(&targets(ratios));
    text.push_str("\n## Every figure\n\nMedian (least to most of the repetitions).\n");
    for path in [Path::CrossNode, Path::SameNode] {
        text.push_str(&table(lines, path));
    }
    for plot in &PLOTS {
        if let Some(svg) = plots::draw(plot, lines) {
            fs::write(folder.join(plot.file), svg)?;
            let _ = writeln!(text, "\n![{}](performance/{})", plot.title, plot.file);
        }
    }
    let file = docs.join("performance.md");
    let page = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let page = replaced(&page, &text).with_context(|| format!("no {BEGIN} in performance.md"))?;
    fs::write(&file, page)?;
    println!("written: docs/performance.md and docs/performance/*.svg");
    Ok(())
}

fn replaced(page: &str, text: &str) -> Option<String> {
    let (before, rest) = page.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!(
        "{before}{BEGIN}\n\n{}\n\n{END}{after}",
        text.trim()
    ))
}

fn measured_with(options: &Options, start: Instant, versions: &Versions) -> String {
    format!(
        "Undermesh `{}`, {}; Envoy {}; Linux {}; {} x {}. {} repetitions of {} s, {:.0} minutes in all.\n\n",
        report::commit(),
        versions.rustc,
        versions.envoy,
        machine::kernel(),
        machine::cpus(),
        versions.cpu,
        options.repetitions(),
        options.window().as_secs(),
        start.elapsed().as_secs_f64() / 60.0,
    )
}

fn targets(ratios: &[Ratio]) -> String {
    let mut text =
        "## Targets\n\n| row | path | measured | target | met |\n|---|---|---:|---|---|\n"
            .to_owned();
    for ratio in ratios {
        let Some(target) = ratio.target else {
            continue;
        };
        let value = ratio.value.map_or_else(|| "none".to_owned(), number);
        let met = if ratio.met() == Some(true) {
            "yes"
        } else {
            "**no**"
        };
        let _ = writeln!(
            text,
            "| `{}` ({}) | {} | {value} | {} | {met} |",
            ratio.id,
            ratio.unit,
            ratio.path.name().replace('_', " "),
            target.text(),
        );
    }
    text
}

fn table(lines: &Lines, path: Path) -> String {
    let here: Vec<&Line> = lines
        .all()
        .iter()
        .filter(|line| line.path == path)
        .collect();
    if here.is_empty() {
        return String::new();
    }
    let shown = |proxy: &&Proxy| here.iter().any(|line| line.proxy == **proxy);
    let proxies: Vec<&Proxy> = Proxy::ALL.iter().filter(shown).collect();
    let mut text = format!("\n### {}\n\n| row |", path.name().replace('_', " "));
    for proxy in &proxies {
        let _ = write!(text, " {} |", proxy.name());
    }
    let _ = write!(text, "\n|---|{}\n", "---:|".repeat(proxies.len()));
    let mut seen: Vec<(&str, Figure)> = Vec::new();
    for line in &here {
        if seen.contains(&(line.row, line.figure)) {
            continue;
        }
        seen.push((line.row, line.figure));
        let _ = write!(text, "| `{}`, {} |", line.id(), line.figure.unit());
        for proxy in &proxies {
            let cell = lines.find(line.row, path, **proxy, line.figure);
            let _ = write!(text, " {} |", cell.map_or_else(String::new, cell_of));
        }
        text.push('\n');
    }
    text
}

fn cell_of(line: &Line) -> String {
    match (line.median(), line.least(), line.most()) {
        (Some(median), Some(least), Some(most)) if line.values.len() > 1 => {
            let errors = match line.errors {
                0 => String::new(),
                errors => format!(", {errors} errors"),
            };
            format!(
                "{} ({} to {}){errors}",
                number(median),
                number(least),
                number(most)
            )
        }
        (Some(median), ..) => number(median),
        _ => {
            let reason = line.not_run.as_deref().unwrap_or("not run");
            reason.replace('|', "/").replace('\n', " ")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_wrote_stays() {
        let page = format!("# Performance\n{BEGIN}\nold\n{END}\nnotes\n");
        let page = replaced(&page, "new\n").unwrap();
        assert!(page.starts_with("# Performance\n") && page.ends_with("\nnotes\n"));
        assert!(page.contains("new") && !page.contains("old"));
        assert_eq!(replaced("nothing", "new"), None);
    }
}
