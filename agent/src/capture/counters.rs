//! What the agent's side of capture counts.

use std::sync::atomic::{AtomicU64, Ordering};

/// Something that is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A connection came out at a listener and was handed over.
    Accepted,
    /// Reset: came out at a listener that its mark or its addresses do not belong to.
    RoleMismatch,
    /// Reset: the pod has as many live connections as a pod may have.
    PodFull,
    /// Reset: the pod has its share of the node's connections, and the rest is others'.
    NodeFull,
    /// Reset: the agent's memory is nearly used up.
    MemoryShort,
    /// Reset: its addresses could not be read, because it had ended already.
    EndedBeforeAccept,
    /// Reset: its worker could not watch it, for want of memory.
    Unregistered,
    /// accept(2) failed for want of descriptors or memory; the loop waited.
    AcceptBackoff,
    /// A delivery took another source port, because the first was in use.
    DeliveryPortInUse,
    /// A delivery took another source port, because nothing answered.
    DeliveryUnanswered,
    /// A delivery found no source port.
    DeliveryWithoutPort,
    /// A socket could not be made ahead of need: as many as the node may have wait already.
    SpareWithoutRoom,
    /// An enrolment attempt failed.
    EnrolmentFailed,
    /// A verification found something missing and put it back.
    Repaired,
    /// A probe did not come out where it should.
    ProbeFailed,
    /// A record of a former agent was removed.
    LeftoverRemoved,
    /// A connection to the probe's destination that was not the probe's; reset.
    StrayProbe,
    /// A cgroup that was to probe was found to hold pods.
    ProbeCgroupRefused,
    /// A pod was found to forward what others send, which is not enforced.
    ForwardingFound,
    /// The kernel did not say whether a pod forwards what others send.
    ForwardingUnknown,
}

const NAMES: [(Event, &str); 20] = [
    (Event::Accepted, "accepted"),
    (Event::RoleMismatch, "role_mismatch"),
    (Event::PodFull, "pod_full"),
    (Event::NodeFull, "node_full"),
    (Event::MemoryShort, "memory_short"),
    (Event::EndedBeforeAccept, "ended_before_accept"),
    (Event::Unregistered, "unregistered"),
    (Event::AcceptBackoff, "accept_backoff"),
    (Event::DeliveryPortInUse, "delivery_port_in_use"),
    (Event::DeliveryUnanswered, "delivery_unanswered"),
    (Event::DeliveryWithoutPort, "delivery_without_port"),
    (Event::SpareWithoutRoom, "spare_without_room"),
    (Event::EnrolmentFailed, "enrolment_failed"),
    (Event::Repaired, "repaired"),
    (Event::ProbeFailed, "probe_failed"),
    (Event::LeftoverRemoved, "leftover_removed"),
    (Event::StrayProbe, "stray_probe"),
    (Event::ProbeCgroupRefused, "probe_cgroup_refused"),
    (Event::ForwardingFound, "forwarding_found"),
    (Event::ForwardingUnknown, "forwarding_unknown"),
];

/// The counters.
#[derive(Debug, Default)]
pub struct Counters([AtomicU64; NAMES.len()]);

impl Counters {
    /// Counts one.
    pub fn count(&self, event: Event) {
        self.add(event, 1);
    }

    /// Counts several.
    pub fn add(&self, event: Event, by: u64) {
        if let Some(counter) = self.0.get(event as usize) {
            counter.fetch_add(by, Ordering::Relaxed);
        }
    }

    /// One value.
    #[must_use]
    pub fn get(&self, event: Event) -> u64 {
        self.0
            .get(event as usize)
            .map_or(0, |counter| counter.load(Ordering::Relaxed))
    }

    /// All values by name.
    #[must_use]
    pub fn all(&self) -> Vec<(&'static str, u64)> {
        NAMES
            .iter()
            .map(|(event, name)| (*name, self.get(*event)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_event_has_its_own_counter_under_its_own_name() {
        let counters = Counters::default();
        for (times, (event, _)) in NAMES.iter().enumerate() {
            counters.add(*event, times as u64);
        }
        for (times, (_, value)) in counters.all().into_iter().enumerate() {
            assert_eq!(value, times as u64);
        }
    }
}
