//! Fair shares of the workers' time between the pods of the node, and between those that a pod serves.
//!
//! All connections of all pods run on the same few threads, whose queues are first come, first served: a pod with a
//! thousand busy connections would get a thousand turns for each of its neighbour's. So every task belongs to a pod,
//! and pods take turns: deficit round robin (Shreedhar and Varghese, 1996), with what a turn costs measured in time on
//! the worker's processor, since that is what bytes, requests, accepts and handshakes all cost.
//!
//! What comes in to a pod was sent by others, and one of them must not starve the rest: it is paid by the pod, and
//! [shared](super::ledger) between the addresses that it comes from. The network delivers answers to those addresses,
//! so none is assumed for more than a SYN; and they are known before a handshake has proven who is there, which costs
//! more than all that follows.
//!
//! While one share alone is busy nothing is measured and nobody waits. A pod that has used up its quantum while others
//! are busy too has its tasks parked; its turnstile goes once through the runtime's queue, behind whatever of the
//! others is ready, and lets as many go on as the next quantum will bear. So a neighbour waits for one quantum of each
//! busy pod at most, and no time is left unused.

use std::collections::HashMap;
use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;
use pin_project_lite::pin_project;
use tokio_util::sync::CancellationToken;

use super::clock::Clock;
use super::current::Running;
use super::ledger::{Admission, Ledger};

/// Shares count as busy at the same time when they take turns within this. So long, because who comes first after it
/// finds all tasks of a flood in the runtime's queue before it.
const CONTENTION: Duration = Duration::from_secs(1);

/// No share has this number.
const NOBODY: u64 = u64::MAX;

/// Who pays for a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Payer {
    /// The pod of this node that the task serves: its netns cookie.
    pub pod: u64,
    /// For whom.
    pub client: Client,
}

/// Whom a pod's task serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Client {
    /// The pod itself: what it sends.
    Itself,
    /// Somebody else, who sends to the pod from this address.
    At(IpAddr),
}

/// The shares of all pods.
#[derive(Debug)]
pub struct Fairness {
    clock: Box<dyn Clock>,
    pods: Mutex<HashMap<u64, Weak<Pod>>>,
    next_share: AtomicU64,
    /// Whose task ran last.
    last: AtomicU64,
    /// Whether tasks of different shares ran since the last look.
    switched: AtomicBool,
    /// Whether shares have to take turns.
    contended: AtomicBool,
    parked: AtomicU64,
}

impl Fairness {
    /// Starts to watch over the shares, until `stop`.
    pub fn start(clock: impl Clock, stop: CancellationToken) -> Arc<Self> {
        let fairness = Arc::new(Self {
            clock: Box::new(clock),
            pods: Mutex::default(),
            next_share: AtomicU64::new(0),
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

    /// Makes `task` one that takes its turns. What it [spawns](super::spawn) has the same payer.
    pub fn turns<F>(self: &Arc<Self>, payer: Payer, task: F) -> Turns<F> {
        Turns::of(self.share(payer), task)
    }

    /// How often a task had to wait for its pod's next turn.
    pub fn parked(&self) -> u64 {
        self.parked.load(Ordering::Relaxed)
    }

    /// A share lives as long as a task of it.
    fn share(self: &Arc<Self>, payer: Payer) -> Arc<Share> {
        let pod = self.pod(payer.pod);
        let mut shares = pod.shares.lock();
        if let Some(share) = shares.get(&payer.client).and_then(Weak::upgrade) {
            return share;
        }
        let id = self.next_share.fetch_add(1, Ordering::Relaxed);
        pod.ledger.lock().open(id);
        let share = Arc::new(Share {
            id,
            client: payer.client,
            pod: pod.clone(),
        });
        shares.insert(payer.client, Arc::downgrade(&share));
        share
    }

    fn pod(self: &Arc<Self>, cookie: u64) -> Arc<Pod> {
        let mut pods = self.pods.lock();
        if let Some(pod) = pods.get(&cookie).and_then(Weak::upgrade) {
            return pod;
        }
        let pod = Arc::new(Pod {
            cookie,
            all: self.clone(),
            shares: Mutex::default(),
            ledger: Mutex::default(),
        });
        pods.insert(cookie, Arc::downgrade(&pod));
        pod
    }

    fn look(&self) {
        let switched = self.switched.swap(false, Ordering::Relaxed);
        self.contended.store(switched, Ordering::Relaxed);
    }

    /// A task of this share is about to run. Whether shares have to take turns.
    fn enter(&self, share: u64) -> bool {
        if self.last.load(Ordering::Relaxed) != share {
            let before = self.last.swap(share, Ordering::Relaxed);
            if before != NOBODY && !self.switched.load(Ordering::Relaxed) {
                self.switched.store(true, Ordering::Relaxed);
                self.contended.store(true, Ordering::Relaxed);
            }
        }
        self.contended.load(Ordering::Relaxed)
    }
}

/// A pod that has tasks.
#[derive(Debug)]
struct Pod {
    cookie: u64,
    all: Arc<Fairness>,
    shares: Mutex<HashMap<Client, Weak<Share>>>,
    ledger: Mutex<Ledger>,
}

impl Drop for Pod {
    fn drop(&mut self) {
        let mut pods = self.all.pods.lock();
        // Another may have come in its place.
        if pods
            .get(&self.cookie)
            .is_some_and(|pod| pod.strong_count() == 0)
        {
            pods.remove(&self.cookie);
        }
    }
}

/// What a pod does for one of those it serves.
#[derive(Debug)]
pub(super) struct Share {
    id: u64,
    client: Client,
    pod: Arc<Pod>,
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut shares = self.pod.shares.lock();
        if shares
            .get(&self.client)
            .is_some_and(|share| share.strong_count() == 0)
        {
            shares.remove(&self.client);
        }
        drop(shares);
        self.pod.ledger.lock().close(self.id);
    }
}

impl Share {
    /// Whether all of its work has been waiting for too long.
    pub(super) fn is_overdue(&self) -> bool {
        let all = &self.pod.all;
        all.contended.load(Ordering::Relaxed)
            && self.pod.ledger.lock().is_overdue(self.id, all.clock.now())
    }

    /// Whether the task may run now; else it is parked, under this number.
    fn admit(&self, waker: &Waker) -> Admission {
        let mut ledger = self.pod.ledger.lock();
        let admission = ledger.admit(self.id, waker);
        if admission != Admission::Runs {
            self.pod.all.parked.fetch_add(1, Ordering::Relaxed);
            self.turn(&mut ledger);
        }
        admission
    }

    /// Whether a task that was parked and woken may run now.
    fn resume(&self, ticket: u64, waker: &Waker, contended: bool) -> bool {
        let mut ledger = self.pod.ledger.lock();
        if contended && ledger.waits(self.id, ticket, waker) {
            return false;
        }
        ledger.leave(self.id, ticket);
        true
    }

    fn charge(&self, took: Duration) {
        let mut ledger = self.pod.ledger.lock();
        ledger.charge(self.id, took);
        self.turn(&mut ledger);
    }

    /// Sets the turnstile in motion, if it is time.
    fn turn(&self, ledger: &mut Ledger) {
        if ledger.turns() {
            tokio::spawn(rounds(self.pod.clone()));
        }
    }
}

/// Gives the pod a quantum in every round, for as long as it has use for it.
async fn rounds(pod: Arc<Pod>) {
    loop {
        // Behind everything of the others that is ready now, sockets included.
        tokio::task::yield_now().await;
        let Some(released) = pod.ledger.lock().round() else {
            return;
        };
        released.into_iter().for_each(Waker::wake);
    }
}

/// A task that waits for its pod's next quantum.
#[derive(Debug, Clone, Copy)]
struct Parked {
    ticket: u64,
    since: Duration,
}

pin_project! {
    /// A task that takes its turns with those of other shares.
    pub struct Turns<F> {
        // None only while it runs.
        share: Option<Arc<Share>>,
        #[pin]
        task: F,
        parked: Option<Parked>,
    }

    impl<F> PinnedDrop for Turns<F> {
        fn drop(this: Pin<&mut Self>) {
            let this = this.project();
            if let (Some(share), Some(parked)) = (this.share, this.parked) {
                share.pod.ledger.lock().leave(share.id, parked.ticket);
            }
        }
    }
}

impl<F> Turns<F> {
    pub(super) fn of(share: Arc<Share>, task: F) -> Self {
        Self {
            share: Some(share),
            task,
            parked: None,
        }
    }
}

impl<F: Future> Future for Turns<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let Some(share) = this.share.as_ref() else {
            return this.task.poll(cx);
        };
        let contended = share.pod.all.enter(share.id);
        let waited = this.parked.take();
        if let Some(parked) = waited
            && !share.resume(parked.ticket, cx.waker(), contended)
        {
            *this.parked = Some(parked);
            return Poll::Pending;
        }
        if !contended {
            let _running = Running::begin(this.share);
            return this.task.poll(cx);
        }
        let clock = &share.pod.all.clock;
        match waited {
            // Who has waited goes: its pod's quantum was counted out for it.
            Some(parked) => {
                let now = clock.now();
                let waited = now.saturating_sub(parked.since);
                share.pod.ledger.lock().waited(share.id, waited, now);
            }
            None => {
                if let Admission::Parked(ticket) = share.admit(cx.waker()) {
                    let since = clock.now();
                    *this.parked = Some(Parked { ticket, since });
                    return Poll::Pending;
                }
            }
        }
        let before = clock.used();
        let outcome = {
            let _running = Running::begin(this.share);
            this.task.poll(cx)
        };
        if let Some(share) = this.share {
            share.charge(share.pod.all.clock.used().saturating_sub(before));
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::super::current::current;
    use super::super::ledger::QUANTUM;
    use super::super::{Executor, is_overdue, spawn};
    use super::*;

    /// Advanced by the tasks themselves, by what they cost.
    #[derive(Debug, Clone, Default)]
    struct Simulated(Arc<AtomicU64>);

    impl Clock for Simulated {
        fn now(&self) -> Duration {
            Duration::from_micros(self.0.load(Ordering::Relaxed))
        }

        fn used(&self) -> Duration {
            self.now()
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

    /// What a pod does for itself.
    fn pod(pod: u64) -> Payer {
        let client = Client::Itself;
        Payer { pod, client }
    }

    /// What a pod does for the n-th of its clients.
    fn client(pod: u64, number: u8) -> Payer {
        let client = Client::At([10, 0, 0, number].into());
        Payer { pod, client }
    }

    /// A clock, and the work of so many pods by it.
    fn stage<const PODS: usize>() -> (Simulated, Arc<Fairness>, [Work; PODS]) {
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
            tokio::spawn(fairness.turns(pod(1), flooder.endless(20)));
        }
        for _ in 0..100 {
            tokio::spawn(fairness.turns(pod(2), neighbour.endless(20)));
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
            tokio::spawn(fairness.turns(pod(1), work.endless(20)));
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
        tokio::spawn(fairness.turns(pod(2), request)).await.unwrap();
        let longest = longest.load(Ordering::Relaxed);
        assert!(
            longest <= 2 * QUANTUM.as_micros() as u64 + 20,
            "waited {longest} µs"
        );
    }

    #[tokio::test]
    async fn a_pod_that_asks_for_far_more_than_its_share_is_overdue_and_its_neighbour_is_not() {
        let (clock, fairness, [flooder, neighbour]) = stage();
        let flood: Vec<_> = (0..3_000)
            .map(|_| tokio::spawn(fairness.turns(pod(1), flooder.endless(200))))
            .collect();
        let _one = tokio::spawn(fairness.turns(pod(2), neighbour.endless(20)));
        let_run(&clock, 6_000_000).await;
        assert!(fairness.share(pod(1)).is_overdue());
        assert!(!fairness.share(pod(2)).is_overdue() && !fairness.share(pod(3)).is_overdue());
        for task in &flood[10..] {
            task.abort();
        }
        let_run(&clock, 2_000_000).await;
        assert!(!fairness.share(pod(1)).is_overdue());
    }

    #[tokio::test]
    async fn a_pod_that_is_alone_never_waits() {
        let (clock, fairness, [work]) = stage();
        for _ in 0..100 {
            tokio::spawn(fairness.turns(pod(1), work.endless(100)));
        }
        let_run(&clock, 1_000_000).await;
        assert_eq!(fairness.parked(), 0);
    }

    #[tokio::test]
    async fn tasks_that_were_parked_go_on_when_their_neighbour_has_ended() {
        let (clock, fairness, [work]) = stage();
        let flood: Vec<_> = (0..50)
            .map(|_| tokio::spawn(fairness.turns(pod(1), work.endless(100))))
            .collect();
        let other = tokio::spawn(fairness.turns(pod(2), work.endless(1)));
        let_run(&clock, 100_000).await;
        assert!(fairness.parked() > 0);
        other.abort();
        // One that ended while it was parked is woken in vain, and holds nobody up.
        flood[0].abort();
        let before = work.turns.load(Ordering::Relaxed);
        let_run(&clock, 1_000_000).await;
        assert!(work.turns.load(Ordering::Relaxed) >= before + 9_000);
    }

    #[tokio::test]
    async fn what_a_task_spawns_takes_its_turns_and_so_does_what_that_spawns() {
        let (clock, fairness, [flooder, neighbour]) = stage();
        let mut tasks = Vec::new();
        for _ in 0..250 {
            let flooder = flooder.clone();
            tasks.push(tokio::spawn(fairness.turns(pod(1), async move {
                let (one, other) = (flooder.endless(20), flooder.endless(20));
                spawn(async move {
                    drop(spawn(one));
                });
                hyper::rt::Executor::execute(&Executor, other);
            })));
        }
        for _ in 0..100 {
            tokio::spawn(fairness.turns(pod(2), neighbour.endless(20)));
        }
        let_run(&clock, 1_000_000).await;
        let (much, little) = (flooder.time(20), neighbour.time(20));
        assert!(much > 400_000 && little > 400_000, "{much} and {little} µs");
    }

    #[tokio::test]
    async fn what_is_spawned_outside_of_a_share_or_after_its_turn_has_none() {
        let (_, fairness, []) = stage();
        let (first, then) = tokio::sync::oneshot::channel();
        let task = fairness.turns(pod(1), async move {
            let inside = current().is_some();
            let spawned = spawn(async { current().is_some() }).await.unwrap();
            let _ = first.send(());
            (inside, spawned)
        });
        let task = tokio::spawn(task);
        let beside = spawn(async move {
            let _ = then.await;
            current().is_some()
        });
        assert_eq!(task.await.unwrap(), (true, true));
        assert!(!beside.await.unwrap() && current().is_none());
    }

    #[tokio::test]
    async fn a_task_that_panics_leaves_the_thread_to_others() {
        let (_, fairness, []) = stage();
        let task = tokio::spawn(fairness.turns(pod(1), async { panic!("on purpose") }));
        assert!(task.await.is_err());
        assert!(current().is_none());
    }

    #[tokio::test]
    async fn a_client_of_a_pod_does_not_wait_for_the_backlog_of_another() {
        let (clock, fairness, [flood, work, neighbour]) = stage();
        for _ in 0..2_000 {
            tokio::spawn(fairness.turns(client(1, 1), flood.endless(20)));
        }
        tokio::spawn(fairness.turns(pod(2), neighbour.endless(20)));
        let_run(&clock, 100_000).await;
        let longest = Arc::new(AtomicU64::new(0));
        let (seen, watch) = (longest.clone(), clock.clone());
        let request = async move {
            for _ in 0..200 {
                let before = watch.0.load(Ordering::Relaxed);
                tokio::task::yield_now().await;
                seen.fetch_max(watch.0.load(Ordering::Relaxed) - before, Ordering::Relaxed);
                watch.0.fetch_add(20, Ordering::Relaxed);
            }
        };
        tokio::spawn(fairness.turns(client(1, 2), request))
            .await
            .unwrap();
        // Its pod's quantum may be used up, and the neighbour has one too.
        let longest = longest.load(Ordering::Relaxed);
        assert!(
            longest <= 3 * QUANTUM.as_micros() as u64,
            "waited {longest} µs"
        );
        // And one that is as greedy gets as much.
        let before = flood.time(20);
        for _ in 0..50 {
            tokio::spawn(fairness.turns(client(1, 3), work.endless(20)));
        }
        let_run(&clock, 1_000_000).await;
        let (much, little) = (flood.time(20) - before, work.time(20));
        assert!(little * 10 > much * 9, "{much} and {little} µs");
    }

    #[tokio::test]
    async fn a_pod_with_many_clients_gets_no_more_time_than_one_with_few() {
        let (clock, fairness, [many, one]) = stage();
        for number in 0..100 {
            tokio::spawn(fairness.turns(client(1, number), many.endless(20)));
            tokio::spawn(fairness.turns(client(2, 1), one.endless(20)));
        }
        let_run(&clock, 1_000_000).await;
        let (many, one) = (many.time(20), one.time(20));
        assert!(many > 400_000 && one > 400_000, "{many} and {one} µs");
    }

    #[tokio::test]
    async fn what_wakes_a_task_does_not_put_it_before_its_turn() {
        let (clock, fairness, [flooder, neighbour]) = stage();
        let bell = Arc::new(tokio::sync::Notify::new());
        for _ in 0..200 {
            let (bell, work) = (bell.clone(), flooder.clone());
            tokio::spawn(fairness.turns(pod(1), async move {
                let mut work = work.endless(20);
                loop {
                    let ring = bell.notified();
                    futures_util::future::select(&mut work, std::pin::pin!(ring)).await;
                }
            }));
        }
        tokio::spawn(async move {
            loop {
                bell.notify_waiters();
                tokio::task::yield_now().await;
            }
        });
        for _ in 0..100 {
            tokio::spawn(fairness.turns(pod(2), neighbour.endless(20)));
        }
        let_run(&clock, 1_000_000).await;
        let (much, little) = (flooder.time(20), neighbour.time(20));
        assert!(much > 400_000 && little > 400_000, "{much} and {little} µs");
    }

    #[tokio::test]
    async fn a_request_is_told_that_its_share_is_overdue() {
        let (clock, fairness, [flooder, neighbour]) = stage();
        for _ in 0..3_000 {
            tokio::spawn(fairness.turns(pod(1), flooder.endless(200)));
        }
        let _one = tokio::spawn(fairness.turns(pod(2), neighbour.endless(20)));
        let ask = |payer| tokio::spawn(fairness.turns(payer, async { is_overdue() }));
        assert!(!ask(pod(1)).await.unwrap());
        let_run(&clock, 6_000_000).await;
        assert!(ask(pod(1)).await.unwrap());
        assert!(!ask(pod(2)).await.unwrap() && !is_overdue());
    }

    #[tokio::test]
    async fn nothing_is_kept_of_pods_and_clients_that_are_gone() {
        let (clock, fairness, [work]) = stage();
        let tasks: Vec<_> = (0..50)
            .flat_map(|number| [client(1, number), client(u64::from(number), 1)])
            .map(|payer| tokio::spawn(fairness.turns(payer, work.endless(100))))
            .collect();
        let_run(&clock, 100_000).await;
        assert_eq!(fairness.pods.lock().len(), 50);
        for task in tasks {
            task.abort();
            assert!(task.await.is_err());
        }
        // The last turnstiles come to rest.
        for _ in 0..10_000 {
            tokio::task::yield_now().await;
        }
        assert!(fairness.pods.lock().is_empty());
    }
}
