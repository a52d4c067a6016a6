//! Metrics that other parts bring: values that are read when metrics are scraped.

use std::fmt;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, LabelSetEncoder, MetricEncoder, NoLabelSet,
};
use prometheus_client::metrics::MetricType;

use super::labels::label;

/// Names and values of labels. Who brings them answers for their number being bounded.
pub type SampleLabels = Vec<(&'static str, String)>;

/// A value with its labels.
#[derive(Debug, Clone, PartialEq)]
pub struct Labelled<V> {
    /// Its labels.
    pub labels: SampleLabels,
    /// The value.
    pub value: V,
}

impl<V> Labelled<V> {
    /// Without labels.
    pub fn bare(value: V) -> Self {
        Self {
            labels: Vec::new(),
            value,
        }
    }

    /// With one label.
    pub fn one(label: &'static str, value_of_label: &str, value: V) -> Self {
        Self {
            labels: vec![(label, value_of_label.to_owned())],
            value,
        }
    }
}

pub(super) type Read<V> = Box<dyn Fn() -> Vec<Labelled<V>> + Send + Sync>;

/// A family of which the values are asked for at each scrape.
pub(super) struct SampledFamily {
    pub name: &'static str,
    pub help: &'static str,
    pub read: Samples,
}

pub(super) enum Samples {
    Counter(Read<u64>),
    /// Counts time; its name ends in `_seconds`.
    Seconds(Read<Duration>),
    Gauge(Read<f64>),
}

impl fmt::Debug for SampledFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SampledFamily")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Collector for SampledFamily {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        match &self.read {
            Samples::Counter(read) => {
                let mut family =
                    encoder.encode_descriptor(self.name, self.help, None, MetricType::Counter)?;
                each(&mut family, read(), |encoder, value| {
                    encoder.encode_counter::<NoLabelSet, _, u64>(&value, None)
                })
            }
            Samples::Seconds(read) => {
                let mut family =
                    encoder.encode_descriptor(self.name, self.help, None, MetricType::Counter)?;
                each(&mut family, read(), |encoder, value| {
                    encoder.encode_counter::<NoLabelSet, _, u64>(&value.as_secs_f64(), None)
                })
            }
            Samples::Gauge(read) => {
                let mut family =
                    encoder.encode_descriptor(self.name, self.help, None, MetricType::Gauge)?;
                each(&mut family, read(), |encoder, value| {
                    encoder.encode_gauge(&value)
                })
            }
        }
    }
}

fn each<V>(
    family: &mut MetricEncoder<'_>,
    samples: Vec<Labelled<V>>,
    encode: impl Fn(&mut MetricEncoder<'_>, V) -> fmt::Result,
) -> fmt::Result {
    for sample in samples {
        if sample.labels.is_empty() {
            encode(family, sample.value)?;
        } else {
            let labels = OwnedLabels(sample.labels);
            encode(&mut family.encode_family(&labels)?, sample.value)?;
        }
    }
    Ok(())
}

struct OwnedLabels(SampleLabels);

impl EncodeLabelSet for OwnedLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|(name, value)| label(encoder, name, value))
    }
}
