//! The server.

use std::convert::Infallible;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use super::behaviour::{self, Behaviour, Fate};
use super::options::WebOptions;
use super::report::{WebReport, count};
use super::{ASKED_FOR, ATTEMPT, SERVED_BY};
use crate::traffic;

struct Server {
    name: String,
    behaviour: Arc<Mutex<Behaviour>>,
    report: Mutex<WebReport>,
    requests: AtomicU64,
}

/// Serves until SIGTERM or SIGINT, then writes its report to stdout.
pub async fn run(options: WebOptions) -> Result<()> {
    let server = Arc::new(Server {
        name: options.name,
        behaviour: Arc::default(),
        report: Mutex::default(),
        requests: AtomicU64::new(0),
    });
    let listener =
        traffic::listen(options.port).with_context(|| format!("port {}", options.port))?;
    tokio::spawn(accept(listener, Arc::clone(&server)));
    if let Some(control) = options.control {
        behaviour::listen(&control, Arc::clone(&server.behaviour))?;
        let server = Arc::clone(&server);
        // Last: whoever finds it may connect to all the rest.
        traffic::answer_reports(control, Arc::new(move || lock(&server.report).clone()))?;
    }
    traffic::asked_to_stop().await?;
    println!("{}", serde_json::to_string(&*lock(&server.report))?);
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn accept(listener: TcpListener, server: Arc<Server>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors: some will come back.
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        lock(&server.report).connections += 1;
        let server = Arc::clone(&server);
        tokio::spawn(async move {
            // What broke is the client's to count.
            let _ = serve(stream, server).await;
        });
    }
}

async fn serve(stream: TcpStream, server: Arc<Server>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let cut = CancellationToken::new();
    // A connection that is cut ends with an RST; hyper's own end is an orderly one.
    let reset = socket2::SockRef::from(&stream).try_clone()?;
    let service = {
        let cut = cut.clone();
        service_fn(move |request| {
            let (server, cut) = (Arc::clone(&server), cut.clone());
            async move { server.answer(request, &cut).await }
        })
    };
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http2().max_concurrent_streams(1000);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    tokio::select! {
        _ = connection => {}
        () = cut.cancelled() => reset.set_linger(Some(Duration::ZERO))?,
    }
    Ok(())
}

impl Server {
    async fn answer(
        &self,
        request: Request<Incoming>,
        cut: &CancellationToken,
    ) -> Result<Response<Full<Bytes>>, Infallible> {
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        let behaviour = *lock(&self.behaviour);
        let repeated = request
            .headers()
            .get(ATTEMPT)
            .is_some_and(|attempt| attempt != "1");
        {
            let mut report = lock(&self.report);
            report.received += 1;
            report.repeated += u64::from(repeated);
        }
        let fate = behaviour.fate(number);
        if fate == Fate::Cut {
            count(&mut lock(&self.report).by_status, "cut");
            cut.cancel();
            return std::future::pending().await;
        }
        let path = request.uri().path().parse();
        let mut body = request.into_body();
        while let Some(Ok(frame)) = body.frame().await {
            let length = frame.data_ref().map_or(0, Bytes::len);
            lock(&self.report).body_bytes += length as u64;
        }
        if behaviour.delay_ms > 0 {
            tokio::time::sleep(Duration::from_millis(behaviour.delay_ms)).await;
        }
        let status = match fate {
            Fate::Fail(status) => status,
            Fate::Answer | Fate::Cut => 200,
        };
        count(&mut lock(&self.report).by_status, &status.to_string());
        let mut response = Response::new(Full::new(Bytes::from(vec![b'.'; behaviour.body])));
        *response.status_mut() =
            StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let said = [(SERVED_BY, self.name.parse()), (ASKED_FOR, path)];
        for (name, value) in said {
            if let Ok(value) = value {
                response.headers_mut().insert(name, value);
            }
        }
        Ok(response)
    }
}
