//! Connections that pass the mesh by, as `/pods` and the metrics show them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Serialize, Serializer};

use super::kernel::{DestinationClass, Kernel, NativeTraffic};
use super::pod::EnrolledPod;
use crate::mesh::Workload;

/// What the native connections of a pod to one class of destinations carried in all, added when
/// they are closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct NativeView {
    /// Connections that ended, also those that never stood.
    pub closed: u64,
    /// Those that never stood.
    pub failed: u64,
    /// Bytes sent to the pod: the responses.
    pub sent_bytes: u64,
    /// Bytes received from the pod: the requests.
    pub received_bytes: u64,
    /// Segments that the pod sent again, SYNs too.
    pub retransmitted_segments: u64,
    /// Mean of the connections' last smoothed round-trip times; none if no connection had one.
    #[serde(rename = "mean_rtt_seconds", serialize_with = "seconds")]
    pub mean_rtt: Option<Duration>,
    /// Mean time from SYN to end; none if no connection ended.
    #[serde(rename = "mean_duration_seconds", serialize_with = "seconds")]
    pub mean_duration: Option<Duration>,
}

/// Native traffic of one pod to one class of destinations.
#[derive(Debug, Clone)]
pub struct NativeSample {
    /// The pod.
    pub pod: Arc<Workload>,
    /// Where to.
    pub class: DestinationClass,
    /// What the kernel counted.
    pub traffic: NativeTraffic,
}

impl From<NativeTraffic> for NativeView {
    fn from(traffic: NativeTraffic) -> Self {
        Self {
            closed: traffic.connections,
            failed: traffic.failed,
            sent_bytes: traffic.to_pod_bytes,
            received_bytes: traffic.from_pod_bytes,
            retransmitted_segments: traffic.retransmits,
            mean_rtt: traffic
                .rtt_sum
                .checked_div(traffic.rtt_samples)
                .map(Duration::from_micros),
            mean_duration: traffic
                .duration_sum
                .checked_div(traffic.connections)
                .map(Duration::from_nanos),
        }
    }
}

fn seconds<S: Serializer>(time: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    time.map(|time| time.as_secs_f64()).serialize(serializer)
}

/// Classes to which the pod had connections.
pub(super) fn view(kernel: &Kernel, netns_cookie: u64) -> BTreeMap<&'static str, NativeView> {
    let classes = kernel.native_traffic(netns_cookie).into_iter();
    classes
        .filter(|(_, traffic)| traffic.connections > 0)
        .map(|(class, traffic)| (class.name(), traffic.into()))
        .collect()
}

pub(super) fn samples(kernel: &Kernel, pods: &[Arc<EnrolledPod>]) -> Vec<NativeSample> {
    let mut samples = Vec::new();
    for pod in pods {
        let classes = kernel.native_traffic(pod.netns_cookie()).into_iter();
        let used = classes.filter(|(_, traffic)| traffic.connections > 0);
        samples.extend(used.map(|(class, traffic)| NativeSample {
            pod: pod.workload(),
            class,
            traffic,
        }));
    }
    samples
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_those_of_the_connections_that_had_the_figure() {
        let view = NativeView::from(NativeTraffic {
            connections: 4,
            failed: 1,
            from_pod_bytes: 10,
            to_pod_bytes: 20,
            retransmits: 3,
            rtt_sum: 600,
            rtt_samples: 3,
            duration_sum: 8_000_000_000,
        });
        let json = serde_json::to_value(view).unwrap();
        assert_eq!(json["mean_rtt_seconds"], 0.0002);
        assert_eq!(json["mean_duration_seconds"], 2.0);
        assert_eq!((view.sent_bytes, view.received_bytes), (20, 10));
        let nothing = NativeView::from(NativeTraffic::default());
        assert_eq!((nothing.mean_rtt, nothing.mean_duration), (None, None));
    }
}
