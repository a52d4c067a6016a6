//! One destination as the sources of this node share it: its endpoints, who is ejected, and the
//! retry budget.

mod attempt;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, Cache};
use rand::Rng;

pub use self::attempt::Attempt;
use super::balance::{BalanceSettings, Chooser, Set, Wish};
use super::budget::{BudgetSettings, RetryBudget, Share};
use super::ejection::{EjectionSettings, Ejector, Probe, SourceId, SourceState};
use super::endpoint::{Endpoint, Member, Target};
use super::event::EventSink;
use super::sync::{AtomicU64, Mutex, Ordering};
use super::time::Timestamp;

/// The most sources of one destination; at the limit the one that asked least recently is forgotten,
/// with what was ejected for it alone. A node runs a few hundred pods at most.
const SOURCES_MAX: usize = 1024;
/// The most endpoints that are remembered after their removal, in case they come back; at the limit
/// all are forgotten.
const DEPARTED_MAX: usize = 1024;
/// How long a removed endpoint is remembered.
const DEPARTED_FOR: Duration = Duration::from_secs(60);
/// A source that did not ask for this many windows is not there when the others are counted.
const ALONE_WINDOWS: u32 = 2;

/// Endpoints that were removed, and when.
type Departed<T> = HashMap<T, (Arc<Endpoint<T>>, Timestamp)>;

/// One destination. Shared by all workers; a pick takes no lock.
#[derive(Debug)]
pub struct Destination<T: Target> {
    name: Arc<str>,
    set: ArcSwap<Set<T>>,
    balance: BalanceSettings,
    chooser: Chooser,
    ejector: Ejector<T>,
    budget: RetryBudget,
    budget_settings: BudgetSettings,
    /// Held while the set changes, so that changes come one after the other.
    departed: Mutex<Departed<T>>,
    sources: Mutex<HashMap<SourceId, Arc<SourceState<T>>>>,
    next_comparison: AtomicU64,
}

/// How a destination is made.
#[derive(Debug)]
pub struct DestinationSettings {
    /// How it is balanced.
    pub balance: BalanceSettings,
    /// When endpoints are ejected.
    pub ejection: EjectionSettings,
    /// How many retries requests pay for.
    pub budget: BudgetSettings,
    /// Decides jitter: two agents should not have the same.
    pub seed: u64,
    /// Where ejections are told.
    pub sink: Arc<dyn EventSink>,
}

/// A source's view of a destination: where requests of one pod begin.
pub struct Source<T: Target> {
    destination: Arc<Destination<T>>,
    state: Arc<SourceState<T>>,
}

impl<T: Target> fmt::Debug for Source<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source")
            .field("destination", &self.destination.name)
            .field("id", &self.state.id())
            .finish()
    }
}

/// Whether a request may be the one that tries an ejected endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Probing {
    /// It may: should it fail, it can be sent again.
    #[default]
    Allowed,
    /// It may not: it cannot be repeated, or it is itself the probe of a breaker.
    Forbidden,
}

/// What one attempt asks for.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a, T> {
    /// Endpoints that earlier attempts of this request went to; others come first.
    pub tried: &'a [T],
    /// What consistent hashing hashes; without it there is no affinity.
    pub hash: Option<u64>,
    /// Whether this request may be a probe.
    pub probing: Probing,
}

impl<T> Default for Ask<'_, T> {
    fn default() -> Self {
        Self {
            tried: &[],
            hash: None,
            probing: Probing::Allowed,
        }
    }
}

/// The destination has no endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the destination has no endpoint")]
pub struct NoEndpoint;

impl<T: Target> Destination<T> {
    /// A destination without endpoints.
    pub fn new(name: Arc<str>, settings: DestinationSettings) -> Arc<Self> {
        Arc::new(Self {
            set: ArcSwap::from_pointee(Set::new(&settings.balance)),
            balance: settings.balance,
            chooser: Chooser::new(settings.balance),
            ejector: Ejector::new(
                Arc::clone(&name),
                settings.ejection,
                settings.seed,
                settings.sink,
            ),
            budget: RetryBudget::new(&settings.budget),
            budget_settings: settings.budget,
            departed: Mutex::new(HashMap::new()),
            sources: Mutex::new(HashMap::new()),
            next_comparison: AtomicU64::new(0),
            name,
        })
    }

    /// The view of one source. To be kept for as long as the source lives: making it takes a lock.
    pub fn source(self: &Arc<Self>, id: SourceId, now: Timestamp) -> Arc<Source<T>> {
        let mut sources = self.sources.lock();
        if !sources.contains_key(&id) && sources.len() >= SOURCES_MAX {
            let quietest = sources
                .values()
                .min_by_key(|state| state.last_seen())
                .map(|state| state.id());
            if let Some(quietest) = quietest {
                sources.remove(&quietest);
                self.ejector.forget_source(quietest);
            }
        }
        let state = sources
            .entry(id)
            .or_insert_with(|| Arc::new(SourceState::new(id, &self.budget_settings, now)));
        Arc::new(Source {
            destination: Arc::clone(self),
            state: Arc::clone(state),
        })
    }

    /// A source is gone for good.
    pub fn forget_source(&self, id: SourceId) {
        self.sources.lock().remove(&id);
        self.ejector.forget_source(id);
    }

    /// Makes these the endpoints. Those that stay keep what is known of them. Linear in the number
    /// of endpoints; [`Self::put`] and [`Self::remove`] are for single changes.
    pub fn replace(&self, members: &[Member<T>], now: Timestamp) {
        let wanted: HashMap<&T, &Member<T>> = members
            .iter()
            .map(|member| (&member.target, member))
            .collect();
        let set = self.set.load();
        let gone: Vec<T> = set
            .endpoints()
            .map(|endpoint| endpoint.target())
            .filter(|target| !wanted.contains_key(target))
            .cloned()
            .collect();
        let new: Vec<&Member<T>> = members.iter().filter(|member| !set.has(member)).collect();
        self.change(&new, &gone, now);
    }

    /// Adds an endpoint, or changes its weight or tier. O(log n), but for Maglev.
    pub fn put(&self, member: &Member<T>, now: Timestamp) {
        self.change(&[member], &[], now);
    }

    /// Takes an endpoint away. O(log n), but for Maglev.
    pub fn remove(&self, target: &T, now: Timestamp) {
        self.change(&[], std::slice::from_ref(target), now);
    }

    fn change(&self, new: &[&Member<T>], gone: &[T], now: Timestamp) {
        let mut departed = self.departed.lock();
        let mut set = Set::clone(&self.set.load());
        if departed.len() + gone.len() > DEPARTED_MAX {
            departed.clear();
        }
        for target in gone {
            if let Some(endpoint) = set.remove(target)
                && departed.len() < DEPARTED_MAX
            {
                departed.insert(target.clone(), (endpoint, now));
            }
        }
        for member in new {
            let former = departed
                .remove(&member.target)
                .filter(|(_, left)| now.since(*left) < DEPARTED_FOR);
            set.put(
                member,
                former.map(|(endpoint, _)| endpoint),
                self.ejector.settings().window,
                now,
            );
        }
        set.finish(&self.balance);
        let total = set.len();
        self.set.store(Arc::new(set));
        self.ejector.members_changed(gone, total, now);
    }

    /// The work that belongs on a timer: compares endpoints with their peers, once a window. Linear
    /// in their number.
    pub fn maintain(&self, now: Timestamp) {
        if now.as_nanos() < self.next_comparison.load(Ordering::Relaxed) {
            return;
        }
        let window = self.ejector.settings().window;
        let first = self
            .next_comparison
            .swap((now + window).as_nanos(), Ordering::Relaxed)
            == 0;
        if !first {
            let sources = |id| self.sources.lock().get(&id).cloned();
            self.ejector
                .compare_peers(self.set.load().endpoints(), sources, now);
        }
    }

    /// The name that events carry.
    pub const fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// The retry budget of requests to this destination.
    pub const fn budget(&self) -> &RetryBudget {
        &self.budget
    }

    /// Who is ejected.
    pub const fn ejector(&self) -> &Ejector<T> {
        &self.ejector
    }

    /// How many endpoints there are.
    pub fn len(&self) -> usize {
        self.set.load().len()
    }

    /// Whether there is no endpoint.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One endpoint, for status pages.
    pub fn endpoint(&self, target: &T) -> Option<Arc<Endpoint<T>>> {
        self.set.load().get(target).cloned()
    }

    /// All endpoints, for status pages. Linear.
    pub fn endpoints(&self) -> Vec<Arc<Endpoint<T>>> {
        self.set.load().endpoints().cloned().collect()
    }

    /// Whether only this source has asked lately.
    fn is_alone(&self, id: SourceId, now: Timestamp) -> bool {
        let lately = self.ejector.settings().window.saturating_mul(ALONE_WINDOWS);
        let sources = self.sources.lock();
        !sources
            .values()
            .any(|state| state.id() != id && now.since(state.last_seen()) <= lately)
    }
}

impl<T: Target> Source<T> {
    /// The destination that this is a view of.
    pub const fn destination(&self) -> &Arc<Destination<T>> {
        &self.destination
    }

    /// Who it is.
    pub fn id(&self) -> SourceId {
        self.state.id()
    }

    /// This source's part of the retry budget.
    pub fn budget(&self) -> Share<'_> {
        Share {
            own: &self.state.budget,
            whole: &self.destination.budget,
        }
    }

    /// Whether an endpoint is ejected for this source alone.
    pub fn ejects(&self, target: &T) -> bool {
        self.state.ejects(target)
    }

    /// Chooses an endpoint for an attempt that begins now, and that may outlive the caller.
    ///
    /// # Errors
    /// [`NoEndpoint`] when there is none at all.
    pub fn pick(
        self: &Arc<Self>,
        ask: &Ask<'_, T>,
        rng: &mut (impl Rng + ?Sized),
        now: Timestamp,
    ) -> Result<Attempt<T>, NoEndpoint> {
        let set = self.destination.set.load();
        let (endpoint, probe) = self.choose(&set, ask, rng, now)?;
        Ok(Attempt::begin(Arc::clone(self), endpoint, probe, now))
    }

    /// Takes this endpoint for an attempt that begins now, as a session wants it. None if it is not
    /// there any more, or ejected.
    pub fn pick_this(self: &Arc<Self>, target: &T, now: Timestamp) -> Option<Attempt<T>> {
        self.state.seen(now);
        let set = self.destination.set.load();
        let endpoint = set.get(target)?;
        if endpoint.is_ejected() || self.ejects(target) {
            return None;
        }
        Some(Attempt::begin(
            Arc::clone(self),
            Arc::clone(endpoint),
            None,
            now,
        ))
    }

    /// A worker's own way to pick, for one that picks often and sees its attempts end itself.
    pub fn worker(&self) -> Worker<'_, T> {
        Worker {
            source: self,
            set: Cache::new(&self.destination.set),
        }
    }

    fn choose(
        &self,
        set: &Set<T>,
        ask: &Ask<'_, T>,
        rng: &mut (impl Rng + ?Sized),
        now: Timestamp,
    ) -> Result<(Arc<Endpoint<T>>, Option<Probe>), NoEndpoint> {
        let destination = &*self.destination;
        self.state.seen(now);
        if ask.probing == Probing::Allowed
            && let Some((endpoint, probe)) = destination
                .ejector
                .due(&self.state, now, |target| !ask.tried.contains(target))
        {
            return Ok((endpoint, Some(probe)));
        }
        let wish = Wish {
            source: &self.state,
            tried: ask.tried,
            hash: ask.hash,
            ejected: destination.ejector.ejected(),
            panic: destination.ejector.panics(),
            now,
        };
        let chosen = destination
            .chooser
            .choose(set, &wish, rng)
            .ok_or(NoEndpoint)?;
        Ok((Arc::clone(chosen), None))
    }
}

/// One worker's view of a [`Source`]. It keeps the version of the endpoints that it read last and
/// looks only whether that is still the newest, and its attempts borrow the source: of the counts of
/// references, each a locked write, only that of the chosen endpoint is left.
///
/// A worker that does not pick keeps an old version, and the endpoints in it, alive.
pub struct Worker<'s, T: Target> {
    source: &'s Source<T>,
    set: Cache<&'s ArcSwap<Set<T>>, Arc<Set<T>>>,
}

impl<T: Target> fmt::Debug for Worker<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Worker").field(self.source).finish()
    }
}

impl<'s, T: Target> Worker<'s, T> {
    /// As [`Source::pick`].
    ///
    /// # Errors
    /// [`NoEndpoint`] when there is none at all.
    pub fn pick(
        &mut self,
        ask: &Ask<'_, T>,
        rng: &mut (impl Rng + ?Sized),
        now: Timestamp,
    ) -> Result<Attempt<T, &'s Source<T>>, NoEndpoint> {
        let (endpoint, probe) = self.source.choose(self.set.load(), ask, rng, now)?;
        Ok(Attempt::begin(self.source, endpoint, probe, now))
    }
}
