//! Follows the cgroups that may probe: they may appear later than the agent, a service that is
//! started again gets another, and one that turns out to hold pods may not.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::counters::Event;
use super::enrol::{Tools, on_kernel};
use super::kernel::{KernelError, ProbeCgroup, ProbeCgroupState};
use crate::mesh::Snapshot;
use crate::telemetry::error_chain;

/// How often it is looked. A few stat(2) for each cgroup and process of a kubelet, which take longer
/// to come to their first probe.
const LOOK: Duration = Duration::from_secs(1);

/// The cgroups that may probe, as the agent was told.
pub(super) struct Probers {
    pub tools: Arc<Tools>,
    pub directories: Vec<PathBuf>,
    /// Name of this node.
    pub node: String,
    pub snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    pub stop: CancellationToken,
}

impl Probers {
    /// Sets them before any pod is enrolled, unless another agent of the same layout runs: until
    /// that one accepts no more, its cgroups are in force and not these. Afterwards these are, and
    /// only these, whatever the other had.
    pub fn first_look(&self) -> Result<(), KernelError> {
        if self.waits() {
            return Ok(());
        }
        let found = self
            .tools
            .kernel
            .set_probe_cgroups(&self.directories, &BTreeSet::new())?;
        self.tell(&[], &found);
        Ok(())
    }

    /// The maps of another layout are not those of the agent that runs.
    fn waits(&self) -> bool {
        !self.tools.shelf.is_alone() && !self.tools.kernel.is_staged()
    }

    /// Looks again and again. While a successor takes over, it rests: the kernel's map is the
    /// successor's when that is alone.
    pub async fn follow(self) {
        let stop = self.stop.clone();
        let mut ticks = interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = Vec::new();
        let mut set_once = false;
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            if self.waits() {
                continue;
            }
            // Without directories there is nothing to look for, but what a former agent had goes.
            if self.directories.is_empty() && set_once {
                return;
            }
            let Some(_active) = stop.run_until_cancelled(self.tools.shelf.active()).await else {
                return;
            };
            let (directories, pods) = (self.directories.clone(), self.pods());
            let found = on_kernel(&self.tools.kernel, move |kernel| {
                kernel.set_probe_cgroups(&directories, &pods)
            })
            .await;
            match found {
                Ok(found) => {
                    self.tell(&last, &found);
                    last = found;
                    set_once = true;
                }
                Err(error) => {
                    let error = error_chain(&error);
                    tracing::warn!(error, "cannot tell the kernel who may probe");
                }
            }
        }
    }

    /// The cgroups of the node's pods, in the mesh or not, as far as the model knows them.
    fn pods(&self) -> BTreeSet<PathBuf> {
        let snapshot = self.snapshots.borrow().clone();
        let pods = snapshot.iter().flat_map(|all| all.workloads_on(&self.node));
        pods.filter_map(|pod| pod.sandbox.as_ref()?.cgroup.as_ref())
            .map(|cgroup| fs::canonicalize(cgroup).unwrap_or_else(|_| cgroup.clone()))
            .collect()
    }

    /// What is new, once.
    fn tell(&self, last: &[ProbeCgroup], found: &[ProbeCgroup]) {
        for cgroup in found.iter().filter(|cgroup| !last.contains(*cgroup)) {
            let (directory, id) = (cgroup.path.display(), cgroup.id);
            let reason = cgroup.reason.as_deref().unwrap_or_default();
            match cgroup.state {
                ProbeCgroupState::Known => tracing::info!(%directory, ?id, "may probe"),
                ProbeCgroupState::Absent => {
                    tracing::info!(%directory, "may probe as soon as it is there");
                }
                ProbeCgroupState::HoldsPods => {
                    self.tools.counters.count(Event::ProbeCgroupRefused);
                    tracing::warn!(%directory, reason, "may not probe");
                }
                state => tracing::warn!(%directory, ?state, "may not probe"),
            }
        }
    }
}
