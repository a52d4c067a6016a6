//! The client.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use super::options::LoadOptions;
use super::report::{LoadReport, Tick, count};
use super::{REASON, SERVED_BY};
use crate::traffic::{self, Latencies};

/// A client that could not connect tries again after this long.
const PAUSE: Duration = Duration::from_millis(5);

struct Load {
    options: LoadOptions,
    start: Instant,
    /// When the last request is due; earlier once it was asked to stop.
    end: watch::Sender<Instant>,
    /// Number of the next request that is due.
    next: AtomicU64,
    counts: Mutex<(LoadReport, Latencies)>,
}

/// Sends requests, writes its report to stdout, and says whether all were answered 2xx. SIGTERM and SIGINT make it send
/// no more.
pub async fn run(options: LoadOptions) -> Result<bool> {
    let start = Instant::now();
    let load = Arc::new(Load {
        start,
        end: watch::Sender::new(start + Duration::from_millis(options.milliseconds)),
        next: AtomicU64::new(0),
        counts: Mutex::default(),
        options,
    });
    load.request()?;
    if let Some(control) = load.options.control.clone() {
        let load = Arc::clone(&load);
        traffic::answer_reports(control, Arc::new(move || load.report(false)))?;
    }
    let stopper = {
        let load = Arc::clone(&load);
        tokio::spawn(async move {
            if traffic::asked_to_stop().await.is_ok() {
                load.end.send_modify(|end| *end = Instant::now().min(*end));
            }
        })
    };
    let workers: Vec<_> = (0..load.options.connections.max(1))
        .map(|_| tokio::spawn(Arc::clone(&load).work()))
        .collect();
    for worker in workers {
        worker.await?;
    }
    stopper.abort();
    let report = load.report(true);
    println!("{}", serde_json::to_string(&report)?);
    Ok(report.failed() == 0)
}

impl Load {
    fn counts(&self) -> MutexGuard<'_, (LoadReport, Latencies)> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, finished: bool) -> LoadReport {
        let counts = self.counts();
        let mut report = counts.0.clone();
        report.latency = counts.1.summary();
        report.finished = finished;
        if self.options.rate > 0 {
            let elapsed = Instant::now().min(self.end()) - self.start;
            let due = u128::from(self.options.rate) * elapsed.as_micros() / 1_000_000;
            report.unsent = u64::try_from(due)
                .unwrap_or(u64::MAX)
                .saturating_sub(report.sent);
        }
        report
    }

    async fn work(self: Arc<Self>) {
        let mut connection: Option<Connection> = None;
        while let Some(due) = self.due() {
            let mut end = self.end.subscribe();
            tokio::select! {
                () = sleep_until(due) => {}
                _ = end.wait_for(|end| *end <= due) => return,
            }
            let limit = Instant::now() + Duration::from_millis(self.options.timeout_ms);
            if connection.as_ref().is_none_or(Connection::is_closed) {
                connection = None;
            }
            let outcome = match timeout_at(limit, self.once(&mut connection)).await {
                Ok(outcome) => outcome,
                Err(_) => Err(anyhow!("timeout")),
            };
            if outcome.is_err() {
                connection = None;
            }
            let broken = outcome.is_err();
            self.record(due, outcome);
            if broken {
                tokio::time::sleep(PAUSE).await;
            }
        }
    }

    fn end(&self) -> Instant {
        *self.end.borrow()
    }

    /// When the next request is due; `None` when all have been sent.
    fn due(&self) -> Option<Instant> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let due = match self.options.rate {
            0 => Instant::now(),
            rate => self.start + Duration::from_secs_f64(number as f64 / f64::from(rate)),
        };
        let end = self.end();
        (due < end && Instant::now() < end).then_some(due)
    }

    async fn once(&self, connection: &mut Option<Connection>) -> Result<Answer> {
        let open = match connection {
            Some(open) => open,
            None => {
                self.counts().0.connections += 1;
                connection.insert(Connection::open(&self.options).await?)
            }
        };
        self.counts().0.sent += 1;
        let response = open.send(self.request()?).await?;
        let header = |name: &str| {
            let value = response.headers().get(name)?;
            Some(value.to_str().ok()?.to_owned())
        };
        let answer = Answer {
            status: response.status().as_u16(),
            server: header(SERVED_BY),
            reason: header(REASON),
        };
        let mut body = response.into_body();
        while let Some(frame) = body.frame().await {
            frame.map_err(|error| anyhow!("body: {}", word(&error)))?;
        }
        Ok(answer)
    }

    fn request(&self) -> Result<Request<Full<Bytes>>> {
        let options = &self.options;
        let uri = if options.http2 {
            format!("http://{}{}", options.host, options.path)
        } else {
            options.path.clone()
        };
        let mut request = Request::builder().method(options.method.as_str()).uri(uri);
        if !options.http2 {
            request = request.header("host", &options.host);
        }
        for header in &options.headers {
            let (name, value) = header
                .split_once(':')
                .with_context(|| format!("not a header: {header:?}"))?;
            request = request.header(name.trim(), value.trim());
        }
        Ok(request.body(Full::new(Bytes::from(vec![b'.'; options.body])))?)
    }

    fn record(&self, due: Instant, outcome: Result<Answer>) {
        let took = due.elapsed();
        let mut counts = self.counts();
        let (report, latencies) = &mut *counts;
        let tick = (due - self.start).as_millis() / LoadReport::TICK.as_millis();
        let tick = usize::try_from(tick).unwrap_or(usize::MAX);
        if tick < 100_000 && report.ticks.len() <= tick {
            report.ticks.resize(tick + 1, Tick::default());
        }
        let ok = match outcome {
            Ok(answer) => {
                count(&mut report.by_status, &answer.status.to_string());
                if (200..300).contains(&answer.status) {
                    count(
                        &mut report.by_server,
                        answer.server.as_deref().unwrap_or_default(),
                    );
                    true
                } else {
                    let reason = answer.reason.as_deref().unwrap_or("from_the_server");
                    count(
                        &mut report.by_reason,
                        &format!("{} {reason}", answer.status),
                    );
                    false
                }
            }
            Err(error) => {
                count(&mut report.by_reason, &error.to_string());
                false
            }
        };
        if ok {
            report.ok += 1;
            latencies.record(took);
        }
        if let Some(tick) = report.ticks.get_mut(tick) {
            if ok {
                tick.ok += 1;
            } else {
                tick.failed += 1;
            }
        }
    }
}

struct Answer {
    status: u16,
    server: Option<String>,
    reason: Option<String>,
}

enum Connection {
    One(http1::SendRequest<Full<Bytes>>),
    Two(http2::SendRequest<Full<Bytes>>),
}

impl Connection {
    async fn open(options: &LoadOptions) -> Result<Self> {
        let limit = Duration::from_millis(options.timeout_ms);
        let stream = match timeout(limit, TcpStream::connect(options.to)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(anyhow!("connect: {:?}", error.kind())),
            Err(_) => return Err(anyhow!("connect: timeout")),
        };
        stream.set_nodelay(true)?;
        let io = TokioIo::new(stream);
        let failed = |error: hyper::Error| anyhow!("handshake: {}", word(&error));
        Ok(if options.http2 {
            let (send, connection) = http2::handshake(TokioExecutor::new(), io)
                .await
                .map_err(failed)?;
            tokio::spawn(connection);
            Self::Two(send)
        } else {
            let (send, connection) = http1::handshake(io).await.map_err(failed)?;
            tokio::spawn(connection);
            Self::One(send)
        })
    }

    fn is_closed(&self) -> bool {
        match self {
            Self::One(send) => send.is_closed(),
            Self::Two(send) => send.is_closed(),
        }
    }

    async fn send(&mut self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>> {
        let failed = |error: hyper::Error| anyhow!("request: {}", word(&error));
        match self {
            Self::One(send) => {
                send.ready().await.map_err(failed)?;
                send.send_request(request).await.map_err(failed)
            }
            Self::Two(send) => {
                send.ready().await.map_err(failed)?;
                send.send_request(request).await.map_err(failed)
            }
        }
    }
}

/// A short name, so that reports can be added up.
fn word(error: &hyper::Error) -> &'static str {
    use std::error::Error as _;
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(io) = cause.downcast_ref::<std::io::Error>() {
            return match io.kind() {
                std::io::ErrorKind::ConnectionReset => "reset",
                std::io::ErrorKind::BrokenPipe => "broken pipe",
                std::io::ErrorKind::UnexpectedEof => "truncated",
                _ => "i/o error",
            };
        }
        source = cause.source();
    }
    if error.is_incomplete_message() {
        "closed"
    } else if error.is_canceled() {
        "cancelled"
    } else if error.is_parse() {
        "malformed"
    } else {
        "protocol"
    }
}
