//! Figures, gathered over repetitions.

use serde_json::{Map, Value, json};
use undermesh_lab::load::{LoadKind, LoadReport};

use super::rows::{CAPTURE, Figure, MEMORY, Path, Proxy, Row};

/// One figure of one load by one proxy.
#[derive(Debug, Clone)]
pub struct Line {
    pub row: &'static str,
    pub about: &'static str,
    pub path: Path,
    pub proxy: Proxy,
    pub connections: usize,
    pub payload_bytes: usize,
    pub figure: Figure,
    /// One of each repetition.
    pub values: Vec<f64>,
    /// Of the proxies, in all windows.
    pub cpu_seconds: f64,
    /// Of all repetitions.
    pub operations: u64,
    pub errors: u64,
    /// The first of them.
    pub example: Option<String>,
    /// Why there are no values.
    pub not_run: Option<String>,
}

impl Line {
    fn new(row: &Row, proxy: Proxy, figure: Figure) -> Self {
        Self {
            row: row.id,
            about: row.about,
            path: row.path,
            proxy,
            connections: row.connections,
            payload_bytes: row.payload_bytes(),
            figure,
            values: Vec::new(),
            cpu_seconds: 0.0,
            operations: 0,
            errors: 0,
            example: None,
            not_run: None,
        }
    }

    /// A figure of idle connections.
    pub fn of_memory(proxy: Proxy, connections: usize, figure: Figure) -> Self {
        Self {
            row: MEMORY,
            about: "resident memory of both proxies with idle connections",
            path: Path::CrossNode,
            proxy,
            connections,
            payload_bytes: 1,
            figure,
            values: Vec::new(),
            cpu_seconds: 0.0,
            operations: 0,
            errors: 0,
            example: None,
            not_run: None,
        }
    }

    pub fn id(&self) -> String {
        format!("{}{}", self.row, self.figure.suffix())
    }

    pub fn median(&self) -> Option<f64> {
        median(&self.values)
    }

    pub fn least(&self) -> Option<f64> {
        self.values.iter().copied().reduce(f64::min)
    }

    pub fn most(&self) -> Option<f64> {
        self.values.iter().copied().reduce(f64::max)
    }

    pub fn to_json(&self) -> Value {
        let mut line = Map::new();
        let mut put = |name: &str, value: Value| line.insert(name.to_owned(), value);
        put("id", self.id().into());
        put("path", self.path.name().into());
        put("proxy", self.proxy.family().into());
        put("configuration", self.proxy.name().into());
        put("about", self.about.into());
        put("connections", self.connections.into());
        put("payload_bytes", self.payload_bytes.into());
        put("unit", self.figure.unit().into());
        put("samples", self.values.len().into());
        put("values", json!(self.values));
        put("median", json!(self.median()));
        put("min", json!(self.least()));
        put("max", json!(self.most()));
        put("cpu_seconds", self.cpu_seconds.into());
        put("operations", self.operations.into());
        put("errors", self.errors.into());
        if let Some(example) = &self.example {
            put("example", example.clone().into());
        }
        if let Some(reason) = &self.not_run {
            put("not_run", reason.clone().into());
        }
        Value::Object(line)
    }
}

/// The value in the middle, or between the two in the middle.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        length if length % 2 == 1 => Some(sorted[half]),
        _ => Some((sorted[half - 1] + sorted[half]) / 2.0),
    }
}

/// All that was measured so far.
#[derive(Debug, Default)]
pub struct Lines(Vec<Line>);

impl Lines {
    pub fn all(&self) -> &[Line] {
        &self.0
    }

    pub fn find(&self, row: &str, path: Path, proxy: Proxy, figure: Figure) -> Option<&Line> {
        self.0.iter().find(|line| {
            (line.row, line.path, line.proxy, line.figure) == (row, path, proxy, figure)
        })
    }

    /// The line like `line`, which is `line` if there was none.
    fn entry(&mut self, line: Line) -> &mut Line {
        let same = |other: &Line| {
            (other.row, other.path, other.proxy, other.figure)
                == (line.row, line.path, line.proxy, line.figure)
        };
        match self.0.iter().position(same) {
            Some(at) => &mut self.0[at],
            None => {
                self.0.push(line);
                let last = self.0.len() - 1;
                &mut self.0[last]
            }
        }
    }

    /// What one run of the client gave.
    pub fn add(&mut self, row: &Row, proxy: Proxy, report: &LoadReport) {
        for (figure, value) in figures(row, proxy, report) {
            let line = self.entry(Line::new(row, proxy, figure));
            line.values.push(value);
            line.cpu_seconds += report.watched_cpu_seconds;
            line.operations += report.operations;
            line.errors += report.errors;
            if line.example.is_none() {
                line.example = report.examples.first().cloned();
            }
        }
    }

    /// A measurement that could not be made.
    pub fn lost(&mut self, row: &Row, figure: Figure, proxy: Proxy, reason: &str) {
        let line = self.entry(Line::new(row, proxy, figure));
        line.not_run.get_or_insert_with(|| reason.to_owned());
    }

    pub fn add_capture(
        &mut self,
        proxy: Proxy,
        operations: u64,
        errors: u64,
        figure: Figure,
        value: f64,
    ) {
        let line = self.entry(Line::new(&CAPTURE, proxy, figure));
        line.values.push(value);
        line.operations += operations;
        line.errors += errors;
    }

    pub fn add_memory(&mut self, proxy: Proxy, connections: usize, figure: Figure, value: f64) {
        let line = Line::of_memory(proxy, connections, figure);
        self.entry(line).values.push(value);
    }

    pub fn lost_memory(&mut self, proxy: Proxy, reason: &str) {
        let line = Line::of_memory(proxy, 0, Figure::Resident(0));
        let line = self.entry(line);
        line.not_run.get_or_insert_with(|| reason.to_owned());
    }
}

/// What a load is about.
pub fn main_figure(row: &Row) -> Figure {
    match row.kind {
        LoadKind::Bulk => Figure::Throughput,
        LoadKind::PingPong if row.connections == 1 => Figure::P50,
        LoadKind::Http if row.rate.is_some() => Figure::P50,
        LoadKind::PingPong | LoadKind::Connect | LoadKind::Http | LoadKind::Hold => Figure::Rate,
    }
}

#[allow(clippy::cast_precision_loss)]
fn figures(row: &Row, proxy: Proxy, report: &LoadReport) -> Vec<(Figure, f64)> {
    let mut figures = Vec::new();
    let operations = report.operations as f64;
    let cpu = report.watched_cpu_seconds;
    if row.kind == LoadKind::Bulk {
        let bytes = report.bytes as f64;
        figures.push((Figure::Throughput, bytes * 8.0 / report.seconds / 1e9));
        if proxy != Proxy::Direct {
            figures.push((Figure::CpuPerGib, cpu / (bytes / f64::from(1 << 30))));
        }
        return figures;
    }
    let latency = report.latency;
    if main_figure(row) == Figure::Rate {
        figures.push((Figure::Rate, operations / report.seconds));
    }
    figures.extend([(Figure::P50, latency.p50), (Figure::P99, latency.p99)]);
    if main_figure(row) == Figure::P50 {
        figures.push((Figure::P999, latency.p999));
    }
    if proxy != Proxy::Direct {
        figures.push((Figure::CpuEach, cpu * 1e6 / operations));
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::super::rows::ROWS;
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn a_run_gives_rates_and_costs() {
        let bulk = &ROWS[0];
        let report = LoadReport {
            seconds: 2.0,
            bytes: 1 << 31,
            watched_cpu_seconds: 1.0,
            ..LoadReport::default()
        };
        let mut lines = Lines::default();
        lines.add(bulk, Proxy::Undermesh, &report);
        let of = |figure| {
            let line = lines.find(bulk.id, bulk.path, Proxy::Undermesh, figure);
            line.and_then(Line::median).unwrap()
        };
        assert!((of(Figure::Throughput) - 8.59).abs() < 0.01);
        assert!((of(Figure::CpuPerGib) - 0.5).abs() < 1e-9);
    }

    #[test]
    fn a_lost_measurement_stays_in_the_list_with_its_reason() {
        let mut lines = Lines::default();
        lines.lost(&ROWS[0], main_figure(&ROWS[0]), Proxy::EnvoyTcp, "no Envoy");
        let line = lines.all()[0].to_json();
        assert_eq!(
            (&line["not_run"], &line["samples"]),
            (&json!("no Envoy"), &json!(0))
        );
        assert_eq!(
            (&line["proxy"], &line["median"]),
            (&json!("envoy"), &json!(null))
        );
    }
}
