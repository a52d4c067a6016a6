//! Timelines as SVG, drawn without a library: two panels of polylines.

use std::fmt::Write as _;
use std::time::Duration;

use crate::report::{Slice, Trace};
use crate::scenario::Scenario;

const WIDTH: f64 = 900.0;
const PANEL: f64 = 170.0;
const LEFT: f64 = 70.0;
const TOP: f64 = 60.0;
const GAP: f64 = 50.0;
const COLOURS: [(&str, &str); 4] = [
    ("undermesh", "#0b6e4f"),
    ("envoy", "#b5179e"),
    ("linkerd", "#2667ff"),
    ("none", "#999999"),
];

/// One picture of a scenario: what was lost, and what went upstream, by policy.
pub fn draw(scenario: &Scenario, runs: &[(String, Trace)]) -> String {
    let height = TOP + 2.0 * PANEL + GAP + 40.0;
    let mut svg = String::new();
    let _ = write!(
        svg,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/><text x="{LEFT}" y="20" font-size="15">{}: {}</text>"#,
        scenario.name, scenario.about,
    );
    for (index, (policy, _)) in runs.iter().enumerate() {
        let x = LEFT + 110.0 * index as f64;
        let colour = colour(policy);
        let _ = write!(
            svg,
            r#"<rect x="{x}" y="32" width="12" height="12" fill="{colour}"/><text x="{}" y="42">{policy}</text>"#,
            x + 18.0
        );
    }
    panel(&mut svg, scenario, runs, TOP, "lost per second", |slice| {
        slice.lost
    });
    panel(
        &mut svg,
        scenario,
        runs,
        TOP + PANEL + GAP,
        "attempts per second",
        |slice| slice.attempts,
    );
    svg.push_str("</svg>\n");
    svg
}

fn panel(
    svg: &mut String,
    scenario: &Scenario,
    runs: &[(String, Trace)],
    top: f64,
    title: &str,
    value: fn(&Slice) -> u32,
) {
    let length = scenario.length.as_secs_f64();
    let x = |at: Duration| LEFT + at.as_secs_f64() / length * (WIDTH - LEFT - 20.0);
    // Smoothed to a second: a slice holds a few hundred requests.
    let per_second = |slices: &[Slice]| {
        slices
            .iter()
            .map(|slice| f64::from(value(slice)))
            .sum::<f64>()
            * 4.0
            / slices.len() as f64
    };
    let series: Vec<Vec<f64>> = runs
        .iter()
        .map(|(_, trace)| trace.slices().windows(4).map(per_second).collect())
        .collect();
    let most = series.iter().flatten().copied().fold(1.0, f64::max);
    let (from, until) = scenario.fault;
    let bottom = top + PANEL;
    let _ = write!(
        svg,
        r##"<rect x="{:.1}" y="{top}" width="{:.1}" height="{PANEL}" fill="#fff1d6"/><path d="M{LEFT} {top}V{bottom}H{}" fill="none" stroke="#333"/><text x="{LEFT}" y="{}">{title}</text><text x="{}" y="{}" text-anchor="end">{most:.0}</text><text x="{}" y="{bottom}" text-anchor="end">0</text>"##,
        x(from),
        x(until) - x(from),
        WIDTH - 20.0,
        top - 6.0,
        LEFT - 6.0,
        top + 10.0,
        LEFT - 6.0,
    );
    for second in (0..=scenario.length.as_secs()).step_by(10) {
        let at = x(Duration::from_secs(second));
        let _ = write!(
            svg,
            r#"<text x="{at:.1}" y="{}" text-anchor="middle">{second} s</text>"#,
            bottom + 16.0
        );
    }
    // The one that this is about is drawn last, on top.
    for (index, (policy, _)) in runs.iter().enumerate().rev() {
        let points = series[index].iter().enumerate().map(|(slice, value)| {
            let at = Duration::from_millis(250) * slice as u32 + Duration::from_millis(500);
            format!("{:.1},{:.1}", x(at), bottom - value / most * PANEL)
        });
        let points: Vec<String> = points.collect();
        let _ = write!(
            svg,
            r#"<polyline fill="none" stroke="{}" stroke-width="1.5" points="{}"/>"#,
            colour(policy),
            points.join(" ")
        );
    }
}

fn colour(policy: &str) -> &'static str {
    COLOURS
        .iter()
        .find(|(name, _)| *name == policy)
        .map_or("#333", |(_, colour)| colour)
}
