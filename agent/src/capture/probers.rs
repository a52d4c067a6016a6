//! Follows the cgroups that may probe: they may appear later than the agent, and a service that is
//! started again gets another.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::enrol::on_kernel;
use super::kernel::{Kernel, KernelError, ProbeCgroupState};
use crate::telemetry::error_chain;

/// How often it is looked. A few stat(2) each; kubelets take longer to come to their first probe.
const LOOK: Duration = Duration::from_secs(1);

/// The first look, before any pod is enrolled.
pub(super) fn look(kernel: &Kernel, directories: &[PathBuf]) -> Result<(), KernelError> {
    for cgroup in kernel.set_probe_cgroups(directories)? {
        let directory = cgroup.path.display();
        match cgroup.state {
            ProbeCgroupState::Known => tracing::info!(%directory, "may probe"),
            ProbeCgroupState::Absent => {
                tracing::info!(%directory, "may probe as soon as it is there");
            }
            state => tracing::warn!(%directory, ?state, "may not probe"),
        }
    }
    Ok(())
}

/// Looks again and again. Nothing to look for, nothing to do.
pub(super) async fn follow(
    kernel: Arc<Kernel>,
    directories: Vec<PathBuf>,
    stop: CancellationToken,
) {
    if directories.is_empty() {
        return;
    }
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = Vec::new();
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        let directories = directories.clone();
        let found = on_kernel(&kernel, move |kernel| {
            kernel.set_probe_cgroups(&directories)
        })
        .await;
        match found {
            Ok(found) => {
                for cgroup in found.iter().filter(|cgroup| !last.contains(*cgroup)) {
                    let (directory, id) = (cgroup.path.display(), cgroup.id);
                    tracing::debug!(%directory, ?id, state = ?cgroup.state, "probing cgroup");
                }
                last = found;
            }
            Err(error) => {
                let error = error_chain(&error);
                tracing::warn!(error, "cannot tell the kernel who may probe");
            }
        }
    }
}
