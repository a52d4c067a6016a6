//! What capture exports of each pod. Series are those of pods that are in the mesh now, so they are
//! bounded and go with the pod.

use std::sync::Arc;
use std::time::Duration;

use super::{Capture, NativeSample};
use crate::mesh::Workload;
use crate::telemetry::{Labelled, SampleLabels, Telemetry};

/// Registers all of it.
pub fn register(telemetry: &Telemetry, capture: &Arc<Capture>) {
    for (name, help, read) in NATIVE_COUNTS {
        let capture = capture.clone();
        telemetry.register_counter(name, help, move || samples(&capture, read));
    }
    for (name, help, read) in NATIVE_TIMES {
        let capture = capture.clone();
        telemetry.register_seconds(name, help, move || samples(&capture, read));
    }
}

type Family<V> = (&'static str, &'static str, fn(&NativeSample) -> V);

const NATIVE_COUNTS: [Family<u64>; 6] = [
    (
        "undermesh_native_connections_closed",
        "Connections of pods in the mesh that passed it by and ended",
        |sample| sample.traffic.connections,
    ),
    (
        "undermesh_native_connections_failed",
        "Those of the closed ones that never stood",
        |sample| sample.traffic.failed,
    ),
    (
        "undermesh_native_sent_bytes",
        "Bytes sent to the pod over closed connections that passed the mesh by",
        |sample| sample.traffic.to_pod_bytes,
    ),
    (
        "undermesh_native_received_bytes",
        "Bytes received from the pod over closed connections that passed the mesh by",
        |sample| sample.traffic.from_pod_bytes,
    ),
    (
        "undermesh_native_retransmitted_segments",
        "Segments that the pod sent again over closed connections that passed the mesh by",
        |sample| sample.traffic.retransmits,
    ),
    (
        "undermesh_native_rtt_samples",
        "Closed connections that passed the mesh by and had a round-trip time",
        |sample| sample.traffic.rtt_samples,
    ),
];

const NATIVE_TIMES: [Family<Duration>; 2] = [
    (
        "undermesh_native_rtt_seconds",
        "Sum of the last smoothed round-trip times of closed connections that passed the mesh by",
        |sample| Duration::from_micros(sample.traffic.rtt_sum),
    ),
    (
        "undermesh_native_duration_seconds",
        "Sum of the durations of closed connections that passed the mesh by",
        |sample| Duration::from_nanos(sample.traffic.duration_sum),
    ),
];

fn samples<V>(capture: &Capture, read: impl Fn(&NativeSample) -> V) -> Vec<Labelled<V>> {
    let samples = capture.native().into_iter();
    samples
        .map(|sample| {
            let mut labels = pod_labels(&sample.pod);
            labels.push(("destination_class", sample.class.name().to_owned()));
            let value = read(&sample);
            Labelled { labels, value }
        })
        .collect()
}

/// Whose connections they are.
fn pod_labels(pod: &Workload) -> SampleLabels {
    vec![
        ("source_workload", pod.workload.to_string()),
        ("source_workload_namespace", pod.name.namespace.to_string()),
        ("source_pod", pod.name.to_string()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::kernel::DestinationClass;

    #[test]
    fn every_family_and_every_value_of_its_labels_is_documented() {
        let documentation = include_str!("../../../docs/metrics.md");
        let counts = NATIVE_COUNTS.map(|(name, _, _)| format!("{name}_total"));
        let times = NATIVE_TIMES.map(|(name, _, _)| format!("{name}_total"));
        let classes = DestinationClass::ALL.map(|class| class.name().to_owned());
        for name in counts.into_iter().chain(times).chain(classes) {
            assert!(documentation.contains(&format!("`{name}`")), "{name}");
        }
    }
}
