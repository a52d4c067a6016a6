//! What every SVG of this repository starts with: a title, and colours that mean the same in all of them.

use std::fmt::{Arguments, Write as _};

/// Width of every picture.
pub const WIDTH: f64 = 900.0;
/// Where a picture begins, right of what names its lines.
pub const LEFT: f64 = 70.0;
/// Where it begins, below title and legend.
pub const TOP: f64 = 60.0;

const COLOURS: [(&str, &str); 8] = [
    ("undermesh", "#0b6e4f"),
    ("envoy", "#b5179e"),
    ("envoy-tcp", "#b5179e"),
    ("envoy-hbone", "#7209b7"),
    ("envoy-http", "#f72585"),
    ("linkerd", "#2667ff"),
    ("direct", "#999999"),
    ("none", "#999999"),
];

/// The colour of one of those that are compared.
pub fn colour(name: &str) -> &'static str {
    COLOURS
        .iter()
        .find(|(known, _)| *known == name)
        .map_or("#333", |(_, colour)| colour)
}

/// A picture that is being drawn.
pub struct Canvas(String);

impl Canvas {
    /// With a title, and the names of those that are compared.
    pub fn new(height: f64, title: &str, legend: &[&str]) -> Self {
        let mut canvas = Self(String::new());
        canvas.draw(format_args!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/><text x="{LEFT}" y="20" font-size="15">{title}</text>"#
        ));
        for (index, name) in legend.iter().enumerate() {
            let x = LEFT + 110.0 * index as f64;
            let colour = colour(name);
            canvas.draw(format_args!(
                r#"<rect x="{x}" y="32" width="12" height="12" fill="{colour}"/><text x="{}" y="42">{name}</text>"#,
                x + 18.0
            ));
        }
        canvas
    }

    /// Adds elements.
    pub fn draw(&mut self, elements: Arguments<'_>) {
        // Writing to a String does not fail.
        let _ = self.0.write_fmt(elements);
    }

    /// The picture.
    pub fn finish(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }
}
