//! Fair shares of the workers' time between the pods of the node.
//!
//! All connections of all pods run on the same few threads, whose queues are first come, first served: a pod with a
//! thousand busy connections would get a thousand turns for each of its neighbour's. So every task belongs to a pod,
//! and pods take turns: deficit round robin (Shreedhar and Varghese, 1996), with what a turn costs measured in time on
//! the worker, since that is what bytes, requests, accepts and handshakes all cost.
//!
//! While one pod alone is busy nothing is measured and nobody waits. A pod that has used up its quantum while others
//! are busy too has its tasks parked; its turnstile goes once through the runtime's queue, behind whatever of the
//! others is ready, and lets as many go on as the next quantum will bear. So a neighbour waits for one quantum of each
//! busy pod at most, and no time is left unused.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pin_project_lite::pin_project;
use tokio_util::sync::CancellationToken;

/// What a pod may use of the workers before others have their turn.
const QUANTUM: Duration = Duration::from_micros(500);

/// Pods count as busy at the same time when they take turns within this.
const CONTENTION: Duration = Duration::from_millis(20);

/// Work of a pod that waits for longer than this, and never for less in a whole [`OVERDUE_FOR`], is more than the pod's
/// share can carry (the rule of CoDel, RFC 8289, with bounds of a request's scale). New requests are shed then.
const OVERDUE_AFTER: Duration = Duration::from_millis(250);

/// See [`OVERDUE_AFTER`].
const OVERDUE_FOR: Duration = Duration::from_secs(1);

/// No pod has this number.
const NOBODY: u64 = u64::MAX;

/// Tells the time that turns are measured by.
pub trait Clock: Send + Sync + 'static {
    /// Since some moment in the past.
    fn now(&self) -> Duration;
}

/// The monotonic clock of the machine.
#[derive(Debug)]
pub struct Monotonic(Instant);

impl Default for Monotonic {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for Monotonic {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// The shares of all pods.
#[derive(Debug)]
pub struct Fairness<C = Monotonic> {
    clock: C,
    shares: Mutex<HashMap<u64, Weak<Share<C>>>>,
    /// Whose task ran last.
    last: AtomicU64,
    /// Whether tasks of different pods ran since the last look.
    switched: AtomicBool,
    /// Whether pods have to take turns.
    contended: AtomicBool,
    parked: AtomicU64,
}

impl<C: Clock> Fairness<C> {
    /// Starts to watch over the shares, until `stop`.
    pub fn start(clock: C, stop: CancellationToken) -> Arc<Self> {
        let fairness = Arc::new(Self {
            clock,
            shares: Mutex::default(),
            last: AtomicU64::new(NOBODY),
            switched: AtomicBool::new(false),
            contended: AtomicBool::new(false),
            parked: AtomicU64::new(0),
        });
        let watched = Arc::downgrade(&fairness);
        tokio::spawn(async move {
            let watch = async {
                loop {
                    tokio::time::sleep(CONTENTION).await;
                    let Some(fairness) = watched.upgrade() else {
                        return;
                    };
                    fairness.look();
                }
            };
            tokio::select! {
                () = watch => {}
                () = stop.cancelled() => {}
            }
        });
        fairness
    }

    /// Runs `task` as one of the pod with this number (its netns cookie).
    pub fn turns<F>(self: &Arc<Self>, pod: u64, task: F) -> Turns<F, C> {
        Turns {
            share: self.share(pod),
            task,
            parked: None,
        }
    }

    /// Whether all of this pod's work has been waiting for too long.
    pub fn is_overdue(&self, pod: u64) -> bool {
        if !self.contended.load(Ordering::Relaxed) {
            return false;
        }
        let share = self.shares.lock().get(&pod).and_then(Weak::upgrade);
        share.is_some_and(|share| {
            let late_since = share.state.lock().late_since;
            late_since.is_some_and(|since| self.clock.now().saturating_sub(since) >= OVERDUE_FOR)
        })
    }

    /// How often a task had to wait for its pod's next turn.
    pub fn parked(&self) -> u64 {
        self.parked.load(Ordering::Relaxed)
    }

    /// The share of a pod lives as long as a task of it.
    fn share(self: &Arc<Self>, pod: u64) -> Arc<Share<C>> {
        let mut shares = self.shares.lock();
        if let Some(share) = shares.get(&pod).and_then(Weak::upgrade) {
            return share;
        }
        shares.retain(|_, share| share.strong_count() > 0);
        let share = Arc::new(Share {
            pod,
            all: self.clone(),
            state: Mutex::default(),
        });
        shares.insert(pod, Arc::downgrade(&share));
        share
    }

    fn look(&self) {
        let switched = self.switched.swap(false, Ordering::Relaxed);
        self.contended.store(switched, Ordering::Relaxed);
    }

    /// A task of `pod` is about to run. Whether pods have to take turns.
    fn enter(&self, pod: u64) -> bool {
        if self.last.load(Ordering::Relaxed) != pod {
            let before = self.last.swap(pod, Ordering::Relaxed);
            if before != NOBODY && !self.switched.load(Ordering::Relaxed) {
                self.switched.store(true, Ordering::Relaxed);
                self.contended.store(true, Ordering::Relaxed);
            }
        }
        self.contended.load(Ordering::Relaxed)
    }
}

/// The share of one pod.
#[derive(Debug)]
struct Share<C> {
    pod: u64,
    all: Arc<Fairness<C>>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What the pod has used of its quantum.
    used: Duration,
    /// What one turn of a task takes, smoothed.
    usual: Duration,
    /// Tasks that wait for the pod's next quantum, at most as many as the pod has. One that ended meanwhile is woken
    /// in vain.
    parked: VecDeque<Waker>,
    turnstile: Turnstile,
    /// Since when every task that was parked waited for longer than [`OVERDUE_AFTER`].
    late_since: Option<Duration>,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Turnstile {
    #[default]
    Still,
    Turning,
}

impl<C: Clock> Share<C> {
    /// Whether the task may run now; else it is parked.
    fn admit(self: &Arc<Self>, waker: &Waker) -> bool {
        let mut state = self.state.lock();
        if state.used < QUANTUM {
            if state.parked.is_empty() {
                state.late_since = None;
            }
            return true;
        }
        self.all.parked.fetch_add(1, Ordering::Relaxed);
        state.parked.push_back(waker.clone());
        self.turn(&mut state);
        false
    }

    /// A task waited from `parked` to `now`.
    fn waited(&self, parked: Duration, now: Duration) {
        let mut state = self.state.lock();
        if now.saturating_sub(parked) < OVERDUE_AFTER {
            state.late_since = None;
        } else {
            state.late_since.get_or_insert(now);
        }
    }

    fn charge(self: &Arc<Self>, took: Duration) {
        let mut state = self.state.lock();
        state.used += took;
        state.usual = (state.usual * 7 + took) / 8;
        if state.used >= QUANTUM / 2 {
            self.turn(&mut state);
        }
    }

    /// Sets the turnstile in motion.
    fn turn(self: &Arc<Self>, state: &mut State) {
        if state.turnstile == Turnstile::Still {
            state.turnstile = Turnstile::Turning;
            tokio::spawn(self.clone().rounds());
        }
    }

    /// Gives the pod a quantum in every round, for as long as it has use for it.
    async fn rounds(self: Arc<Self>) {
        loop {
            // Behind everything of the others that is ready now, sockets included.
            tokio::task::yield_now().await;
            let released: Vec<Waker> = {
                let mut state = self.state.lock();
                state.used = state.used.saturating_sub(QUANTUM);
                if state.parked.is_empty() && state.used.is_zero() {
                    state.turnstile = Turnstile::Still;
                    return;
                }
                let left = QUANTUM.saturating_sub(state.used);
                let tasks = left.as_nanos() / state.usual.as_nanos().max(1);
                let tasks = usize::try_from(tasks).unwrap_or(usize::MAX);
                let tasks = tasks.max(usize::from(!left.is_zero()));
                let tasks = tasks.min(state.parked.len());
                state.parked.drain(..tasks).collect()
            };
            released.into_iter().for_each(Waker::wake);
        }
    }
}

pin_project! {
    /// A task that takes its turns with those of other pods.
    pub struct Turns<F, C = Monotonic> {
        share: Arc<Share<C>>,
        #[pin]
        task: F,
        // When it was parked, if it has not run since.
        parked: Option<Duration>,
    }
}

impl<F: Future, C: Clock> Future for Turns<F, C> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let all = &this.share.all;
        let parked = this.parked.take();
        if !all.enter(this.share.pod) {
            return this.task.poll(cx);
        }
        // Who has waited goes: its pod's quantum was counted out for it.
        if parked.is_none() && !this.share.admit(cx.waker()) {
            *this.parked = Some(all.clock.now());
            return Poll::Pending;
        }
        let start = all.clock.now();
        if let Some(parked) = parked {
            this.share.waited(parked, start);
        }
        let outcome = this.task.poll(cx);
        this.share.charge(all.clock.now().saturating_sub(start));
        outcome
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// Advanced by the tasks themselves, by what they cost.
    #[derive(Clone, Default)]
    struct Simulated(Arc<AtomicU64>);

    impl Clock for Simulated {
        fn now(&self) -> Duration {
            Duration::from_micros(self.0.load(Ordering::Relaxed))
        }
    }

    #[derive(Clone, Default)]
    struct Work {
        clock: Simulated,
        turns: Arc<AtomicUsize>,
    }

    impl Work {
        /// Busy for ever: each turn takes so long.
        fn endless(&self, micros: u64) -> Pin<Box<dyn Future<Output = ()> + Send>> {
            let work = self.clone();
            Box::pin(async move {
                loop {
                    work.clock.0.fetch_add(micros, Ordering::Relaxed);
                    work.turns.fetch_add(1, Ordering::Relaxed);
                    tokio::task::yield_now().await;
                }
            })
        }

        fn time(&self, micros: usize) -> usize {
            self.turns.load(Ordering::Relaxed) * micros
        }
    }

    /// A clock, and the work of so many pods by it.
    fn stage<const PODS: usize>() -> (Simulated, Arc<Fairness<Simulated>>, [Work; PODS]) {
        let clock = Simulated::default();
        let fairness = Fairness::start(clock.clone(), CancellationToken::new());
        let work = std::array::from_fn(|_| Work {
            clock: clock.clone(),
            ..Work::default()
        });
        (clock, fairness, work)
    }

    async fn let_run(clock: &Simulated, for_micros: u64) {
        let end = clock.0.load(Ordering::Relaxed) + for_micros;
        while clock.0.load(Ordering::Relaxed) < end {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_pod_with_many_tasks_gets_no_more_time_than_one_with_few() {
        let (clock, fairness, [flooder, neighbour]) = stage();
        for _ in 0..500 {
            tokio::spawn(fairness.turns(1, flooder.endless(20)));
        }
        for _ in 0..100 {
            tokio::spawn(fairness.turns(2, neighbour.endless(20)));
        }
        let_run(&clock, 2_000_000).await;
        let (much, little) = (flooder.time(20), neighbour.time(20));
        assert!(much > 800_000 && little > 800_000, "{much} and {little} µs");
        assert!(fairness.parked() > 0);
    }

    #[tokio::test]
    async fn a_neighbour_waits_for_a_quantum_and_not_for_every_task_of_a_flood() {
        let (clock, fairness, [work]) = stage();
        for _ in 0..2_000 {
            tokio::spawn(fairness.turns(1, work.endless(20)));
        }
        let longest = Arc::new(AtomicU64::new(0));
        let (seen, watch) = (longest.clone(), clock.clone());
        let request = Box::pin(async move {
            for round in 0..200 {
                let before = watch.0.load(Ordering::Relaxed);
                tokio::task::yield_now().await;
                let waited = watch.0.load(Ordering::Relaxed) - before;
                // The first rounds find the flood's tasks in the queue already.
                if round > 2 {
                    seen.fetch_max(waited, Ordering::Relaxed);
                }
            }
        });
        tokio::spawn(fairness.turns(2, request)).await.unwrap();
        let longest = longest.load(Ordering::Relaxed);
        assert!(longest <= 2 * 500 + 20, "waited {longest} µs");
    }

    #[tokio::test]
    async fn a_pod_that_asks_for_far_more_than_its_share_is_overdue_and_its_neighbour_is_not() {
        let (clock, fairness, [flooder, neighbour]) = stage();
        let flood: Vec<_> = (0..3_000)
            .map(|_| tokio::spawn(fairness.turns(1, flooder.endless(200))))
            .collect();
        let _one = tokio::spawn(fairness.turns(2, neighbour.endless(20)));
        let_run(&clock, 6_000_000).await;
        assert!(fairness.is_overdue(1));
        assert!(!fairness.is_overdue(2) && !fairness.is_overdue(3));
        for task in &flood[10..] {
            task.abort();
        }
        let_run(&clock, 2_000_000).await;
        assert!(!fairness.is_overdue(1));
    }

    #[tokio::test]
    async fn a_pod_that_is_alone_never_waits() {
        let (clock, fairness, [work]) = stage();
        for _ in 0..100 {
            tokio::spawn(fairness.turns(1, work.endless(100)));
        }
        let_run(&clock, 1_000_000).await;
        assert_eq!(fairness.parked(), 0);
    }

    #[tokio::test]
    async fn tasks_that_were_parked_go_on_when_their_neighbour_has_ended() {
        let (clock, fairness, [work]) = stage();
        let flood: Vec<_> = (0..50)
            .map(|_| tokio::spawn(fairness.turns(1, work.endless(100))))
            .collect();
        let other = tokio::spawn(fairness.turns(2, work.endless(1)));
        let_run(&clock, 100_000).await;
        assert!(fairness.parked() > 0);
        other.abort();
        // One that ended while it was parked is woken in vain, and holds nobody up.
        flood[0].abort();
        let before = work.turns.load(Ordering::Relaxed);
        let_run(&clock, 1_000_000).await;
        assert!(work.turns.load(Ordering::Relaxed) >= before + 9_000);
    }
}
