//! The certificates of this node: one per identity that runs here, always fresh.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use serde::Serialize;
use thiserror::Error;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};
use tokio_util::sync::CancellationToken;

use super::certificate::WorkloadCertificate;
use super::rotation::{Plan, RotationPolicy};
use super::tls::Roots;
use crate::mesh::SpiffeId;

/// Most identities that one node may hold; a kubelet runs some hundred pods.
const MAX_IDENTITIES: usize = 4096;
/// Longest time between two looks at the wall clock, which may jump (suspend, NTP).
const MAX_SLEEP: Duration = Duration::from_secs(15);

/// What an issuer does, in a future that must end by itself.
pub type Issuing<'a, T> = Pin<Box<dyn Future<Output = Result<T, IssueError>> + Send + 'a>>;

/// Where certificates come from.
pub trait Issuer: Send + Sync + 'static {
    /// A certificate for a new key.
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> Issuing<'a, WorkloadCertificate>;
    /// The roots that are trusted now.
    fn roots(&self) -> Issuing<'_, Roots>;
}

/// Why no certificate was issued, as one line without secrets.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct IssueError(pub String);

impl IssueError {
    pub(super) fn new(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}

/// Tells the time of the wall clock.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// Settings of the store.
#[derive(Clone)]
pub struct CertificatesOptions {
    /// Where certificates come from.
    pub issuer: Arc<dyn Issuer>,
    /// When they are renewed.
    pub rotation: RotationPolicy,
    /// Most requests under way at once; the others wait their turn. Default 4.
    pub concurrency: usize,
    /// How often the roots are looked at; a change is in force at once, for certificates that
    /// are held too. Default 10 s.
    pub roots_interval: Duration,
    /// The wall clock.
    pub clock: Clock,
}

impl CertificatesOptions {
    /// The defaults, with this issuer.
    #[must_use]
    pub fn new(issuer: Arc<dyn Issuer>) -> Self {
        Self {
            issuer,
            rotation: RotationPolicy::default(),
            concurrency: 4,
            roots_interval: Duration::from_secs(10),
            clock: Arc::new(SystemTime::now),
        }
    }
}

/// Why there is no certificate to use. None of these may lead to plaintext.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CertificateError {
    /// The identity does not run on this node (or the node holds 4096 already).
    #[error("{0} does not run on this node")]
    NotWanted(SpiffeId),
    /// The CA has not issued one yet.
    #[error("no certificate for {id} yet{}", because(last_error.as_deref()))]
    NotYetIssued {
        /// Whose.
        id: SpiffeId,
        /// Why the last attempt failed, if one did.
        last_error: Option<String>,
    },
    /// It ended, and the CA did not renew it.
    #[error("the certificate of {id} has expired{}", because(last_error.as_deref()))]
    Expired {
        /// Whose.
        id: SpiffeId,
        /// When it ended.
        since: SystemTime,
        /// Why the last attempt to renew it failed, if one did.
        last_error: Option<String>,
    },
}

fn because(error: Option<&str>) -> String {
    error.map(|error| format!(": {error}")).unwrap_or_default()
}

/// What a certificate is good for at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CertificateState {
    /// Not issued yet.
    Pending,
    /// In use.
    Valid,
    /// Ended; connections are refused.
    Expired,
}

/// One line of `/certificates`.
#[derive(Debug, Clone, Serialize)]
pub struct CertificateStatus {
    /// The identity.
    pub id: SpiffeId,
    /// What it is good for.
    pub state: CertificateState,
    /// Serial number, lower-case hexadecimal.
    pub serial: Option<String>,
    /// Start of validity (RFC 3339).
    #[serde(with = "time::serde::rfc3339::option")]
    pub not_before: Option<OffsetDateTime>,
    /// End of validity (RFC 3339).
    #[serde(with = "time::serde::rfc3339::option")]
    pub not_after: Option<OffsetDateTime>,
    /// When the CA is asked next (RFC 3339); none while a request is under way.
    #[serde(with = "time::serde::rfc3339::option")]
    pub next_rotation: Option<OffsetDateTime>,
    /// Why the last attempt failed, if it did.
    pub last_error: Option<String>,
}

/// The certificates of this node. Reading takes no lock.
pub struct Certificates {
    options: CertificatesOptions,
    entries: Mutex<BTreeMap<SpiffeId, Entry>>,
    published: ArcSwap<HashMap<SpiffeId, Published>>,
    changed: watch::Sender<()>,
    counters: Counters,
}

struct Entry {
    plan: Plan,
    certificate: Option<Arc<WorkloadCertificate>>,
}

#[derive(Clone)]
struct Published {
    certificate: Option<Arc<WorkloadCertificate>>,
    last_error: Option<String>,
}

#[derive(Default)]
struct Counters {
    issued: AtomicU64,
    failed: AtomicU64,
    roots_changed: AtomicU64,
    roots_failed: AtomicU64,
    over_bound: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Certificates {
    /// An empty store; [`Self::run`] fills it.
    #[must_use]
    pub fn new(options: CertificatesOptions) -> Arc<Self> {
        Arc::new(Self {
            options,
            entries: Mutex::default(),
            published: ArcSwap::default(),
            changed: watch::Sender::new(()),
            counters: Counters::default(),
        })
    }

    /// The identities that run on this node from now on. New ones are asked for at once, others
    /// are forgotten with their keys (connections that run on them are not touched).
    pub fn want(&self, identities: BTreeSet<SpiffeId>) {
        let now = (self.options.clock)();
        let mut entries = self.entries.lock();
        entries.retain(|id, _| identities.contains(id));
        for id in identities {
            if entries.len() >= MAX_IDENTITIES && !entries.contains_key(&id) {
                count(&self.counters.over_bound);
                tracing::error!(identity = %id, "this node holds {MAX_IDENTITIES} identities, no more");
                continue;
            }
            entries.entry(id).or_insert_with(|| Entry {
                plan: Plan::new(now),
                certificate: None,
            });
        }
        self.publish(&entries);
    }

    /// The certificate to use now. Never one that has ended.
    pub fn current(&self, id: &SpiffeId) -> Result<Arc<WorkloadCertificate>, CertificateError> {
        let published = self.published.load();
        let entry = published
            .get(id)
            .ok_or_else(|| CertificateError::NotWanted(id.clone()))?;
        match &entry.certificate {
            None => Err(CertificateError::NotYetIssued {
                id: id.clone(),
                last_error: entry.last_error.clone(),
            }),
            Some(certificate) if (self.options.clock)() >= certificate.not_after => {
                Err(CertificateError::Expired {
                    id: id.clone(),
                    since: certificate.not_after,
                    last_error: entry.last_error.clone(),
                })
            }
            Some(certificate) => Ok(certificate.clone()),
        }
    }

    /// As [`Self::current`], but waits up to `limit` while the CA has not issued one. An identity
    /// that is not wanted is not waited for.
    pub async fn ready(
        &self,
        id: &SpiffeId,
        limit: Duration,
    ) -> Result<Arc<WorkloadCertificate>, CertificateError> {
        let deadline = Instant::now() + limit;
        let mut changed = self.changed.subscribe();
        loop {
            changed.mark_unchanged();
            let current = self.current(id);
            if matches!(current, Ok(_) | Err(CertificateError::NotWanted(_))) {
                return current;
            }
            // The sender lives in self, so the channel cannot be closed here.
            if timeout_at(deadline, changed.changed()).await.is_err() {
                return current;
            }
        }
    }

    /// Every identity with its certificate, in order.
    #[must_use]
    pub fn status(&self) -> Vec<CertificateStatus> {
        let now = (self.options.clock)();
        let entries = self.entries.lock();
        let lines = entries.iter().map(|(id, entry)| {
            let certificate = entry.certificate.as_ref();
            CertificateStatus {
                id: id.clone(),
                state: match certificate {
                    None => CertificateState::Pending,
                    Some(certificate) if now >= certificate.not_after => CertificateState::Expired,
                    Some(_) => CertificateState::Valid,
                },
                serial: certificate.map(|certificate| certificate.serial.clone()),
                not_before: certificate.map(|certificate| certificate.not_before.into()),
                not_after: certificate.map(|certificate| certificate.not_after.into()),
                next_rotation: entry.plan.due().map(Into::into),
                last_error: entry.plan.last_error().map(str::to_owned),
            }
        });
        lines.collect()
    }

    /// Counters by name, for metrics.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("certificates_issued", read(&self.counters.issued)),
            ("certificate_requests_failed", read(&self.counters.failed)),
            (
                "certificate_roots_changed",
                read(&self.counters.roots_changed),
            ),
            (
                "certificate_roots_failed",
                read(&self.counters.roots_failed),
            ),
            (
                "certificate_identities_over_bound",
                read(&self.counters.over_bound),
            ),
        ]
    }

    /// Asks for and renews certificates until `stop`. Requests under way are then abandoned.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut changed = self.changed.subscribe();
        let mut look_at_roots = interval(self.options.roots_interval);
        look_at_roots.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut under_way = UnderWay::default();
        loop {
            changed.mark_unchanged();
            let pause = self.start_due(&mut under_way);
            tokio::select! {
                () = stop.cancelled() => return,
                Some((id, outcome)) = under_way.finished() => self.finish(&id, outcome),
                _ = look_at_roots.tick() => self.refresh_roots().await,
                _ = changed.changed() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Starts what is due, as far as the bound allows, and tells how long nothing else will be.
    fn start_due(&self, under_way: &mut UnderWay) -> Duration {
        let now = (self.options.clock)();
        let mut entries = self.entries.lock();
        let mut pause = MAX_SLEEP;
        for (id, entry) in entries.iter_mut() {
            // The clock was set back to before its start: peers refuse it. Failures keep their
            // pauses.
            let early = |held: &Arc<WorkloadCertificate>| now < held.not_before;
            if entry.certificate.as_ref().is_some_and(early) && entry.plan.last_error().is_none() {
                entry.plan.hurry(now);
            }
            let Some(due) = entry.plan.due() else {
                continue;
            };
            match due.duration_since(now) {
                Ok(later) if !later.is_zero() => pause = pause.min(later),
                _ if under_way.len() < self.options.concurrency.max(1) => {
                    entry.plan.started();
                    under_way.start(id.clone(), self.options.issuer.clone());
                }
                // At the bound: the next one that finishes wakes us.
                _ => {}
            }
        }
        pause
    }

    fn finish(&self, id: &SpiffeId, outcome: Result<WorkloadCertificate, IssueError>) {
        let now = (self.options.clock)();
        let policy = &self.options.rotation;
        let mut entries = self.entries.lock();
        let Some(entry) = entries.get_mut(id) else {
            return; // not wanted any more: the key is dropped here
        };
        match outcome {
            Ok(certificate) => {
                count(&self.counters.issued);
                tracing::info!(identity = %id, serial = certificate.serial, "certificate issued");
                let chance = rand::random();
                entry
                    .plan
                    .issued(policy, now, certificate.not_after, chance);
                entry.certificate = Some(Arc::new(certificate));
            }
            Err(error) => {
                count(&self.counters.failed);
                tracing::warn!(identity = %id, %error, "no certificate issued");
                entry
                    .plan
                    .failed(policy, now, error.to_string(), rand::random());
            }
        }
        self.publish(&entries);
    }

    /// Puts changed roots in force, for certificates too that were under way when they changed.
    /// What cannot be verified with them is asked for anew and stays as it is until then.
    async fn refresh_roots(&self) {
        let roots = match self.options.issuer.roots().await {
            Ok(roots) => roots,
            Err(error) => {
                count(&self.counters.roots_failed);
                tracing::warn!(%error, "the roots cannot be read, the last good ones stay");
                return;
            }
        };
        let now = (self.options.clock)();
        let mut entries = self.entries.lock();
        let mut replaced = 0;
        for (id, entry) in entries.iter_mut() {
            let Some(certificate) = &entry.certificate else {
                continue;
            };
            if *certificate.roots() == roots {
                continue;
            }
            match certificate.with_roots(&roots, now) {
                Ok(certificate) => {
                    replaced += 1;
                    entry.certificate = Some(Arc::new(certificate));
                }
                Err(error) => {
                    tracing::warn!(identity = %id, %error, "does not fit the new roots, asking anew");
                    entry.plan.hurry(now);
                }
            }
        }
        if replaced > 0 {
            count(&self.counters.roots_changed);
            tracing::info!(
                certificates = replaced,
                "the roots have changed and are in force"
            );
            self.publish(&entries);
        }
    }

    fn publish(&self, entries: &BTreeMap<SpiffeId, Entry>) {
        let published = entries.iter().map(|(id, entry)| {
            let published = Published {
                certificate: entry.certificate.clone(),
                last_error: entry.plan.last_error().map(str::to_owned),
            };
            (id.clone(), published)
        });
        self.published.store(Arc::new(published.collect()));
        self.changed.send_replace(());
    }
}

/// Requests under way, each known by its identity even if it panics.
#[derive(Default)]
struct UnderWay {
    tasks: JoinSet<Result<WorkloadCertificate, IssueError>>,
    ids: HashMap<Id, SpiffeId>,
}

impl UnderWay {
    fn len(&self) -> usize {
        self.tasks.len()
    }

    fn start(&mut self, id: SpiffeId, issuer: Arc<dyn Issuer>) {
        let whose = id.clone();
        let task = self.tasks.spawn(async move { issuer.issue(&id).await });
        self.ids.insert(task.id(), whose);
    }

    /// The next that ends; none if there is none. Cancel-safe.
    async fn finished(&mut self) -> Option<(SpiffeId, Result<WorkloadCertificate, IssueError>)> {
        let (task, outcome) = match self.tasks.join_next_with_id().await? {
            Ok((task, outcome)) => (task, outcome),
            Err(error) => (error.id(), Err(ended_badly(&error))),
        };
        Some((self.ids.remove(&task)?, outcome))
    }
}

fn ended_badly(error: &JoinError) -> IssueError {
    IssueError::new(format_args!("the request ended badly: {error}"))
}

#[cfg(test)]
mod tests;
