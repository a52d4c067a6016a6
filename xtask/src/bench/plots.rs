//! Bars: medians, with the spread of the repetitions.

use super::canvas::{Canvas, LEFT, TOP, WIDTH, colour};
use super::lines::{Line, Lines};
use super::rows::{Figure, Proxy};

const BAR: f64 = 15.0;
const HEAD: f64 = 20.0;
const GAP: f64 = 16.0;
/// For the numbers right of the bars.
const MARGIN: f64 = 190.0;

/// A picture of the docs.
pub struct Plot {
    pub file: &'static str,
    pub title: &'static str,
    pub takes: fn(&Line) -> bool,
}

fn latency(line: &Line) -> bool {
    line.row.starts_with("ping-pong-1") || line.row.ends_with("000")
}

pub const PLOTS: [Plot; 4] = [
    Plot {
        file: "throughput.svg",
        title: "Bulk: more is better above, less below",
        takes: |line| matches!(line.figure, Figure::Throughput | Figure::CpuPerGib),
    },
    Plot {
        file: "rates.svg",
        title: "Round trips, connections and requests a second: more is better",
        takes: |line| line.figure == Figure::Rate,
    },
    Plot {
        file: "latency.svg",
        title: "Latency: less is better",
        takes: |line| latency(line) && matches!(line.figure, Figure::P50 | Figure::P99),
    },
    Plot {
        file: "costs.svg",
        title: "Processor time of each operation, and memory: less is better",
        takes: |line| {
            matches!(
                line.figure,
                Figure::CpuEach | Figure::Resident(_) | Figure::PerConnection
            )
        },
    },
];

/// Draws those lines; nothing if there are none.
pub fn draw(plot: &Plot, lines: &Lines) -> Option<String> {
    let mut groups: Vec<Vec<&Line>> = Vec::new();
    let measured = |line: &&Line| (plot.takes)(line) && line.median().is_some();
    for line in lines.all().iter().filter(measured) {
        let same = |group: &&mut Vec<&Line>| {
            let first = group[0];
            (first.row, first.path, first.figure) == (line.row, line.path, line.figure)
        };
        match groups.iter_mut().find(same) {
            Some(group) => group.push(line),
            None => groups.push(vec![line]),
        }
    }
    if groups.is_empty() {
        return None;
    }
    let height = |group: &Vec<&Line>| HEAD + BAR * group.len() as f64 + GAP;
    let total = TOP + groups.iter().map(height).sum::<f64>();
    let shown = |proxy: &&Proxy| groups.iter().flatten().any(|line| line.proxy == **proxy);
    let legend: Vec<&str> = Proxy::ALL
        .iter()
        .filter(shown)
        .map(|one| one.name())
        .collect();
    let mut svg = Canvas::new(total, plot.title, &legend);
    let mut top = TOP;
    for group in &groups {
        bars(&mut svg, group, top);
        top += height(group);
    }
    Some(svg.finish())
}

/// One group, with a scale of its own.
fn bars(svg: &mut Canvas, group: &[&Line], top: f64) {
    let first = group[0];
    svg.draw(format_args!(
        r#"<text x="{LEFT}" y="{:.1}" font-weight="bold">{} ({}), {}</text>"#,
        top + HEAD - 6.0,
        first.id(),
        first.path.name().replace('_', " "),
        first.figure.unit(),
    ));
    let ends = group.iter().filter_map(|line| line.most());
    let most = ends.fold(f64::MIN_POSITIVE, f64::max);
    let x = |value: f64| LEFT + value / most * (WIDTH - LEFT - MARGIN);
    for (index, line) in group.iter().enumerate() {
        let (Some(median), Some(least), Some(most)) = (line.median(), line.least(), line.most())
        else {
            continue;
        };
        let y = top + HEAD + BAR * index as f64;
        let middle = y + BAR / 2.0 - 1.0;
        svg.draw(format_args!(
            r##"<rect x="{LEFT}" y="{y:.1}" width="{:.1}" height="{:.1}" fill="{}"/><path d="M{:.1} {middle:.1}H{:.1}" stroke="#333"/><text x="{:.1}" y="{:.1}" font-size="11">{} {}</text>"##,
            x(median) - LEFT,
            BAR - 2.0,
            colour(line.proxy.name()),
            x(least),
            x(most),
            x(most) + 6.0,
            y + BAR - 4.0,
            super::number(median),
            line.proxy.name(),
        ));
    }
}
