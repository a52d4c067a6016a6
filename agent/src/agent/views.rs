//! What the admin endpoint shows of the agent's parts.

use std::sync::Arc;

use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::AgentOptions;
use crate::admin::{AdminState, Column, Condition, policies};
use crate::capture::Capture;
use crate::discovery::files::FileSource;
use crate::identity::Certificates;
use crate::mesh::SharedSnapshot;
use crate::telemetry::Telemetry;
use crate::tunnel::Pool;

pub(super) fn admin_state(
    options: &AgentOptions,
    telemetry: &Arc<Telemetry>,
    capture: &Arc<Capture>,
    certificates: &Arc<Certificates>,
    pool: &Arc<Pool>,
    manifests: &Arc<FileSource>,
    stop: &CancellationToken,
) -> AdminState {
    let (synced, targets, pods, kernel, memory) = (
        capture.clone(),
        capture.clone(),
        capture.clone(),
        capture.clone(),
        capture.clone(),
    );
    let (certificates, pool, stop) = (certificates.clone(), pool.clone(), stop.clone());
    let manifests = manifests.clone();
    AdminState::new(&options.node, telemetry.clone())
        .condition("pods_tried", move || match synced.synced() {
            true => Condition::Ready("every pod of this node was tried once".into()),
            false => Condition::NotReady("pods of this node are being enrolled".into()),
        })
        .condition("destinations_in_kernel", move || {
            match targets.target_error() {
                None => Condition::Ready("the kernel knows the mesh's destinations".into()),
                Some(error) => Condition::NotReady(error),
            }
        })
        .condition("not_stopping", move || match stop.is_cancelled() {
            false => Condition::Ready("running".into()),
            true => Condition::NotReady("the agent was told to stop".into()),
        })
        .report("manifests", move || manifests.status())
        .report("memory", move || memory.memory())
        .view("pods", POD_COLUMNS, move || pods.pods())
        .view("kernel", &[], move || KernelView {
            kernel: kernel.kernel().status(),
            events: kernel.counters().into_iter().collect(),
        })
        .view("certificates", &[], move || certificates.status())
        .view("tunnels", &[], move || pool.status())
}

/// What policies say, and which are not in force.
pub(super) fn with_policies(state: AdminState, snapshot: &SharedSnapshot) -> AdminState {
    let (shown, refusing) = (snapshot.clone(), snapshot.clone());
    state
        .report("policies_refused", move || {
            policies::refused(&refusing.load())
        })
        .view("policies", policies::POLICY_COLUMNS, move || {
            policies::rows(&shown.load())
        })
}

/// `/pods` as a table; JSON has the rest.
const POD_COLUMNS: &[Column] = &[
    column("NAME", &["name"]),
    column("MODE", &["mode"]),
    column("PHASE", &["phase"]),
    column("GUARANTEE", &["guarantee"]),
    column("CONNECTIONS", &["connections"]),
    column("PROVEN", &["proof.at"]),
    column("ATTEMPTS", &["attempts"]),
    column("FAILURES", &["failures"]),
    column("REPAIRED", &["repaired"]),
    column("NETNS_COOKIE", &["netns_cookie"]),
    column("NEXT_RETRY", &["next_retry"]),
    column("LAST_ERROR", &["last_error"]),
];

/// `/routes` as a table; JSON has the rules and all conditions.
pub(super) const ROUTE_COLUMNS: &[Column] = &[
    column("ROUTE", &["route"]),
    column("PARENT", &["parent"]),
    column("ACCEPTED", &["accepted"]),
    column("RESOLVED_REFS", &["resolved_refs"]),
    column("REASON", &["reason"]),
    column("MESSAGE", &["message"]),
    column("NOTES", &["notes"]),
];

const fn column(header: &'static str, fields: &'static [&'static str]) -> Column {
    Column { header, fields }
}

/// `/kernel`: what the kernel holds, and what the agent's side of capture counted.
#[derive(Serialize)]
struct KernelView {
    #[serde(flatten)]
    kernel: crate::capture::kernel::KernelStatus,
    events: std::collections::BTreeMap<&'static str, u64>,
}
