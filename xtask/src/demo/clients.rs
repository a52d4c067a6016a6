//! The programs that open connections, and what each of them saw.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use undermesh_lab::apps::{self, Server};
use undermesh_lab::traffic::{ClientOptions, ClientReport, Latency};
use undermesh_lab::{Lab, PodHandle, Traffic, interrupt};

use crate::cluster::{CACHE, ECHO, PAGE, Servers};

const BENCHMARK_CLIENTS: u32 = 5;
const BENCHMARK_REQUESTS: u32 = 200;
const FINISH: Duration = Duration::from_secs(40);
const MOST_EXAMPLES: usize = 10;

/// What clients counted.
#[derive(Debug, Clone, Default)]
pub struct Opened {
    /// Connections opened.
    pub opened: u64,
    /// Operations that failed.
    pub failed: u64,
    /// Payload bytes, both ways.
    pub bytes: u64,
    /// Connections opened, by program.
    pub by_program: BTreeMap<&'static str, u64>,
    /// The first failures, in words.
    pub examples: Vec<String>,
    /// Round trips on open connections.
    pub latency: Latency,
}

impl Opened {
    fn add(&mut self, program: &'static str, opened: u64) {
        self.opened += opened;
        *self.by_program.entry(program).or_default() += opened;
    }

    fn add_report(&mut self, report: &ClientReport) {
        self.add("undermesh-traffic", report.opened);
        self.failed += report.failed;
        self.bytes += report.bytes_sent + report.bytes_received;
        self.examples.extend(report.examples.iter().cloned());
        self.examples.truncate(MOST_EXAMPLES);
    }
}

/// How many connections one run of redis-benchmark opens, as the server counts them without a mesh.
pub fn calibrate(lab: &Lab, servers: &Servers, marker: &str) -> Result<u64> {
    let connections = |cache: &Server| cache.accepted();
    let before = connections(&servers.cache)?;
    benchmark(&lab.pod("worker")?, lab.service("cache", CACHE)?, marker)?;
    let opened = connections(&servers.cache)? - before;
    ensure!(opened > 0, "redis-benchmark opened no connection");
    Ok(opened)
}

fn benchmark(pod: &PodHandle, to: SocketAddr, marker: &str) -> Result<()> {
    apps::redis_benchmark(pod, to, BENCHMARK_CLIENTS, BENCHMARK_REQUESTS, marker)
}

/// Clients that run.
pub struct Clients {
    /// Connections that end after a request, from both nodes; and the last: those that stay open.
    traffic: Vec<Traffic<ClientReport>>,
    loops: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    curl: AtomicU64,
    benchmark: AtomicU64,
    failed: AtomicU64,
    bytes: AtomicU64,
    examples: Mutex<Vec<String>>,
}

impl Shared {
    fn fail(&self, text: String) {
        self.failed.fetch_add(1, Ordering::SeqCst);
        let mut examples = self.examples.lock().unwrap_or_else(PoisonError::into_inner);
        if examples.len() < MOST_EXAMPLES {
            examples.push(text);
        }
    }
}

impl Clients {
    /// Starts them: from `client` on one node and `worker` on the other, to Services with an endpoint on each.
    pub fn start(lab: &Lab, marker: &str, per_benchmark: u64, duration: Duration) -> Result<Self> {
        let (client, worker) = (lab.pod("client")?, lab.pod("worker")?);
        let echo = [lab.service("echo", ECHO)?, lab.service6("echo", ECHO)?];
        let short = |to: SocketAddr| {
            ClientOptions::echo(to)
                .during(duration)
                .bytes(2048)
                .concurrency(2)
                .pause(Duration::from_millis(20))
                .marker(marker)
        };
        // One request every 10 ms on each of four connections, for as long as the rest runs.
        let requests = u64::try_from(duration.as_millis() / 12)?.max(1);
        let long = ClientOptions::echo(echo[0])
            .and_to(echo[1])
            .connections(4)
            .concurrency(4)
            .requests(requests)
            .think(Duration::from_millis(10))
            .timeout(duration + FINISH / 2)
            .marker(marker);
        let traffic = vec![
            client.start_traffic(&short(echo[0]))?,
            worker.start_traffic(&short(echo[1]))?,
            client.start_traffic(&long)?,
        ];

        let stop = Arc::new(AtomicBool::new(false));
        let shared = Arc::<Shared>::default();
        let web = [lab.service("web", 80)?, lab.service6("web", 80)?];
        let cache = lab.service("cache", CACHE)?;
        let mut clients = Self {
            traffic,
            loops: Vec::new(),
            stop,
            shared,
        };
        for (pod, to) in [(client, web[0]), (worker.clone(), web[1])] {
            let marker = marker.to_owned();
            clients.repeat(duration, move |shared| fetch(&pod, to, &marker, shared))?;
        }
        let marker = marker.to_owned();
        clients.repeat(duration, move |shared| {
            match benchmark(&worker, cache, &marker) {
                Ok(()) => {
                    shared.benchmark.fetch_add(per_benchmark, Ordering::SeqCst);
                    let payload = marker.len() as u64 * u64::from(BENCHMARK_REQUESTS);
                    shared.bytes.fetch_add(payload, Ordering::SeqCst);
                }
                Err(error) => shared.fail(format!("{error:#}")),
            }
        })?;
        Ok(clients)
    }

    fn repeat(
        &mut self,
        duration: Duration,
        operation: impl Fn(&Shared) + Send + 'static,
    ) -> Result<()> {
        let (stop, shared) = (Arc::clone(&self.stop), Arc::clone(&self.shared));
        let end = Instant::now() + duration;
        let work = move || {
            while Instant::now() < end && !stop.load(Ordering::SeqCst) && !interrupt::interrupted()
            {
                operation(&shared);
                std::thread::sleep(Duration::from_millis(50));
            }
        };
        self.loops.push(std::thread::Builder::new().spawn(work)?);
        Ok(())
    }

    /// What they saw so far.
    pub fn so_far(&self) -> Result<Opened> {
        let reports = self.traffic.iter().map(Traffic::report);
        Ok(self.sum(&reports.collect::<Result<Vec<_>>>()?))
    }

    /// Waits for their ends, and says what they saw in all.
    pub fn finish(mut self) -> Result<Opened> {
        for running in std::mem::take(&mut self.loops) {
            running
                .join()
                .map_err(|_| anyhow!("a client's loop panicked"))?;
        }
        let traffic = std::mem::take(&mut self.traffic).into_iter();
        let reports: Vec<ClientReport> = traffic
            .map(|running| running.finish(FINISH))
            .collect::<Result<_>>()?;
        Ok(self.sum(&reports))
    }

    fn sum(&self, reports: &[ClientReport]) -> Opened {
        let mut seen = Opened::default();
        for report in reports {
            seen.add_report(report);
            seen.latency = report.operation;
        }
        let load = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        seen.add("curl", load(&self.shared.curl));
        seen.add("redis-benchmark", load(&self.shared.benchmark));
        seen.failed += load(&self.shared.failed);
        seen.bytes += load(&self.shared.bytes);
        let examples = self.shared.examples.lock();
        seen.examples.extend(
            examples
                .unwrap_or_else(PoisonError::into_inner)
                .iter()
                .cloned(),
        );
        seen
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for running in self.loops.drain(..) {
            // A panic in it was reported when it happened.
            let _ = running.join();
        }
    }
}

fn fetch(pod: &PodHandle, to: SocketAddr, marker: &str, shared: &Shared) {
    let page = PAGE / (marker.len() + 1) * (marker.len() + 1);
    match apps::curl(pod, &format!("http://{to}/"), marker) {
        Ok(fetched) => {
            shared.curl.fetch_add(fetched.connections, Ordering::SeqCst);
            shared.bytes.fetch_add(fetched.bytes, Ordering::SeqCst);
            if fetched.status != 200 || fetched.bytes != page as u64 || fetched.exit != 0 {
                shared.fail(format!("curl to {to}: {fetched:?}"));
            }
        }
        Err(error) => shared.fail(format!("{error:#}")),
    }
}
