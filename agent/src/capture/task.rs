//! One pod's way into the mesh, its stay there, and its way out. Each pod has a task of its own,
//! so that one that fails delays no other.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::accept::is_exhaustion;
use super::backoff::{Backoff, spread};
use super::counters::Event;
use super::enrol::{self, EnrolError, Enrolment, Followed, Tools};
use super::netns::{Netns, NetnsError};
use super::probe::{ProbeError, Proof};
use super::registry::{Claim, PodSlot, Registry};
use super::status::Phase;
use crate::mesh::{Mode, Workload};
use crate::telemetry::error_chain;

/// Between attempts.
const RETRY: Backoff = Backoff {
    first: Duration::from_millis(200),
    most: Duration::from_secs(30),
};
/// Between verifications of a pod that is in the mesh, spread by a fifth.
const VERIFY: Duration = Duration::from_secs(5);
/// After so many verifications in a row that found capture without effect, a PERMISSIVE pod is taken out of the mesh again:
/// its traffic matters more than the mesh. A STRICT pod stays: nothing may pass by.
const VERIFY_FAILURES: u32 = 3;
/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(15);

/// Whether a failure says that capture does not work, and not that the agent has a problem of its
/// own.
fn is_without_effect(error: &EnrolError) -> bool {
    match error {
        EnrolError::Probe(ProbeError::Lost { .. } | ProbeError::Source { .. }) => true,
        EnrolError::Probe(ProbeError::Connect { source, .. }) => !is_exhaustion(source),
        _ => false,
    }
}

/// What is wanted of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Desired {
    /// In the mesh.
    Enrolled(Arc<Workload>, Mode),
    /// Out of it; its connections have so long to end.
    Left(Duration),
}

/// The task of one pod.
pub(super) struct PodTask {
    pub tools: Arc<Tools>,
    pub registry: Arc<Registry>,
    pub slot: Arc<PodSlot>,
    pub desired: watch::Receiver<Desired>,
    /// Ends the task; what the kernel was told stays.
    pub stop: CancellationToken,
    /// Namespace of a pod whose enrolment did not come to its end: what was laid is taken away when
    /// the pod leaves, unless an attempt succeeds before.
    pub half_laid: Option<PathBuf>,
}

/// A pod that was laid, with the claim to its namespace.
struct Laid {
    enrolment: Enrolment,
    /// Whether a probe ever came out.
    proven: bool,
    _claim: Claim,
}

impl PodTask {
    /// Follows what is wanted until the pod has left or the task is stopped.
    pub async fn run(mut self) {
        let mut laid: Option<Laid> = None;
        loop {
            let desired = self.desired.borrow_and_update().clone();
            let wait = match desired {
                Desired::Left(drain) => {
                    match laid.take() {
                        Some(laid) => self.leave(laid, drain).await,
                        None => self.tidy().await,
                    }
                    if self.stop.is_cancelled() || self.registry.left(&self.slot) {
                        return;
                    }
                    continue;
                }
                Desired::Enrolled(workload, mode) => {
                    let tools = self.tools.clone();
                    tokio::select! {
                        biased;
                        () = self.stop.clone().cancelled_owned() => break,
                        wait = async {
                            // Rests while another agent takes over.
                            let _active = tools.shelf.active().await;
                            self.approach(&mut laid, &workload, mode).await
                        } => wait,
                    }
                }
            };
            self.registry.tried(&self.slot.uid);
            tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                changed = self.desired.changed() => if changed.is_err() { break },
                () = sleep(wait) => {}
            }
        }
        if let Some(mut laid) = laid {
            laid.enrolment.close().await;
        }
    }

    /// One attempt to enrol or to verify. Returns how long to wait for the next.
    async fn approach(
        &mut self,
        laid: &mut Option<Laid>,
        workload: &Arc<Workload>,
        mode: Mode,
    ) -> Duration {
        let attempt = async {
            match laid {
                Some(laid) => self.verify(laid, workload, mode).await,
                None => Ok(Followed::NeedsNewEnrolment),
            }
        };
        let result = match timeout(ATTEMPT, attempt).await {
            Ok(Ok(Followed::Yes)) => return spread(VERIFY, rand::random()),
            Ok(Ok(Followed::NeedsNewEnrolment)) => {
                if let Some(laid) = laid.take() {
                    self.leave(laid, self.registry.drain_timeout()).await;
                }
                timeout(ATTEMPT, self.enrol(laid, workload, mode)).await
            }
            Ok(Err(error)) => Ok(Err(error)),
            Err(late) => Err(late),
        };
        let error = match result {
            Ok(Ok(())) => return spread(VERIFY, rand::random()),
            Ok(Err(error)) => error,
            Err(_) => EnrolError::Late(ATTEMPT),
        };
        self.failed(laid, workload, mode, &error).await
    }

    async fn verify(
        &self,
        laid: &mut Laid,
        workload: &Arc<Workload>,
        mode: Mode,
    ) -> Result<Followed, EnrolError> {
        let enrolment = &mut laid.enrolment;
        enrolment.pod.tend();
        if !enrolment.is_there()
            || enrolment.follow(&self.tools, workload, mode).await? == Followed::NeedsNewEnrolment
        {
            return Ok(Followed::NeedsNewEnrolment);
        }
        let repaired = enrolment.repair(&self.tools).await?;
        self.show_forwarding(enrolment);
        if repaired > 0 {
            tracing::warn!(pod = %workload.name, repaired, "capture was incomplete and is repaired");
            self.slot.status.lock().repaired += repaired as u64;
        }
        let captured = enrolment.pod.captured_count();
        let rests = self.tools.counters.get(Event::AcceptBackoff);
        match enrolment.prove(&self.tools).await {
            Ok(proof) => {
                laid.proven = true;
                self.proven(&laid.enrolment, mode, proof);
                Ok(Followed::Yes)
            }
            // A pod that floods its own listener may lose the probe, but not by it get out of the
            // mesh: what came out meanwhile proves as much.
            Err(_) if laid.proven && enrolment.pod.captured_count() > captured => Ok(Followed::Yes),
            Err(_) if self.tools.counters.get(Event::AcceptBackoff) > rests => {
                Err(EnrolError::Exhausted)
            }
            Err(error) => Err(error),
        }
    }

    async fn enrol(
        &mut self,
        laid: &mut Option<Laid>,
        workload: &Arc<Workload>,
        mode: Mode,
    ) -> Result<(), EnrolError> {
        self.slot.status.lock().attempts += 1;
        let Some(sandbox) = &workload.sandbox else {
            return Err(EnrolError::Refused(
                "the pod's network namespace is not known".to_owned(),
            ));
        };
        let netns = Arc::new(Netns::open(&sandbox.netns, &self.tools.worker).await?);
        self.slot.status.lock().netns_cookie = Some(netns.cookie());
        let claim = self
            .registry
            .claim(netns.cookie(), &workload.uid)
            .map_err(|other| {
                EnrolError::Refused(format!("the pod shares its network namespace with {other}"))
            })?;
        // Noted before: an attempt that takes too long is dropped in the middle.
        self.half_laid = Some(sandbox.netns.clone());
        let enrolment = match Enrolment::lay(&self.tools, workload, mode, netns.clone()).await {
            Ok(enrolment) => enrolment,
            Err(error) => {
                // A former agent's capture may be all that a STRICT pod has, and while another
                // agent accepts for the pod, it is not taken away from that one either.
                if mode == Mode::Permissive && self.tools.shelf.is_alone() {
                    self.unlay(&netns).await;
                    self.half_laid = None;
                }
                if mode == Mode::Strict && self.tools.kernel.is_staged() {
                    enrol::shut(&self.tools, workload, mode, &netns).await?;
                }
                return Err(error);
            }
        };
        self.half_laid = None;
        let now = laid.insert(Laid {
            enrolment,
            proven: false,
            _claim: claim,
        });
        if !self.tools.shelf.is_alone() {
            // Connections are accepted here before the probe, and one of a pod beside it may lead
            // to it. The running agent has proven the same capture.
            self.slot.enrolled.store(Some(now.enrolment.pod.clone()));
        }
        self.registry.laid(&self.slot.uid);
        self.tools.shelf.alone().await;
        let proof = now.enrolment.prove(&self.tools).await?;
        now.proven = true;
        self.show_forwarding(&now.enrolment);
        self.proven(&now.enrolment, mode, proof);
        tracing::info!(pod = %workload.name, netns_cookie = netns.cookie(), "enrolled");
        Ok(())
    }

    fn show_forwarding(&self, enrolment: &Enrolment) {
        let forwards = enrolment.forwards().map(ToString::to_string);
        self.slot.status.lock().forwarded_traffic_not_enforced = forwards;
    }

    fn proven(&self, enrolment: &Enrolment, mode: Mode, proof: Vec<Proof>) {
        let mut status = self.slot.status.lock();
        status.mode = Some(mode);
        status.succeeded(proof, SystemTime::now());
        drop(status);
        self.slot.enrolled.store(Some(enrolment.pod.clone()));
    }

    async fn failed(
        &self,
        laid: &mut Option<Laid>,
        workload: &Workload,
        mode: Mode,
        error: &EnrolError,
    ) -> Duration {
        let text = error_chain(error);
        let (phase, wait) = {
            let mut status = self.slot.status.lock();
            status.failures = status.failures.saturating_add(1);
            let phase = match error {
                EnrolError::Refused(_)
                | EnrolError::Forwards(_)
                | EnrolError::Netns(NetnsError::Host) => Phase::Refused,
                _ => Phase::Failed,
            };
            let wait = RETRY.wait(status.failures, rand::random());
            status.mode = Some(mode);
            status.failed(phase, text.clone(), SystemTime::now(), wait);
            if status.failures == 1 {
                tracing::warn!(pod = %workload.name, error = text, "not enrolled");
            }
            if mode == Mode::Permissive
                && is_without_effect(error)
                && laid
                    .as_ref()
                    .is_some_and(|laid| !laid.proven || status.failures >= VERIFY_FAILURES)
            {
                (Some(phase), wait)
            } else {
                (None, wait)
            }
        };
        self.tools.counters.count(Event::EnrolmentFailed);
        if let Some(phase) = phase {
            if let Some(laid) = laid.take() {
                self.leave(laid, Duration::ZERO).await;
            }
            self.slot.status.lock().phase = phase;
        }
        wait
    }

    /// Takes away what an attempt left that failed half-way.
    async fn tidy(&mut self) {
        let Some(path) = self.half_laid.take() else {
            return;
        };
        if let Ok(netns) = Netns::open(&path, &self.tools.worker).await
            && let Ok(_claim) = self.registry.claim(netns.cookie(), &self.slot.uid)
        {
            self.unlay(&netns).await;
        }
    }

    async fn unlay(&self, netns: &Netns) {
        if let Err(error) = enrol::unlay(&self.tools, netns).await {
            let (pod, error) = (&self.slot.uid, error_chain(&error));
            tracing::warn!(%pod, error, "cannot undo an enrolment");
        }
    }

    async fn leave(&self, laid: Laid, drain: Duration) {
        let Laid {
            enrolment, _claim, ..
        } = laid;
        let pod = enrolment.pod.clone();
        self.slot.leaving.store(Some(pod.clone()));
        self.slot.status.lock().phase = Phase::Draining;
        self.slot.enrolled.store(None);
        let result = enrolment.leave(&self.tools, drain, &self.stop).await;
        pod.release();
        self.slot.leaving.store(None);
        let name = pod.workload().name.clone();
        match result {
            Ok(()) => tracing::info!(pod = %name, "left the mesh"),
            Err(error) => {
                let error = error_chain(&error);
                tracing::warn!(pod = %name, error, "left the mesh, but not all was undone");
            }
        }
        let mut status = self.slot.status.lock();
        status.phase = Phase::Pending;
        status.proof = None;
        status.forwarded_traffic_not_enforced = None;
        status.connections = 0;
        status.netns_cookie = None;
    }
}
