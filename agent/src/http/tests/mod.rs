//! A small proxy out of this folder's parts, between real clients and servers over loopback.

mod conformance;
mod guards;
mod http1;
mod http2;
mod keeping;
mod raw;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ::http::{Request, StatusCode};
use hyper::body::Incoming;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::telemetry::ByteCount;

/// Whatever takes longer is stuck.
const FAR: Duration = Duration::from_secs(20);

/// A pod's netns cookie.
const POD: u64 = 7;

struct Proxy {
    address: SocketAddr,
    counters: Arc<HttpCounters>,
    pool: Arc<UpstreamPool>,
    drain: CancellationToken,
    stop: CancellationToken,
    ended: mpsc::UnboundedReceiver<Served>,
}

impl Proxy {
    async fn to(upstream: SocketAddr, wire: Wire) -> Self {
        Self::bounded(upstream, wire, ServerLimits::default()).await
    }

    async fn bounded(upstream: SocketAddr, wire: Wire, limits: ServerLimits) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (sender, ended) = mpsc::unbounded_channel();
        let proxy = Self {
            address: listener.local_addr().unwrap(),
            counters: Arc::default(),
            pool: UpstreamPool::new(PoolLimits::default()),
            drain: CancellationToken::new(),
            stop: CancellationToken::new(),
            ended,
        };
        let counters = proxy.counters.clone();
        let pool = proxy.pool.clone();
        let (drain, stop) = (proxy.drain.clone(), proxy.stop.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                SockRef::from(&stream)
                    .set_linger(Some(Duration::ZERO))
                    .unwrap();
                let (counters, limits, pool) = (counters.clone(), limits.clone(), pool.clone());
                let (drain, stop, sender) = (drain.clone(), stop.clone(), sender.clone());
                tokio::spawn(async move {
                    let context = ServerContext {
                        limits: &limits,
                        counters: &counters,
                        bytes: Arc::new(ByteCount::default()),
                        requester: None,
                    };
                    let service =
                        move |request| forward(pool.clone(), key(upstream, wire), request);
                    let served =
                        serve_http(stream.into(), wire, context, service, &drain, &stop).await;
                    let _ = sender.send(served);
                });
            }
        });
        proxy
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn ended(&mut self) -> Served {
        timeout(FAR, self.ended.recv()).await.unwrap().unwrap()
    }

    fn bad_requests(&self, reason: &str) -> u64 {
        named(&self.counters.bad_requests(), reason)
    }
}

fn named(counts: &[(&'static str, u64)], name: &str) -> u64 {
    counts.iter().find(|(other, _)| *other == name).unwrap().1
}

fn key(endpoint: SocketAddr, protocol: Wire) -> UpstreamKey {
    UpstreamKey {
        source: POD,
        endpoint,
        protocol,
        way: Way::SameNode,
        worker: None,
    }
}

async fn dial(endpoint: SocketAddr) -> Result<Connected, SendError> {
    let stream = TcpStream::connect(endpoint)
        .await
        .map_err(|error| SendError::Reset(error.into()))?;
    SockRef::from(&stream)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    Ok(stream.into())
}

/// What an engine does, without its decisions.
async fn forward(
    pool: Arc<UpstreamPool>,
    key: UpstreamKey,
    request: Request<Incoming>,
) -> Result<::http::Response<ProxyBody>, ResetNow> {
    let (mut head, body) = request.into_parts();
    let client = ClientView {
        address: "10.0.0.1".parse().unwrap(),
        side: Side::Source,
    };
    let id = RequestId::of(&head.headers);
    let dialect = Dialect::of(&head.headers);
    to_upstream(&mut head, &client, &id);
    let replay = Replay::new(body, 64 * 1024);
    let answer = async {
        let lease = pool
            .get(&key, &Terms::default(), || dial(key.endpoint))
            .await?;
        lease
            .send(Request::from_parts(head, replay.attempt()))
            .await
    };
    match answer.await {
        Ok(response) => {
            let (mut head, body) = response.into_parts();
            to_downstream(&mut head);
            Ok(::http::Response::from_parts(head, body.into()))
        }
        Err(SendError::BodyEnded(_)) => Err(ResetNow),
        Err(error) => Ok(own_response_in(
            dialect,
            StatusCode::BAD_GATEWAY,
            match error {
                SendError::NeverSent(_) => "never_sent",
                SendError::Malformed(_) => "malformed",
                _ => "upstream_reset",
            },
        )),
    }
}

/// An upstream that speaks from a script: one task per connection.
struct Upstream {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
}

impl Upstream {
    async fn new<H, F>(handle: H) -> Self
    where
        H: Fn(TcpStream) -> F + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let counted = connections.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(handle(stream));
            }
        });
        Self {
            address,
            connections,
        }
    }

    /// Answers every request without a body with the same bytes.
    async fn answering(answer: &'static str) -> Self {
        Self::new(move |mut stream| async move {
            while read_head(&mut stream).await.is_some() {
                if stream.write_all(answer.as_bytes()).await.is_err() {
                    return;
                }
            }
        })
        .await
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

/// A head up to its empty line; `None` at the end of the stream.
async fn read_head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(timeout(FAR, stream.read_u8()).await.unwrap().ok()?);
    }
    Some(String::from_utf8(head).unwrap())
}

/// Exactly so many bytes.
async fn read_text(stream: &mut TcpStream, length: usize) -> String {
    let mut text = vec![0; length];
    timeout(FAR, stream.read_exact(&mut text))
        .await
        .unwrap()
        .unwrap();
    String::from_utf8(text).unwrap()
}

/// Everything up to the end of the stream, or the error that ended it.
async fn read_all(stream: &mut TcpStream) -> (String, std::io::Result<()>) {
    let mut bytes = Vec::new();
    let ended = timeout(FAR, stream.read_to_end(&mut bytes)).await.unwrap();
    (String::from_utf8(bytes).unwrap(), ended.map(|_| ()))
}

async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let reached = timeout(FAR, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    reached.await.unwrap_or_else(|_| panic!("never: {what}"));
}
