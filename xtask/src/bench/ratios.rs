//! Undermesh beside the others, and beside what it is to reach.

use serde_json::{Value, json};

use super::lines::{Line, Lines};
use super::rows::{Path, Proxy};
use super::targets::{Against, TARGETS, Target};

/// One comparison. A target whose figures are missing has no value, and is not met.
#[derive(Debug, Clone)]
pub struct Ratio {
    pub id: String,
    pub path: Path,
    pub unit: &'static str,
    pub vs_direct: Option<f64>,
    /// By configuration.
    pub vs_envoy: Vec<(&'static str, f64)>,
    pub target: Option<Target>,
    /// What the target is held against.
    pub value: Option<f64>,
}

impl Ratio {
    pub fn met(&self) -> Option<bool> {
        let target = self.target?;
        Some(self.value.is_some_and(|value| target.bound.met(value)))
    }

    pub fn to_json(&self) -> Value {
        // The one that the target names, else the first.
        let named = match self.target.map(|target| target.against) {
            Some(Against::Proxy(proxy)) => {
                let mut all = self.vs_envoy.iter();
                all.find(|(name, _)| *name == proxy.name())
            }
            _ => None,
        };
        let vs_envoy = named.or(self.vs_envoy.first());
        json!({
            "id": self.id,
            "path": self.path.name(),
            "unit": self.unit,
            "vs_direct": self.vs_direct,
            "vs_envoy": vs_envoy.map(|(_, value)| value),
            "envoy": vs_envoy.map(|(name, _)| name),
            "target": self.target.map(|target| target.text()),
            "value": self.value,
            "met": self.met(),
        })
    }
}

/// Every figure of Undermesh with the others', and every target of a row that `chosen` takes.
pub fn compare(lines: &Lines, chosen: impl Fn(&str) -> bool) -> Vec<Ratio> {
    let mut ratios: Vec<Ratio> = TARGETS
        .iter()
        .filter(|target| chosen(target.row))
        .map(|target| of_target(lines, target))
        .collect();
    let own = lines.all().iter();
    for line in own.filter(|line| line.proxy == Proxy::Undermesh && line.not_run.is_none()) {
        let has_target = TARGETS.iter().any(|target| {
            (target.row, target.path, target.figure) == (line.row, line.path, line.figure)
        });
        if !has_target {
            ratios.push(plain(lines, line));
        }
    }
    ratios
}

fn plain(lines: &Lines, line: &Line) -> Ratio {
    let beside = |proxy: Proxy| {
        let other = lines.find(line.row, line.path, proxy, line.figure)?;
        quotient(line.median()?, other.median()?)
    };
    let envoys = Proxy::ALL.iter().filter(|proxy| proxy.envoy().is_some());
    Ratio {
        id: line.id(),
        path: line.path,
        unit: line.figure.unit(),
        vs_direct: beside(Proxy::Direct),
        vs_envoy: envoys
            .filter_map(|&proxy| Some((proxy.name(), beside(proxy)?)))
            .collect(),
        target: None,
        value: None,
    }
}

fn of_target(lines: &Lines, target: &Target) -> Ratio {
    let own = lines.find(target.row, target.path, Proxy::Undermesh, target.figure);
    let mut ratio = match own {
        Some(line) => plain(lines, line),
        None => Ratio {
            id: format!("{}{}", target.row, target.figure.suffix()),
            path: target.path,
            unit: target.figure.unit(),
            vs_direct: None,
            vs_envoy: Vec::new(),
            target: None,
            value: None,
        },
    };
    ratio.value = own.and_then(|line| {
        let value = line.median()?;
        match target.against {
            Against::Itself => Some(value),
            Against::Proxy(proxy) => {
                let other = lines.find(target.row, target.path, proxy, target.figure)?;
                quotient(value, other.median()?)
            }
        }
    });
    ratio.target = Some(*target);
    ratio
}

fn quotient(value: f64, other: f64) -> Option<f64> {
    (other > 0.0).then(|| value / other)
}

#[cfg(test)]
mod tests {
    use undermesh_lab::load::LoadReport;

    use super::super::rows::ROWS;
    use super::*;

    fn moved(bytes: u64) -> LoadReport {
        LoadReport {
            seconds: 1.0,
            bytes,
            watched_cpu_seconds: 0.5,
            ..LoadReport::default()
        }
    }

    #[test]
    fn a_target_is_met_by_the_ratio_of_medians() {
        let mut lines = Lines::default();
        for bytes in [11 << 30, 12 << 30, 90 << 30] {
            lines.add(&ROWS[0], Proxy::Undermesh, &moved(bytes));
        }
        lines.add(&ROWS[0], Proxy::EnvoyTcp, &moved(10 << 30));
        let ratios = compare(&lines, |row| row == "bulk-1");
        let across = ratios
            .iter()
            .find(|ratio| ratio.id == "bulk-1" && ratio.path == Path::CrossNode)
            .unwrap();
        assert_eq!(across.met(), Some(true));
        assert!((across.value.unwrap() - 1.2).abs() < 1e-9);
    }

    #[test]
    fn a_target_without_figures_is_not_met() {
        let ratios = compare(&Lines::default(), |row| row == "connect");
        assert_eq!(ratios.len(), 3);
        assert!(ratios.iter().all(|ratio| ratio.met() == Some(false)));
    }
}
