//! The threads that serve connections.
//!
//! Each has a tokio runtime of its own that runs on it alone. A connection is given to one of them when it is
//! accepted, and all that serves it lives there: its relay, the tunnel that it takes, streams that come in by a
//! tunnel, upstream connections. So they never wait for each other's locks, and what one hands to another, as a
//! connection does to its tunnel, runs next on the same processor, after everything else that is ready: what
//! many connections have for one tunnel goes out together.
//!
//! The price is that no worker helps out another. What makes up for it is to whom connections are given, see [`Spread`].

mod brief;

use std::cell::Cell;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use pin_project_lite::pin_project;
use serde::Serialize;
use tokio::runtime::{Builder, Handle};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::brief::{Briefs, Pressure};
use crate::telemetry::{Labelled, Telemetry};

thread_local! {
    static CURRENT: Cell<Option<WorkerId>> = const { Cell::new(None) };
}

/// Number of a worker, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct WorkerId(u16);

impl WorkerId {
    /// The worker that this runs on. None elsewhere: on the control plane's threads, and in tests.
    #[must_use]
    pub fn current() -> Option<Self> {
        CURRENT.get()
    }

    /// Its place among [`Workers::runtimes`].
    #[must_use]
    pub fn index(self) -> usize {
        self.0.into()
    }
}

/// All workers of the agent.
#[derive(Debug)]
pub struct Workers {
    each: Box<[Worker]>,
    /// Who is home to the next [`Spread`].
    next: AtomicUsize,
    stop: CancellationToken,
    /// Disconnected when no thread is left.
    ended: Mutex<Receiver<Infallible>>,
}

#[derive(Debug)]
struct Worker {
    runtime: Handle,
    /// Connections now.
    live: AtomicUsize,
    /// Connections so far.
    given: AtomicU64,
}

impl Worker {
    /// For how long it has not been waiting for something to do.
    fn busy(&self) -> Duration {
        self.runtime.metrics().worker_total_busy_duration(0)
    }
}

impl Workers {
    /// Starts so many threads, and one if none is asked for. An error means that there is no thread, or no
    /// descriptor for its reactor.
    pub fn start(count: u16) -> io::Result<Arc<Self>> {
        let stop = CancellationToken::new();
        let (alive, ended) = channel();
        let mut each = Vec::new();
        for number in 0..count.max(1) {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            each.push(Worker {
                runtime: runtime.handle().clone(),
                live: AtomicUsize::new(0),
                given: AtomicU64::new(0),
            });
            let (told, alive) = (stop.clone(), alive.clone());
            let started = thread::Builder::new()
                .name(format!("worker-{number}"))
                .spawn(move || {
                    CURRENT.set(Some(WorkerId(number)));
                    runtime.block_on(told.cancelled());
                    // Drops all tasks, here, where they lived.
                    runtime.shutdown_background();
                    drop(alive);
                });
            if let Err(error) = started {
                stop.cancel();
                return Err(error);
            }
        }
        Ok(Arc::new(Self {
            each: each.into(),
            next: AtomicUsize::new(0),
            stop,
            ended: Mutex::new(ended),
        }))
    }

    /// The runtimes, in the order of their numbers.
    pub fn runtimes(&self) -> impl ExactSizeIterator<Item = &Handle> {
        self.each.iter().map(|worker| &worker.runtime)
    }

    /// A way to give the connections of one listener to the workers. Its home, where it is best accepted, is each
    /// worker in turn, and after each round the next one begins: pods have the same number of listeners, of which
    /// the same one is busy.
    #[must_use]
    pub fn spread(self: &Arc<Self>) -> Spread {
        let (turn, count) = (self.next.fetch_add(1, Ordering::Relaxed), self.each.len());
        let now = Instant::now();
        Spread(Arc::new(Shared {
            home: (turn + turn / count) % count,
            live: self.each.iter().map(|_| AtomicUsize::new(0)).collect(),
            briefs: Briefs::new(now),
            pressure: Pressure::new(now),
            workers: self.clone(),
        }))
    }

    /// Drops whatever the workers still do, which resets the connections that are left, and waits for their
    /// threads, but no longer than this: one that hangs is left to the end of the process.
    pub fn stop(&self, patience: Duration) {
        self.stop.cancel();
        if self.ended.lock().recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!(?patience, "a worker has not ended");
        }
    }

    /// For how long they have not been waiting for something to do, all together.
    #[must_use]
    pub fn busy(&self) -> Duration {
        self.each.iter().map(Worker::busy).sum()
    }

    /// What the workers do, for `/metrics`.
    pub fn report(self: &Arc<Self>, telemetry: &Telemetry) {
        let workers = self.clone();
        telemetry.register_gauge(
            "undermesh_worker_connections",
            "Connections and tunnels that a worker serves now",
            move || workers.each_as(|worker| worker.live.load(Ordering::Relaxed) as f64),
        );
        let workers = self.clone();
        telemetry.register_counter(
            "undermesh_worker_connections_given",
            "Connections and tunnels that a worker was given to serve",
            move || workers.each_as(|worker| worker.given.load(Ordering::Relaxed)),
        );
        let workers = self.clone();
        telemetry.register_seconds(
            "undermesh_worker_busy",
            "How long a worker was not waiting for something to do",
            move || workers.each_as(Worker::busy),
        );
    }

    fn each_as<T>(&self, value: impl Fn(&Worker) -> T) -> Vec<Labelled<T>> {
        let all = self.each.iter().enumerate();
        all.map(|(number, worker)| Labelled::one("worker", &number.to_string(), value(worker)))
            .collect()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // Not joined: this may be the last task of one of them.
        self.stop.cancel();
    }
}

/// How many connections more than any other worker the home has of a listener whose connections are brief: those
/// among them that are not, which nobody can tell, are spread unevenly by no more.
const BRIEF_AHEAD: usize = 32;

/// Gives the connections of one listener to the workers: each to the one that has the fewest of this
/// listener's, of such the one that has the fewest of all, of such the listener's home.
///
/// How busy a connection will be is not known when it is accepted. Counted by listener, two busy connections of one
/// pod are on two workers whatever the others have, and a client that makes one connection after the other stays on
/// one worker, with one tunnel.
///
/// Where connections come and go, to give one away costs more than to serve it costs elsewhere: another thread is
/// woken for it, and its frames go out alone on that worker's own tunnel. So, while those that ended lately were all
/// brief, they stay at home, unless it has no time left.
#[derive(Debug)]
pub struct Spread(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    workers: Arc<Workers>,
    home: usize,
    /// Connections of this listener now, by worker.
    live: Box<[AtomicUsize]>,
    briefs: Briefs,
    pressure: Pressure,
}

impl Spread {
    /// The runtime of the worker that is to accept.
    #[must_use]
    pub fn home(&self) -> &Handle {
        &self.0.workers.each[self.0.home].runtime
    }

    /// Runs what serves a connection on one of the workers. It counts until the task has ended, panicked or been
    /// dropped with its worker. To be called at home.
    pub fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        let now = Instant::now();
        let seat = Seat::take(&self.0, self.0.choose(now), now);
        let runtime = seat.worker().runtime.clone();
        runtime.spawn(Seated { task, _seat: seat })
    }
}

impl Shared {
    fn choose(&self, now: Instant) -> usize {
        let count = self.workers.each.len();
        let load = |at: &usize| {
            let own = self.live[*at].load(Ordering::Relaxed);
            (own, self.workers.each[*at].live.load(Ordering::Relaxed))
        };
        let from_home = (0..count).map(|distance| (self.home + distance) % count);
        // The first of those that are alike.
        let least = from_home.min_by_key(load).unwrap_or(self.home);
        if least == self.home || !self.briefs.expected(now) {
            return least;
        }
        let ahead = load(&self.home).0.saturating_sub(load(&least).0);
        let busy = || self.workers.each[self.home].busy();
        match ahead < BRIEF_AHEAD && !self.pressure.is_full(now, busy) {
            true => self.home,
            false => least,
        }
    }
}

pin_project! {
    /// What serves a connection, and its place. An async block would hold the task twice, for as long as it runs.
    struct Seated<F> {
        #[pin]
        task: F,
        _seat: Seat,
    }
}

impl<F: Future> Future for Seated<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        self.project().task.poll(cx)
    }
}

/// A connection's place on a worker, given back when dropped.
struct Seat {
    shared: Arc<Shared>,
    at: usize,
    since: Instant,
}

impl Seat {
    fn take(shared: &Arc<Shared>, at: usize, now: Instant) -> Self {
        let seat = Self {
            shared: shared.clone(),
            at,
            since: now,
        };
        shared.live[at].fetch_add(1, Ordering::Relaxed);
        seat.worker().live.fetch_add(1, Ordering::Relaxed);
        seat.worker().given.fetch_add(1, Ordering::Relaxed);
        seat
    }

    fn worker(&self) -> &Worker {
        &self.shared.workers.each[self.at]
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.shared.live[self.at].fetch_sub(1, Ordering::Relaxed);
        self.worker().live.fetch_sub(1, Ordering::Relaxed);
        let now = Instant::now();
        let lasted = now.saturating_duration_since(self.since);
        self.shared.briefs.ended(lasted, now);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use tokio::sync::oneshot;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    /// A connection that says where it is, and lasts until the sender is dropped.
    fn connect(spread: &Spread) -> (WorkerId, oneshot::Sender<()>, JoinHandle<()>) {
        let (told, tell) = sync_channel(1);
        let (open, ended) = oneshot::channel();
        let task = spread.spawn(async move {
            let _ = told.send(WorkerId::current());
            let _ = ended.await;
        });
        let worker = tell.recv_timeout(LIMIT).unwrap();
        (worker.expect("it runs on a worker"), open, task)
    }

    fn live(workers: &Workers) -> Vec<usize> {
        let each = workers.each.iter();
        each.map(|worker| worker.live.load(Ordering::Relaxed))
            .collect()
    }

    #[test]
    fn connections_of_one_listener_are_on_all_workers_whatever_others_have() {
        let workers = Workers::start(2).unwrap();
        let (first, second) = (workers.spread(), workers.spread());
        let crowd: Vec<_> = (0..5).map(|_| connect(&first)).collect();
        assert_eq!(live(&workers), [3, 2]);
        // Its home has fewer of all as well.
        let (one, _one, _) = connect(&second);
        let (other, _other, _) = connect(&second);
        assert_eq!((one, other), (WorkerId(1), WorkerId(0)));
        drop(crowd);
    }

    #[tokio::test]
    async fn one_connection_after_the_other_stays_at_home() {
        let workers = Workers::start(3).unwrap();
        let _ = workers.spread();
        let spread = workers.spread();
        for _ in 0..10 {
            let (worker, open, task) = connect(&spread);
            assert_eq!(worker, WorkerId(1));
            drop(open);
            task.await.unwrap();
        }
        assert_eq!(live(&workers), [0, 0, 0]);
        assert_eq!(workers.each[1].given.load(Ordering::Relaxed), 10);
    }

    #[test]
    fn brief_connections_stay_at_home_while_it_can_carry_them() {
        let workers = Workers::start(2).unwrap();
        let spread = workers.spread();
        let shared = &spread.0;
        let now = Instant::now();
        let mut seats = Vec::new();
        let mut seat = |now| {
            seats.push(Seat::take(shared, shared.choose(now), now));
            seats.last().map(|seat| seat.at).unwrap()
        };
        assert_eq!([seat(now), seat(now)], [0, 1], "nothing is known of them");
        while !shared.briefs.expected(now) {
            shared.briefs.ended(Duration::ZERO, now);
        }
        for _ in 0..BRIEF_AHEAD {
            assert_eq!(seat(now), 0);
        }
        assert_eq!(seat(now), 1, "they may be other than those before");
        assert_eq!(seat(now), 0);
        let later = now + Duration::from_secs(1);
        let busy = || Duration::from_secs(10);
        assert!(shared.pressure.is_full(later, busy));
        assert_eq!([seat(later), seat(later)], [1, 1], "no time is left there");
    }

    #[test]
    fn the_same_listener_of_each_pod_is_at_home_on_all_workers() {
        let workers = Workers::start(2).unwrap();
        for listeners in [3, 6] {
            let all = (0..8).map(|_| (0..listeners).map(|_| workers.spread().0.home).collect());
            let homes: Vec<Vec<usize>> = all.collect();
            for listener in 0..listeners {
                let at_first = homes.iter().filter(|pod| pod[listener] == 0).count();
                assert_eq!(at_first, 4, "{homes:?}");
            }
        }
    }

    #[tokio::test]
    async fn a_connection_that_panics_ends_alone_and_gives_its_place_back() {
        let workers = Workers::start(1).unwrap();
        let spread = workers.spread();
        let (_, open, other) = connect(&spread);
        let panicked = spread.spawn(async { std::panic::resume_unwind(Box::new("a fault")) });
        let ended: Result<(), _> = panicked.await;
        assert!(ended.unwrap_err().is_panic());
        assert_eq!(live(&workers), [1]);
        drop(open);
        other.await.unwrap();
    }

    #[tokio::test]
    async fn what_is_left_when_workers_stop_is_dropped_before_their_threads_end() {
        struct Dropped(std::sync::mpsc::Sender<Option<WorkerId>>);
        impl Drop for Dropped {
            fn drop(&mut self) {
                let _ = self.0.send(WorkerId::current());
            }
        }
        let workers = Workers::start(2).unwrap();
        let spread = workers.spread();
        let (told, tell) = channel();
        let guard = Dropped(told);
        let task = spread.spawn(async move {
            let _guard = guard;
            std::future::pending::<()>().await;
        });
        workers.stop(LIMIT);
        assert_eq!(tell.try_recv(), Ok(Some(WorkerId(0))), "on its own worker");
        assert!(task.await.unwrap_err().is_cancelled());
        // Nobody runs what is spawned from now on.
        assert!(spread.spawn(async {}).await.unwrap_err().is_cancelled());
        assert_eq!(live(&workers), [0, 0]);
    }

    #[test]
    fn elsewhere_there_is_no_worker() {
        assert_eq!(WorkerId::current(), None);
    }
}
