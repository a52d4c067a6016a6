//! What a decision costs: `cargo bench -p undermesh-simulation`.
//!
//! A decision is admission by the breaker and the choice of an endpoint. What is given back at the
//! end of a request (places, counts) is part of every figure.

use std::hint::black_box;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use undermesh_simulation::resilience::balance::{Algorithm, BalanceSettings};
use undermesh_simulation::resilience::breaker::BreakerSettings;
use undermesh_simulation::resilience::budget::{BudgetSettings, Purse, RetryBudget};
use undermesh_simulation::resilience::destination::{
    Ask, Destination, DestinationSettings, Source, Worker,
};
use undermesh_simulation::resilience::ejection::{EjectionSettings, SourceId};
use undermesh_simulation::resilience::endpoint::Member;
use undermesh_simulation::resilience::event::NoSink;
use undermesh_simulation::resilience::limit::{ConcurrencyLimit, Rate, RateLimit};
use undermesh_simulation::resilience::{Breaker, Outcome, Timestamp};

/// A target as the agent has it: an address, and whose it is.
type Target = (std::net::SocketAddr, u64);

fn target(index: u32) -> Target {
    let address = std::net::Ipv4Addr::from_bits(0x0a00_0000 + index);
    ((address, 8080).into(), u64::from(index))
}

fn destination(count: u32, algorithm: Algorithm) -> Arc<Destination<Target>> {
    let settings = DestinationSettings {
        balance: BalanceSettings {
            algorithm,
            ..BalanceSettings::default()
        },
        ejection: EjectionSettings::default(),
        budget: BudgetSettings::default(),
        seed: 1,
        sink: Arc::new(NoSink),
    };
    let destination = Destination::new("bench".into(), settings);
    let members: Vec<Member<Target>> = (0..count).map(target).map(Member::new).collect();
    destination.replace(&members, Timestamp::ZERO);
    destination
}

fn breaker() -> Arc<Breaker> {
    Breaker::new(
        "bench".into(),
        BreakerSettings::default(),
        1,
        Arc::new(NoSink),
    )
}

/// One request a microsecond.
fn tick(now: &mut Timestamp) -> Timestamp {
    *now = *now + Duration::from_micros(1);
    *now
}

/// What one worker decides with.
struct Desk<'s> {
    breaker: &'s Arc<Breaker>,
    source: &'s Arc<Source<Target>>,
    worker: Worker<'s, Target>,
    rng: SmallRng,
    now: Timestamp,
}

impl<'s> Desk<'s> {
    fn new(breaker: &'s Arc<Breaker>, source: &'s Arc<Source<Target>>, seed: u64) -> Self {
        Self {
            breaker,
            source,
            worker: source.worker(),
            rng: SmallRng::seed_from_u64(seed),
            now: Timestamp::ZERO + START,
        }
    }

    fn decide(&mut self) {
        let now = tick(&mut self.now);
        let permit = self.breaker.admit(now);
        let attempt = self.source.pick(&Ask::default(), &mut self.rng, now);
        let _ = black_box((permit, attempt));
    }

    /// With what is borrowed instead of shared.
    fn decide_scoped(&mut self) {
        let now = tick(&mut self.now);
        let permit = self.breaker.admit_scoped(now);
        let attempt = self.worker.pick(&Ask::default(), &mut self.rng, now);
        let _ = black_box((permit, attempt));
    }

    fn request(&mut self) {
        let now = tick(&mut self.now);
        if let (Ok(permit), Ok(attempt)) = (
            self.breaker.admit(now),
            self.source.pick(&Ask::default(), &mut self.rng, now),
        ) {
            let done = now + Duration::from_millis(5);
            attempt.finish(Outcome::Success, done);
            permit.finish(Outcome::Success, done);
        }
    }

    fn request_scoped(&mut self) {
        let now = tick(&mut self.now);
        if let (Ok(permit), Ok(attempt)) = (
            self.breaker.admit_scoped(now),
            self.worker.pick(&Ask::default(), &mut self.rng, now),
        ) {
            let done = now + Duration::from_millis(5);
            attempt.finish(Outcome::Success, done);
            permit.finish(Outcome::Success, done);
        }
    }
}

/// What a worker does over and over.
type Work = for<'d, 's> fn(&'d mut Desk<'s>);

const WORK: [(&str, Work); 4] = [
    ("decision", |desk| desk.decide()),
    ("decision, scoped", |desk| desk.decide_scoped()),
    ("whole request", |desk| desk.request()),
    ("whole request, scoped", |desk| desk.request_scoped()),
];

const START: Duration = Duration::from_secs(3600);

fn single(criterion: &mut Criterion) {
    let mut rng = SmallRng::seed_from_u64(1);
    let mut now = Timestamp::ZERO + START;
    let breaker = breaker();
    criterion.bench_function("breaker: admit", |bencher| {
        bencher.iter(|| black_box(breaker.admit(tick(&mut now))));
    });
    for (name, algorithm) in [
        ("peak-EWMA", Algorithm::PeakEwma),
        ("least request", Algorithm::LeastRequest),
        ("round robin", Algorithm::RoundRobin),
        ("weighted", Algorithm::Weighted),
        ("ring hash", Algorithm::RingHash),
        ("Maglev", Algorithm::Maglev),
    ] {
        let destination = destination(10_000, algorithm);
        let source = destination.source(SourceId(1), now);
        criterion.bench_function(&format!("pick of 10,000: {name}"), |bencher| {
            let mut key = 0u64;
            bencher.iter(|| {
                key = key.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let ask = Ask {
                    hash: Some(key),
                    ..Ask::default()
                };
                black_box(source.pick(&ask, &mut rng, tick(&mut now)))
            });
        });
    }
    for count in [100, 10_000, 100_000] {
        let destination = destination(count, Algorithm::PeakEwma);
        let source = destination.source(SourceId(1), now);
        for (name, work) in WORK {
            let mut desk = Desk::new(&breaker, &source, 1);
            criterion.bench_function(&format!("{name}, {count} endpoints"), |bencher| {
                bencher.iter(|| work(&mut desk));
            });
        }
        let mut next = count;
        criterion.bench_function(&format!("update, {count} endpoints"), |bencher| {
            bencher.iter(|| {
                destination.put(&Member::new(target(next)), now);
                destination.remove(&target(next - count / 2), now);
                next += 1;
            });
        });
    }
}

fn two_workers(criterion: &mut Criterion) {
    let now = Timestamp::ZERO + START;
    let destination = destination(10_000, Algorithm::PeakEwma);
    let breaker = breaker();
    for (name, work) in WORK {
        criterion.bench_function(
            &format!("{name}, 10,000 endpoints, two workers"),
            |bencher| {
                bencher.iter_custom(|rounds| {
                    let start = Instant::now();
                    std::thread::scope(|scope| {
                        for worker in 0..2 {
                            let (destination, breaker) = (&destination, &breaker);
                            scope.spawn(move || {
                                let source = destination.source(SourceId(worker), now);
                                let mut desk = Desk::new(breaker, &source, worker);
                                for _ in 0..rounds {
                                    work(&mut desk);
                                }
                            });
                        }
                    });
                    // Each worker made `rounds` in this time.
                    start.elapsed()
                });
            },
        );
    }
}

fn limits(criterion: &mut Criterion) {
    let mut now = Timestamp::ZERO + START;
    let budget = RetryBudget::new(&BudgetSettings::default());
    criterion.bench_function("budget: deposit and withdraw", |bencher| {
        bencher.iter(|| {
            let deposit = budget.deposit(tick(&mut now));
            black_box(budget.withdraw(&deposit, now))
        });
    });
    let concurrency = ConcurrencyLimit::new(100);
    criterion.bench_function("concurrency: take and give back", |bencher| {
        bencher.iter(|| black_box(concurrency.take()));
    });
    let rate = RateLimit::new(
        Rate {
            per_second: 1e6,
            burst: 1000,
        },
        now,
    );
    criterion.bench_function("rate: take", |bencher| {
        bencher.iter(|| black_box(rate.take(NonZeroU32::MIN, tick(&mut now))));
    });
}

/// The fastest of many short batches: what a decision costs when nobody else has the core, which on
/// a shared machine the mean does not show.
fn fastest() {
    const BATCH: u32 = 1_000;
    const BATCHES: usize = 3_000;
    let breaker = breaker();
    for count in [100, 10_000, 100_000] {
        let destination = destination(count, Algorithm::PeakEwma);
        for (name, work) in WORK {
            let batches = |worker: u64| {
                let source = destination.source(SourceId(worker), Timestamp::ZERO + START);
                let mut desk = Desk::new(&breaker, &source, worker);
                let mut times: Vec<Duration> = Vec::with_capacity(BATCHES);
                for _ in 0..BATCHES {
                    let start = Instant::now();
                    for _ in 0..BATCH {
                        work(&mut desk);
                    }
                    times.push(start.elapsed() / BATCH);
                }
                times.sort_unstable();
                (times[0], times[BATCHES / 2])
            };
            let (best, median) = batches(1);
            println!("{name}, {count} endpoints, one worker: fastest {best:?}, median {median:?}");
            let (best, median) = std::thread::scope(|scope| {
                let other = scope.spawn(|| batches(2));
                let mine = batches(3);
                let theirs = other.join().unwrap_or(mine);
                (mine.0.max(theirs.0), mine.1.max(theirs.1))
            });
            println!("{name}, {count} endpoints, two workers: fastest {best:?}, median {median:?}");
        }
    }
}

/// Bytes of resident memory, by growth of the process.
fn memory() {
    let resident = || {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
        let pages = statm
            .split(' ')
            .nth(1)
            .and_then(|pages| pages.parse::<usize>().ok());
        pages.unwrap_or(0) * 4096
    };
    let before = resident();
    let large = destination(1_000_000, Algorithm::PeakEwma);
    println!(
        "bytes per endpoint, of 1,000,000: {}",
        (resident() - before) / 1_000_000
    );
    let before = resident();
    let many: Vec<_> = (0..20_000)
        .map(|_| (destination(0, Algorithm::PeakEwma), breaker()))
        .collect();
    println!(
        "bytes per destination with one breaker and no endpoint, of 20,000: {}",
        (resident() - before) / many.len()
    );
    let before = resident();
    let now = Timestamp::ZERO;
    let sources: Vec<_> = (0..20_000)
        .map(|index: usize| many[index].0.source(SourceId(1), now))
        .collect();
    println!(
        "bytes per source of a destination, of 20,000: {}",
        (resident() - before) / sources.len()
    );
    drop((large, many, sources));
}

criterion_group! {
    name = decisions;
    config = Criterion::default().measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_millis(500)).sample_size(30).configure_from_args();
    targets = single, two_workers, limits
}

fn main() {
    memory();
    fastest();
    decisions();
    Criterion::default().configure_from_args().final_summary();
}
