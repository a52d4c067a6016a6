//! From one agent of a node to the next.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::{AgentError, AgentOptions, DRAIN_CHECK};
use crate::admin::AdminListeners;
use crate::capture::Capture;
use crate::capture::kernel::ListenerSlot;
use crate::handover::{
    Committed, Endpoint, HandoverError, LIMIT, Predecessor, Taken, default_socket,
};
use crate::identity::Certificates;
use crate::mesh::{Snapshot, SpiffeId};
use crate::telemetry::Telemetry;

/// Longest wait for certificates; the running agent waits twice as long for a successor.
const CERTIFICATES: Duration = Duration::from_secs(30);
/// Longest wait for the pods' first probes before readiness is told again.
const PROBES: Duration = Duration::from_secs(5);

/// Where agents of this node meet.
pub(super) fn socket(options: &AgentOptions) -> Result<PathBuf, HandoverError> {
    if let Some(path) = &options.hand_over_socket {
        return Ok(path.clone());
    }
    default_socket(&options.pins).map_err(|source| match source.kind() {
        // Nothing was ever pinned there.
        io::ErrorKind::NotFound => HandoverError::Nobody {
            path: options.pins.clone(),
            source,
        },
        _ => source.into(),
    })
}

/// The agent that runs on this node. None is an error only if one is to be taken over.
pub(super) async fn find(options: &AgentOptions) -> Result<Option<Predecessor>, HandoverError> {
    let greeted = match socket(options) {
        Ok(path) => Predecessor::greet(&path, &options.node).await,
        Err(error) => Err(error),
    };
    match greeted {
        Ok(predecessor) => Ok(Some(predecessor)),
        Err(HandoverError::Nobody { .. }) if !options.take_over => Ok(None),
        Err(error) => Err(error),
    }
}

/// Gets certificates first, so that tunnels need not wait, and then the running agent's listeners. An
/// identity whose certificate does not come is taken over only if the running agent has none either.
pub(super) async fn prepare(
    predecessor: Predecessor,
    certificates: &Certificates,
    snapshot: &Snapshot,
    node: &str,
) -> Result<Taken, HandoverError> {
    want(certificates, snapshot, node);
    let deadline = Instant::now() + CERTIFICATES;
    let mut without = BTreeSet::new();
    let mut last = None;
    for id in identities(snapshot, node) {
        let left = deadline.saturating_duration_since(Instant::now());
        if let Err(error) = certificates.ready(&id, left).await {
            tracing::warn!(%error, "no certificate before the take-over");
            without.insert(id.to_string());
            last = Some(error);
        }
    }
    tracing::info!(
        without = without.len(),
        "taking over the running agent's listeners"
    );
    let taken = predecessor.take(without.into_iter().collect()).await;
    taken.map_err(|error| match (error, last) {
        (HandoverError::Refused(reason), Some(error)) => {
            HandoverError::Unready(format!("{reason}, and here is {error}"))
        }
        (error, _) => error,
    })
}

/// Accepts for every pod, lets the running agent stop, if there is one, and probes.
pub(super) async fn complete(
    taken: Option<Taken>,
    capture: &Capture,
    handed: &[ListenerSlot],
) -> Result<(), AgentError> {
    let late = |_| HandoverError::Unready("the pods are not laid in time".to_owned());
    match &taken {
        Some(_) => timeout(LIMIT, capture.laid()).await.map_err(late)?,
        // The kernel does what the failure mode says meanwhile, and each attempt has its own limit.
        None => capture.laid().await,
    }
    check_served(capture, handed)?;
    if capture.waits_for_replacement() {
        // Not before the running agent has stopped: its own connections are not known to other programs.
        if let Some(taken) = taken {
            taken.accepting().await?;
        }
        capture.replace_programs().await?;
        capture.accept();
        tracing::info!("replaced the programs of another layout");
    } else {
        capture.accept();
        if let Some(taken) = taken {
            taken.accepting().await?;
        }
    }
    capture.go_alone();
    tracing::info!(listeners = handed.len(), "took over");
    let probed = async {
        while !capture.synced() {
            tokio::time::sleep(DRAIN_CHECK).await;
        }
    };
    if timeout(PROBES, probed).await.is_err() {
        tracing::warn!("not every pod was probed in time");
    }
    Ok(())
}

/// A pod that the running agent serves and that is wanted here must be served here.
fn check_served(capture: &Capture, handed: &[ListenerSlot]) -> Result<(), HandoverError> {
    let served = capture.served();
    for pod in capture.pods() {
        let Some(cookie) = pod.netns_cookie else {
            continue;
        };
        let is_missing =
            |slot: &&ListenerSlot| slot.netns_cookie == cookie && !served.contains(slot);
        if let Some(slot) = handed.iter().find(is_missing) {
            let (name, why) = (&pod.name, pod.last_error.unwrap_or_default());
            let what = format!("{name}: its {:?} listener: {why}", slot.kind);
            return Err(HandoverError::Unready(what));
        }
    }
    Ok(())
}

/// Lets the successor be alone, and live connections go on for a while.
pub(super) async fn hand_over(
    committed: Committed,
    options: &AgentOptions,
    capture: &Capture,
    telemetry: &Telemetry,
    stop: &CancellationToken,
) -> Result<(), AgentError> {
    capture.shutdown().await;
    committed.released().await;
    let live = telemetry.live();
    tracing::info!(
        live,
        drain_seconds = options.hand_over_drain,
        "a successor has taken over"
    );
    let deadline = Instant::now() + Duration::from_secs(options.hand_over_drain);
    tokio::select! {
        () = drain(telemetry, deadline) => {}
        () = stop.cancelled() => {
            let sooner = Instant::now() + Duration::from_secs(options.shutdown_drain);
            drain(telemetry, deadline.min(sooner)).await;
        }
    }
    Ok(())
}

/// Returns when no connection is live, or at the deadline. Those that are left are reset when
/// their sockets are closed, never ended by a FIN.
pub(super) async fn drain(telemetry: &Telemetry, deadline: Instant) {
    let drained = async {
        while telemetry.live() > 0 {
            tokio::time::sleep(DRAIN_CHECK).await;
        }
    };
    if timeout_at(deadline, drained).await.is_err() {
        let live = telemetry.live();
        tracing::warn!(live, "stopped; what is still live is reset");
    }
}

/// Says which certificates are needed.
pub(super) fn want(certificates: &Certificates, snapshot: &Snapshot, node: &str) {
    certificates.want(identities(snapshot, node).collect());
}

fn identities<'a>(
    snapshot: &'a Snapshot,
    node: &'a str,
) -> impl Iterator<Item = SpiffeId> + use<'a> {
    snapshot
        .workloads_on(node)
        .filter(|workload| workload.is_meshed())
        .map(|workload| workload.identity.clone())
}

/// The agent's own listeners that were handed over.
pub(super) fn own_listeners(taken: &mut Taken) -> AdminListeners {
    AdminListeners {
        admin: taken.own.remove(&Endpoint::Admin),
        metrics: taken.own.remove(&Endpoint::Metrics),
        readiness: taken.own.remove(&Endpoint::Readiness),
    }
}

/// The agent's own listeners, to be handed over.
pub(super) fn endpoints(listeners: AdminListeners) -> Vec<(Endpoint, OwnedFd)> {
    [
        (Endpoint::Admin, listeners.admin),
        (Endpoint::Metrics, listeners.metrics),
        (Endpoint::Readiness, listeners.readiness),
    ]
    .into_iter()
    .filter_map(|(endpoint, socket)| Some((endpoint, socket?.into())))
    .collect()
}
