//! From the snapshot to the kernel: which destinations are captured, which pods are in the mesh,
//! and what a former agent left behind.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::backoff::Backoff;
use super::counters::Event;
use super::enrol::{self, EnrolError, Tools, on_kernel};
use super::kernel::PodRecord;
use super::netns::{self, Netns};
use super::probe;
use super::registry::Registry;
use super::sockets::PodAddresses;
use super::status::{Phase, PodStatus};
use super::task::{Desired, PodTask};
use crate::mesh::{CaptureTarget, Membership, Mode, Snapshot, Workload, WorkloadUid};
use crate::telemetry::error_chain;

const RETRY: Backoff = Backoff {
    first: Duration::from_millis(200),
    most: Duration::from_secs(10),
};
/// How often it is looked whether a former agent left something.
const SWEEP: Duration = Duration::from_secs(30);
/// The same, until every pod of the first snapshot was tried.
const FIRST_SWEEP: Duration = Duration::from_millis(200);

/// Follows the snapshots.
pub(super) struct Reconciler {
    pub node: String,
    pub tools: Arc<Tools>,
    pub registry: Arc<Registry>,
    pub snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    /// Why the captured destinations could not be set, while that is so.
    pub target_error: Arc<Mutex<Option<String>>>,
    /// Where the tasks of pods run.
    pub tasks: TaskTracker,
    /// Ends the tasks of pods.
    pub stop_pods: CancellationToken,
    /// Ends this.
    pub stop: CancellationToken,
}

impl Reconciler {
    /// Runs until it is stopped.
    pub async fn run(mut self) {
        let mut set: Option<BTreeSet<CaptureTarget>> = None;
        let mut resumed = 0;
        let mut failures = 0;
        let mut retry: Option<Instant> = None;
        let mut sweep = Instant::now() + FIRST_SWEEP;
        loop {
            let due = retry.map_or(sweep, |retry| retry.min(sweep));
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                changed = self.snapshots.changed() => if changed.is_err() { return },
                () = sleep_until(due) => {}
            }
            let Some(snapshot) = self.snapshots.borrow_and_update().clone() else {
                sweep = Instant::now() + FIRST_SWEEP;
                continue;
            };
            let tools = self.tools.clone();
            let _active = tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                active = tools.shelf.active() => active,
            };
            if tools.shelf.resumed() != resumed {
                resumed = tools.shelf.resumed();
                set = None;
            }
            // Destinations before pods: what a pod connects to is known when its capture begins.
            match self.set_targets(&snapshot, &mut set).await {
                Ok(()) => {
                    failures = 0;
                    retry = None;
                }
                Err(()) => {
                    failures += 1;
                    retry = Some(Instant::now() + RETRY.wait(failures, rand::random()));
                }
            }
            self.want_pods(&snapshot);
            if Instant::now() >= sweep {
                sweep = Instant::now() + self.sweep(&snapshot).await;
            }
        }
    }

    async fn set_targets(
        &self,
        snapshot: &Snapshot,
        set: &mut Option<BTreeSet<CaptureTarget>>,
    ) -> Result<(), ()> {
        let mut targets = snapshot.capture_targets();
        targets.extend(probe::targets());
        if set.as_ref() == Some(&targets) {
            return Ok(());
        }
        let wanted = targets.clone();
        match on_kernel(&self.tools.kernel, move |kernel| {
            kernel.set_targets(&wanted)
        })
        .await
        {
            Ok(()) => {
                *set = Some(targets);
                *self.target_error.lock() = None;
                Ok(())
            }
            Err(error) => {
                let error = error_chain(&error);
                tracing::error!(error, "cannot set the captured destinations");
                *set = None;
                *self.target_error.lock() = Some(error);
                Err(())
            }
        }
    }

    fn want_pods(&self, snapshot: &Snapshot) {
        let wanted = wanted(&self.node, snapshot);
        for (slot, desired) in self.registry.want(&wanted, snapshot.config().drain_timeout) {
            let task = PodTask {
                tools: self.tools.clone(),
                registry: self.registry.clone(),
                slot,
                desired,
                stop: self.stop_pods.clone(),
                half_laid: None,
            };
            self.tasks.spawn(task.run());
        }
    }

    /// Removes pods that a former agent enrolled and nobody wants. Returns when to look again.
    async fn sweep(&self, snapshot: &Snapshot) -> Duration {
        if !self.registry.synced() || !self.tools.shelf.is_alone() {
            return FIRST_SWEEP;
        }
        self.clear_former_layouts().await;
        if self.registry.keeps_leftovers() {
            return SWEEP;
        }
        match leftovers(&self.tools, &self.registry, &expected(&self.node, snapshot)).await {
            Ok(records) if records.is_empty() => {}
            Ok(records) => {
                let paths = netns_paths(&self.node, snapshot);
                remove(&self.tools, &self.registry, &records, &paths).await;
            }
            Err(error) => {
                let error = error_chain(&error);
                tracing::warn!(error, "cannot look for leftovers");
            }
        }
        SWEEP
    }
}

impl Reconciler {
    /// Programs of an agent with another layout did what their failure mode says until the pods
    /// were enrolled anew; from now on they would only be in the way.
    async fn clear_former_layouts(&self) {
        match on_kernel(&self.tools.kernel, |kernel| kernel.clear_former_layouts()).await {
            Ok(cleared) => {
                for directory in cleared {
                    tracing::info!(pins = %directory.display(), "removed a former agent's programs");
                }
            }
            Err(error) => {
                let error = error_chain(&error);
                tracing::warn!(error, "cannot remove a former agent's programs");
            }
        }
    }
}

/// Status of pods that the model itself keeps out.
pub(super) fn kept_out(node: &str, snapshot: &Snapshot) -> Vec<PodStatus> {
    snapshot
        .workloads_on(node)
        .filter_map(|workload| match &workload.membership {
            Membership::Refused(reason) => Some(PodStatus::refused(workload, reason)),
            Membership::Meshed(_) if workload.sandbox.is_none() => Some(PodStatus {
                phase: Phase::Failed,
                last_error: Some("the pod's network namespace is not known".to_owned()),
                ..PodStatus::pending(workload)
            }),
            Membership::Meshed(_) | Membership::Outside => None,
        })
        .collect()
}

fn wanted(node: &str, snapshot: &Snapshot) -> BTreeMap<WorkloadUid, (Arc<Workload>, Desired)> {
    snapshot
        .workloads_on(node)
        .filter(|workload| workload.sandbox.is_some())
        .filter_map(|workload| {
            let desired = Desired::Enrolled(workload.clone(), workload.mode()?);
            Some((workload.uid.clone(), (workload.clone(), desired)))
        })
        .collect()
}

/// Addresses of the pods that should be in the mesh: what the kernel holds for one of them is left
/// alone even while its namespace cannot be opened.
fn expected(node: &str, snapshot: &Snapshot) -> Vec<PodAddresses> {
    snapshot
        .workloads_on(node)
        .filter(|workload| workload.is_meshed() && workload.sandbox.is_some())
        .map(|workload| workload.addresses.iter().copied().collect())
        .collect()
}

fn netns_paths(node: &str, snapshot: &Snapshot) -> Vec<PathBuf> {
    snapshot
        .workloads_on(node)
        .filter_map(|workload| Some(workload.sandbox.as_ref()?.netns.clone()))
        .collect()
}

/// What the kernel holds and nobody holds or expects.
pub(super) async fn leftovers(
    tools: &Tools,
    registry: &Registry,
    expected: &[PodAddresses],
) -> Result<Vec<PodRecord>, EnrolError> {
    let (mut records, lookups) = on_kernel(&tools.kernel, |kernel| {
        Ok((kernel.pods()?, kernel.lookups()))
    })
    .await?;
    // An agent that died while a pod left may have left the program alone.
    for netns_cookie in lookups {
        if !records
            .iter()
            .any(|record| record.netns_cookie == netns_cookie)
        {
            records.push(PodRecord {
                netns_cookie,
                v4: None,
                v6: None,
                mode: Mode::default(),
            });
        }
    }
    records.retain(|record| !registry.is_claimed(record.netns_cookie) && !is_of(record, expected));
    Ok(records)
}

fn is_of(record: &PodRecord, expected: &[PodAddresses]) -> bool {
    expected.iter().any(|pod| {
        (record.v4.is_some() && record.v4 == pod.v4) || (record.v6.is_some() && record.v6 == pod.v6)
    })
}

/// Takes leftovers away: from their namespaces where those can be found, from the kernel in any
/// case.
pub(super) async fn remove(
    tools: &Tools,
    registry: &Arc<Registry>,
    records: &[PodRecord],
    paths: &[PathBuf],
) {
    let nobody = WorkloadUid("what a former agent left".into());
    let claims: Vec<_> = records
        .iter()
        .filter_map(|record| {
            let claim = registry.claim(record.netns_cookie, &nobody).ok()?;
            Some((record.netns_cookie, claim))
        })
        .collect();
    let cookies: Vec<u64> = claims.iter().map(|(cookie, _)| *cookie).collect();
    let mut found: Vec<Netns> = Vec::new();
    for path in paths {
        if let Ok(netns) = Netns::open(path, &tools.worker).await
            && cookies.contains(&netns.cookie())
        {
            found.push(netns);
        }
    }
    if found.len() < cookies.len() {
        found.extend(netns::find(&cookies, &tools.worker).await);
    }
    for cookie in cookies {
        let result = match found.iter().find(|netns| netns.cookie() == cookie) {
            Some(netns) => enrol::unlay(tools, netns).await,
            None => enrol::forget(tools, cookie).await,
        };
        tools.counters.count(Event::LeftoverRemoved);
        match result {
            Ok(()) => tracing::info!(netns_cookie = cookie, "removed what a former agent left"),
            Err(error) => {
                let error = error_chain(&error);
                tracing::warn!(
                    netns_cookie = cookie,
                    error,
                    "cannot remove all that is left"
                );
            }
        }
    }
}
