//! One endpoint, and what is known of it: load, requests in flight, health. It outlives changes of
//! the set that it belongs to, so churn forgets nothing.

use std::fmt;
use std::hash::Hash;
use std::time::Duration;

use super::balance::ewma::PeakEwma;
use super::ejection::health::Health;
use super::sync::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use super::time::Timestamp;

/// What identifies an endpoint to the caller: an address together with the workload's uid, so that
/// a reused address is a new endpoint.
pub trait Target: Clone + Eq + Hash + fmt::Debug + Send + Sync + 'static {}

impl<T: Clone + Eq + Hash + fmt::Debug + Send + Sync + 'static> Target for T {}

/// How many locality tiers there are; 0 is the nearest.
pub const TIERS: usize = 4;

/// One endpoint as discovery describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member<T> {
    /// Which one.
    pub target: T,
    /// Its share of traffic relative to others. Range 1 to 65,535; 0 counts as 1.
    pub weight: u32,
    /// Its locality tier, 0 nearest. Above 3 counts as 3.
    pub tier: u8,
}

impl<T> Member<T> {
    /// An endpoint of weight 1 in the nearest tier.
    pub const fn new(target: T) -> Self {
        Self {
            target,
            weight: 1,
            tier: 0,
        }
    }

    pub(super) fn tier_index(&self) -> usize {
        usize::from(self.tier).min(TIERS - 1)
    }
}

/// One endpoint and what has been learned of it.
///
/// What a pick reads comes first and together: at 10,000 endpoints each cache line that a pick
/// touches is a miss.
#[derive(Debug)]
#[repr(C)]
pub struct Endpoint<T> {
    pub(super) load: PeakEwma,
    under_way: UnderWay,
    weight: AtomicU32,
    /// When an attempt was last answered or ended, or the first of those that wait began.
    last_progress: AtomicU64,
    /// Slow start counts from here.
    warm_from: AtomicU64,
    ejected: AtomicBool,
    /// Attempts that began before this moment are stragglers: no verdict.
    judged_from: AtomicU64,
    target: T,
    pub(super) health: Health,
}

impl<T: Target> Endpoint<T> {
    pub(super) fn new(member: &Member<T>, window: Duration, now: Timestamp) -> Self {
        Self {
            target: member.target.clone(),
            weight: AtomicU32::new(clamp_weight(member.weight)),
            under_way: UnderWay::default(),
            ejected: AtomicBool::new(false),
            last_progress: AtomicU64::new(now.as_nanos()),
            warm_from: AtomicU64::new(now.as_nanos()),
            judged_from: AtomicU64::new(0),
            load: PeakEwma::new(now),
            health: Health::new(window),
        }
    }

    /// Which one.
    pub const fn target(&self) -> &T {
        &self.target
    }

    /// Its share of traffic relative to others.
    pub fn weight(&self) -> u32 {
        self.weight.load(Ordering::Relaxed)
    }

    /// Attempts under way to it from this node.
    pub fn in_flight(&self) -> u32 {
        self.under_way.count().0
    }

    /// Whether it is ejected for everybody.
    pub fn is_ejected(&self) -> bool {
        self.ejected.load(Ordering::Relaxed)
    }

    pub(super) fn set_weight(&self, weight: u32) {
        self.weight.store(clamp_weight(weight), Ordering::Relaxed);
    }

    pub(super) fn set_ejected(&self, ejected: bool) {
        self.ejected.store(ejected, Ordering::Relaxed);
    }

    pub(super) fn warm_from(&self) -> Timestamp {
        Timestamp::from_nanos(self.warm_from.load(Ordering::Relaxed))
    }

    /// Outcomes of attempts begun before `now` no longer count, and slow start begins.
    pub(super) fn judge_from(&self, now: Timestamp) {
        self.judged_from.store(now.as_nanos(), Ordering::Relaxed);
        self.warm_from.store(now.as_nanos(), Ordering::Relaxed);
        self.health.clear();
    }

    pub(super) fn is_straggler(&self, started: Timestamp) -> bool {
        started.as_nanos() < self.judged_from.load(Ordering::Relaxed)
    }

    pub(super) fn begin(&self, now: Timestamp) {
        if self.under_way.begin() == 0 {
            self.last_progress.store(now.as_nanos(), Ordering::Relaxed);
        }
    }

    pub(super) fn answered(&self, now: Timestamp) {
        self.under_way.answered();
        self.progressed(now);
    }

    pub(super) fn progressed(&self, now: Timestamp) {
        self.last_progress.store(now.as_nanos(), Ordering::Relaxed);
    }

    pub(super) fn end(&self, was_answered: bool) {
        self.under_way.end(was_answered);
    }

    /// What one more attempt would wait: latency times the attempts before it. An endpoint that
    /// hangs has no latency to show yet, but it has not answered for so long. Answers that are still
    /// streaming keep nobody waiting.
    pub(super) fn cost(&self, now: Timestamp) -> f64 {
        let (in_flight, waiting) = self.under_way.count();
        let mut latency = f64::from(self.load.nanos(now));
        if waiting > 0 {
            let silence = now
                .as_nanos()
                .saturating_sub(self.last_progress.load(Ordering::Relaxed));
            latency = latency.max(silence as f64);
        }
        (latency + 1.0) * f64::from(in_flight + 1) / f64::from(self.weight())
    }
}

/// Attempts under way, and in the lower half those of them that wait for the head of an answer. One
/// word, as both change with every attempt.
#[derive(Debug, Default)]
struct UnderWay(AtomicU64);

impl UnderWay {
    const ATTEMPT: u64 = 1 << 32;
    const WAITING: u64 = 1;

    /// One more; returns how many waited before.
    fn begin(&self) -> u32 {
        self.0
            .fetch_add(Self::ATTEMPT | Self::WAITING, Ordering::Relaxed) as u32
    }

    fn answered(&self) {
        self.0.fetch_sub(Self::WAITING, Ordering::Relaxed);
    }

    fn end(&self, was_answered: bool) {
        let waiting = if was_answered { 0 } else { Self::WAITING };
        self.0.fetch_sub(Self::ATTEMPT | waiting, Ordering::Relaxed);
    }

    /// All, and those that wait.
    fn count(&self) -> (u32, u32) {
        let both = self.0.load(Ordering::Relaxed);
        ((both >> 32) as u32, both as u32)
    }
}

fn clamp_weight(weight: u32) -> u32 {
    weight.clamp(1, u32::from(u16::MAX))
}
