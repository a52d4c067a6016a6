//! Metrics as an agent shows them, in the text format of OpenMetrics.

use std::collections::BTreeMap;

/// What a scrape held.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics(Vec<Sample>);

#[derive(Debug, Clone, PartialEq)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Metrics {
    /// Parses a scrape; lines that are no samples are left out.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        Self(lines.filter_map(sample).collect())
    }

    /// The sum of all samples of `name` with these labels.
    #[must_use]
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let fits = |sample: &&Sample| {
            let has = |(key, value): &(&str, &str)| {
                sample.labels.get(*key).is_some_and(|found| found == value)
            };
            sample.name == name && labels.iter().all(has)
        };
        self.0.iter().filter(fits).map(|sample| sample.value).sum()
    }

    /// The sum, of a counter.
    #[must_use]
    pub fn count(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        // Counters are whole and far below 2^53.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let whole = self.sum(name, labels).round() as u64;
        whole
    }

    /// Sums of `name` by the values of one label.
    #[must_use]
    pub fn by(&self, name: &str, label: &str) -> BTreeMap<String, f64> {
        let mut sums = BTreeMap::new();
        for sample in self.0.iter().filter(|sample| sample.name == name) {
            let value = sample.labels.get(label).cloned().unwrap_or_default();
            *sums.entry(value).or_default() += sample.value;
        }
        sums
    }
}

fn sample(line: &str) -> Option<Sample> {
    let (name, rest) = match line.find(['{', ' ']) {
        Some(at) => line.split_at(at),
        None => return None,
    };
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (BTreeMap::new(), rest),
    };
    // A time stamp or an exemplar may follow.
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some(Sample {
        name: name.to_owned(),
        labels,
        value,
    })
}

/// Labels up to the closing brace, and what follows it.
fn labels(mut rest: &str) -> Option<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        rest = rest.trim_start_matches(',');
        if let Some(after) = rest.strip_prefix('}') {
            return Some((labels, after));
        }
        let (key, after) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut characters = after.char_indices();
        let end = loop {
            match characters.next()? {
                (at, '"') => break at,
                (_, '\\') => match characters.next()?.1 {
                    'n' => value.push('\n'),
                    other => value.push(other),
                },
                (_, other) => value.push(other),
            }
        };
        labels.insert(key.to_owned(), value);
        rest = &after[end + 1..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_summed_by_their_labels() {
        let metrics = Metrics::parse(
            "# TYPE opened counter\n\
             opened_total{direction=\"outbound\",to=\"a \\\"b\\\" }{\"} 3\n\
             opened_total{direction=\"outbound\",to=\"c\"} 4 # {id=\"x\"} 1\n\
             opened_total{direction=\"inbound\"} 5\n\
             up 1\n# EOF\n",
        );
        assert_eq!(
            metrics.count("opened_total", &[("direction", "outbound")]),
            7
        );
        assert_eq!(metrics.count("opened_total", &[]), 12);
        assert_eq!(metrics.count("up", &[]), 1);
        assert_eq!(metrics.count("opened_total", &[("to", "a \"b\" }{")]), 3);
        assert_eq!(metrics.by("opened_total", "direction")["inbound"], 5.0);
    }
}
