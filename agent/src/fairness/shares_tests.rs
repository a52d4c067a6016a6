use std::pin::Pin;
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

    fn begin(&self) -> Duration {
        self.now()
    }

    fn took(&self, began: Duration) -> Duration {
        self.now() - began
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

/// A neighbour of a flood, both of whose turns take 20 µs, gets its half.
async fn halves(clock: &Simulated, fairness: &Arc<Fairness>, flooder: &Work, neighbour: &Work) {
    for _ in 0..100 {
        tokio::spawn(fairness.turns(pod(2), neighbour.endless(20)));
    }
    let_run(clock, 1_000_000).await;
    let (much, little) = (flooder.time(20), neighbour.time(20));
    assert!(much > 400_000 && little > 400_000, "{much} and {little} µs");
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
    halves(&clock, &fairness, &flooder, &neighbour).await;
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
    halves(&clock, &fairness, &flooder, &neighbour).await;
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
    assert_eq!(fairness.pods.len(), 50);
    for task in tasks {
        task.abort();
        assert!(task.await.is_err());
    }
    // The last turnstiles come to rest.
    for _ in 0..10_000 {
        tokio::task::yield_now().await;
    }
    assert_eq!(fairness.pods.len(), 0);
}
