//! Timelines as SVG, drawn without a library: two panels of polylines.

use std::time::Duration;

use crate::canvas::{Canvas, LEFT, TOP, WIDTH, colour};
use crate::report::{Slice, Trace};
use crate::scenario::Scenario;

const PANEL: f64 = 170.0;
const GAP: f64 = 50.0;

/// One picture of a scenario: what was lost, and what went upstream, by policy.
pub fn draw(scenario: &Scenario, runs: &[(String, Trace)]) -> String {
    let height = TOP + 2.0 * PANEL + GAP + 40.0;
    let title = format!("{}: {}", scenario.name, scenario.about);
    let legend: Vec<&str> = runs.iter().map(|(policy, _)| policy.as_str()).collect();
    let mut svg = Canvas::new(height, &title, &legend);
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
    svg.finish()
}

fn panel(
    svg: &mut Canvas,
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
    svg.draw(format_args!(
        r##"<rect x="{:.1}" y="{top}" width="{:.1}" height="{PANEL}" fill="#fff1d6"/><path d="M{LEFT} {top}V{bottom}H{}" fill="none" stroke="#333"/><text x="{LEFT}" y="{}">{title}</text><text x="{}" y="{}" text-anchor="end">{most:.0}</text><text x="{}" y="{bottom}" text-anchor="end">0</text>"##,
        x(from),
        x(until) - x(from),
        WIDTH - 20.0,
        top - 6.0,
        LEFT - 6.0,
        top + 10.0,
        LEFT - 6.0,
    ));
    for second in (0..=scenario.length.as_secs()).step_by(10) {
        let at = x(Duration::from_secs(second));
        svg.draw(format_args!(
            r#"<text x="{at:.1}" y="{}" text-anchor="middle">{second} s</text>"#,
            bottom + 16.0
        ));
    }
    // The one that this is about is drawn last, on top.
    for (index, (policy, _)) in runs.iter().enumerate().rev() {
        let points = series[index].iter().enumerate().map(|(slice, value)| {
            let at = Duration::from_millis(250) * slice as u32 + Duration::from_millis(500);
            format!("{:.1},{:.1}", x(at), bottom - value / most * PANEL)
        });
        let points: Vec<String> = points.collect();
        svg.draw(format_args!(
            r#"<polyline fill="none" stroke="{}" stroke-width="1.5" points="{}"/>"#,
            colour(policy),
            points.join(" ")
        ));
    }
}
