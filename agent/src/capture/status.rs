//! How far the enrolment of each pod is, for `/pods`.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde::{Serialize, Serializer};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::backlog::Backlog;
use super::kernel::PROBE_PORTS_PER_POD;
use super::native::NativeView;
use super::pod::EnrolledPod;
use super::probe::Proof;
use crate::mesh::{Mode, ObjectName, Workload, WorkloadUid};

/// Where a pod stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Wanted, not tried yet.
    Pending,
    /// In the mesh, proven by effect.
    Enrolled,
    /// On its way out: its connections may still end.
    Draining,
    /// The last attempt failed; the next follows.
    Failed,
    /// It has no place in the mesh, for the reason given.
    Refused,
}

/// What keeps a pod from running outside the mesh before it is enrolled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Guarantee {
    /// Nothing: it is enrolled as soon as the agent sees it.
    Reconciled,
}

/// A moment, as RFC 3339 in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub SystemTime);

impl Serialize for Moment {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text = OffsetDateTime::from(self.0)
            .format(&Rfc3339)
            .map_err(serde::ser::Error::custom)?;
        serializer.serialize_str(&text)
    }
}

/// The last proof that a pod's connections come out at the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Proven {
    /// When.
    pub at: Moment,
    /// One for each address family of the pod.
    pub seen: Vec<Proof>,
}

/// The enrolment of one pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PodStatus {
    /// Namespace and name.
    pub name: ObjectName,
    /// UID.
    pub uid: WorkloadUid,
    /// Cookie of its network namespace, once that was opened.
    pub netns_cookie: Option<u64>,
    /// Wanted mode; none for a pod that is refused.
    pub mode: Option<Mode>,
    /// Where it stands.
    pub phase: Phase,
    /// What keeps it from running outside the mesh.
    pub guarantee: Guarantee,
    /// The last proof.
    pub proof: Option<Proven>,
    /// Attempts since it was wanted, verifications not counted.
    pub attempts: u64,
    /// Failures in a row.
    pub failures: u32,
    /// How many rules, routes, settings and programs verification had to put back.
    pub repaired: u64,
    /// What says that it may forward what others send: that is not enforced, whatever its mode.
    pub forwarded_traffic_not_enforced: Option<String>,
    /// Live connections.
    pub connections: usize,
    /// How many found no room, by the reason, where that happened.
    pub refused: BTreeMap<&'static str, u64>,
    /// The queues of the agent's listeners in the pod.
    pub backlogs: Vec<Backlog>,
    /// Ports on which a probing cgroup reaches the app past the mesh, once it is enrolled.
    pub probe_ports: Vec<u16>,
    /// Declared ones for which there was no room.
    pub probe_ports_left_out: Vec<u16>,
    /// What its native connections carried, by the class of their destination.
    pub native: BTreeMap<&'static str, NativeView>,
    /// Why the last attempt failed; none after a success.
    pub last_error: Option<String>,
    /// When the next attempt is due, after a failure.
    pub next_retry: Option<Moment>,
}

impl PodStatus {
    /// Of a pod that was not tried yet.
    #[must_use]
    pub fn pending(workload: &Workload) -> Self {
        Self {
            name: workload.name.clone(),
            uid: workload.uid.clone(),
            netns_cookie: None,
            mode: workload.mode(),
            phase: Phase::Pending,
            guarantee: Guarantee::Reconciled,
            proof: None,
            attempts: 0,
            failures: 0,
            repaired: 0,
            forwarded_traffic_not_enforced: None,
            connections: 0,
            refused: BTreeMap::new(),
            backlogs: Vec::new(),
            probe_ports: Vec::new(),
            probe_ports_left_out: Vec::new(),
            native: BTreeMap::new(),
            last_error: None,
            next_retry: None,
        }
    }

    /// Of a pod that the model already refuses.
    #[must_use]
    pub fn refused(workload: &Workload, reason: &str) -> Self {
        Self {
            phase: Phase::Refused,
            last_error: Some(reason.to_owned()),
            ..Self::pending(workload)
        }
    }

    /// What the pod itself knows at this moment.
    pub(super) fn observe(&mut self, pod: &EnrolledPod) {
        self.connections = pod.live();
        let refused = pod.refused().into_iter();
        self.refused = refused
            .filter(|(_, count)| *count > 0)
            .map(|(full, count)| (full.as_str(), count))
            .collect();
        self.backlogs = pod.backlogs();
        let declared = pod.workload().probe_ports.clone();
        let mut ports = declared.into_iter();
        self.probe_ports = ports.by_ref().take(PROBE_PORTS_PER_POD).collect();
        self.probe_ports_left_out = ports.collect();
    }

    pub(super) fn succeeded(&mut self, seen: Vec<Proof>, now: SystemTime) {
        self.phase = Phase::Enrolled;
        self.proof = Some(Proven {
            at: Moment(now),
            seen,
        });
        self.failures = 0;
        self.last_error = None;
        self.next_retry = None;
    }

    pub(super) fn failed(&mut self, phase: Phase, error: String, now: SystemTime, wait: Duration) {
        self.phase = phase;
        self.last_error = Some(error);
        self.next_retry = now.checked_add(wait).map(Moment);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_reads_as_rfc_3339() {
        let moment = Moment(SystemTime::UNIX_EPOCH + Duration::from_secs(1));
        assert_eq!(
            serde_json::to_string(&moment).unwrap(),
            r#""1970-01-01T00:00:01Z""#
        );
    }
}
