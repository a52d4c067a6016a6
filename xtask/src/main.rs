//! Everything a developer of Undermesh runs.
fn main() {}
