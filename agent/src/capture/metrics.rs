//! What capture exports of each pod. Series are those of pods that are in the mesh now, so they are
//! bounded and go with the pod.

use std::sync::Arc;
use std::time::Duration;

use super::{Capture, EnrolledPod, MemoryUse, NativeSample, Role};
use crate::mesh::Workload;
use crate::telemetry::{Labelled, SampleLabels, Telemetry};

/// Registers all of it.
pub fn register(telemetry: &Telemetry, capture: &Arc<Capture>) {
    let pods = capture.clone();
    telemetry.register_counter(
        "undermesh_pod_connections_refused",
        "Connections of a pod that were reset because there was no room for them",
        move || of_pods(&pods, refused),
    );
    let pods = capture.clone();
    telemetry.register_counter(
        "undermesh_pod_listener_drops",
        "Connections that found no room in the queue of the agent's listener in the pod",
        move || of_pods(&pods, drops),
    );
    let used = capture.clone();
    telemetry.register_gauge(
        "undermesh_memory_used_bytes",
        "Memory used of the cgroup that is nearest to its limit",
        move || memory(&used, |found| found.used_bytes),
    );
    let limit = capture.clone();
    telemetry.register_gauge(
        "undermesh_memory_limit_bytes",
        "Limit of the cgroup that is nearest to it",
        move || memory(&limit, |found| found.limit_bytes),
    );
    let shedding = capture.clone();
    telemetry.register_gauge(
        "undermesh_memory_shedding",
        "Whether new connections are shed because memory is short",
        move || {
            let shedding = shedding.memory().shedding;
            vec![Labelled::bare(f64::from(u8::from(shedding)))]
        },
    );
    for (name, help, read) in NATIVE_COUNTS {
        let capture = capture.clone();
        telemetry.register_counter(name, help, move || samples(&capture, read));
    }
    for (name, help, read) in NATIVE_TIMES {
        let capture = capture.clone();
        telemetry.register_seconds(name, help, move || samples(&capture, read));
    }
}

/// Of each pod that is in the mesh.
fn of_pods<V>(
    capture: &Capture,
    read: impl Fn(&EnrolledPod) -> Vec<(&'static str, &'static str, V)>,
) -> Vec<Labelled<V>> {
    let mut samples = Vec::new();
    for pod in capture.all_enrolled() {
        let name = pod.workload().name.to_string();
        samples.extend(read(&pod).into_iter().map(|(label, text, value)| Labelled {
            labels: vec![("pod", name.clone()), (label, text.to_owned())],
            value,
        }));
    }
    samples
}

fn refused(pod: &EnrolledPod) -> Vec<(&'static str, &'static str, u64)> {
    let refused = pod.refused().into_iter();
    refused
        .map(|(full, count)| ("reason", full.as_str(), count))
        .collect()
}

fn drops(pod: &EnrolledPod) -> Vec<(&'static str, &'static str, u64)> {
    [Role::Outbound, Role::Inbound, Role::Hbone]
        .into_iter()
        .map(|role| {
            let of_role = pod.backlogs().into_iter().filter(|one| one.role == role);
            let dropped = of_role.map(|one| u64::from(one.dropped)).sum();
            ("listener", role.as_str(), dropped)
        })
        .collect()
}

fn memory(capture: &Capture, read: impl Fn(&MemoryUse) -> u64) -> Vec<Labelled<f64>> {
    let found = capture.memory().usage;
    found
        .map(|found| Labelled::bare(read(&found) as f64))
        .into_iter()
        .collect()
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
    use crate::capture::Full;
    use crate::capture::kernel::DestinationClass;

    #[test]
    fn every_family_and_every_value_of_its_labels_is_documented() {
        let documentation = include_str!("../../../docs/metrics.md");
        let counts = NATIVE_COUNTS.map(|(name, _, _)| format!("{name}_total"));
        let times = NATIVE_TIMES.map(|(name, _, _)| format!("{name}_total"));
        let classes = DestinationClass::ALL.map(|class| class.name().to_owned());
        let reasons = Full::ALL.map(|full| full.as_str().to_owned());
        let all = counts.into_iter().chain(times).chain(classes);
        for name in all.chain(reasons) {
            assert!(documentation.contains(&format!("`{name}`")), "{name}");
        }
    }
}
