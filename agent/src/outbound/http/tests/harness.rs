//! A mesh on loopback.

use std::collections::HashSet;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::AtomicUsize;

use arc_swap::ArcSwap;
use http_body_util::Full;
use http_body_util::combinators::BoxBody;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::fairness::{QuotaLimits, Quotas};
use crate::http::{
    HttpCounters, HttpIo, PoolLimits, ServerContext, ServerLimits, Side, serve_http,
};
use crate::mesh::policy::spec::TrafficPolicySpec;
use crate::mesh::policy::{Layer, ServiceLayers};
use crate::mesh::route::{Attached, RouteId, RouteKind, RouteTable, ServiceRoutes};
use crate::mesh::{Endpoint, Service, ServicePort, Snapshot, WorkloadUid};
use crate::outbound::connect::{Failure, Way};
use crate::outbound::path::Path;
use crate::resilience::event::EventLog;
use crate::telemetry::testing::workload;
use crate::telemetry::{Direction, FailureReason, Party, Telemetry};

/// Longer than anything takes that does not hang.
pub(super) const FAR: Duration = Duration::from_secs(20);

/// A request as a peer saw it.
#[derive(Debug, Clone)]
pub(super) struct Heard {
    pub(super) method: Method,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Heard {
    pub(super) fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }
}

/// What a peer does with a request.
pub(super) enum Act {
    Answer(Response<BoxBody<Bytes, std::io::Error>>),
    /// Breaks the connection, or resets the stream.
    Reset,
    Hang,
    /// Answers when it is told to.
    When(Arc<Notify>, Response<BoxBody<Bytes, std::io::Error>>),
}

/// The same answer, held back until it is told to go.
pub(super) fn held(gate: &Arc<Notify>, act: Act) -> Act {
    match act {
        Act::Answer(response) => Act::When(gate.clone(), response),
        other => other,
    }
}

/// An answer with this status and body.
pub(super) fn answer(status: u16, body: &str) -> Act {
    let body = Full::new(Bytes::from(body.to_owned())).map_err(|never: Infallible| match never {});
    let mut response = Response::new(body.boxed());
    *response.status_mut() = status.try_into().unwrap();
    Act::Answer(response)
}

/// A gRPC answer whose status comes in trailers, after a message.
pub(super) fn grpc_trailers(status: u8) -> Act {
    let trailers = HeaderMap::from_iter([(
        "grpc-status".parse().unwrap(),
        HeaderValue::from(u16::from(status)),
    )]);
    let message = Full::new(Bytes::from_static(b"\0\0\0\0\x01x"));
    let body = message
        .with_trailers(std::future::ready(Some(Ok(trailers))))
        .map_err(|never: Infallible| match never {});
    Act::Answer(Response::new(body.boxed()))
}

/// A gRPC answer that is all head.
pub(super) fn grpc_head(status: u8) -> Act {
    let Act::Answer(mut response) = answer(200, "") else {
        unreachable!()
    };
    let headers = response.headers_mut();
    headers.insert("grpc-status", u16::from(status).into());
    Act::Answer(response)
}

type Script = dyn Fn(usize, &Heard) -> Act + Send + Sync;

/// A server on loopback.
pub(super) struct Peer {
    pub(super) address: SocketAddr,
    heard: Arc<Mutex<Vec<Heard>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Peer {
    /// Does with the n-th request, counted from 0, what the script says.
    pub(super) async fn new(
        wire: Wire,
        script: impl Fn(usize, &Heard) -> Act + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let heard: Arc<Mutex<Vec<Heard>>> = Arc::default();
        let (script, log): (Arc<Script>, _) = (Arc::new(script), heard.clone());
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (script, log) = (script.clone(), log.clone());
                let service = service_fn(move |request: Request<Incoming>| {
                    perform(request, script.clone(), log.clone())
                });
                tokio::spawn(async move {
                    let io = TokioIo::new(stream);
                    // How a connection ends is the other side's to judge.
                    let _ = match wire {
                        Wire::Http1 => {
                            hyper::server::conn::http1::Builder::new()
                                .serve_connection(io, service)
                                .await
                        }
                        Wire::Http2 => {
                            hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                                .serve_connection(io, service)
                                .await
                        }
                    };
                });
            }
        });
        Self {
            address,
            heard,
            task,
        }
    }

    pub(super) async fn http1(
        script: impl Fn(usize, &Heard) -> Act + Send + Sync + 'static,
    ) -> Self {
        Self::new(Wire::Http1, script).await
    }

    pub(super) fn heard(&self) -> Vec<Heard> {
        self.heard.lock().clone()
    }

    pub(super) fn count(&self) -> usize {
        self.heard.lock().len()
    }
}

async fn perform(
    request: Request<Incoming>,
    script: Arc<Script>,
    log: Arc<Mutex<Vec<Heard>>>,
) -> Result<Response<BoxBody<Bytes, std::io::Error>>, std::io::Error> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(std::io::Error::other)?;
    let heard = Heard {
        method: head.method,
        headers: head.headers,
        body: body.to_bytes(),
    };
    let number = {
        let mut log = log.lock();
        log.push(heard.clone());
        log.len() - 1
    };
    match script(number, &heard) {
        Act::Answer(response) => Ok(response),
        Act::Reset => Err(std::io::ErrorKind::ConnectionReset.into()),
        Act::Hang => std::future::pending().await,
        Act::When(gate, response) => {
            gate.notified().await;
            Ok(response)
        }
    }
}

/// Dials peers as they are.
pub(super) struct Loopback {
    /// Connections that were asked for.
    dialled: Arc<AtomicUsize>,
    /// Endpoints that the client may not speak to.
    denied: Arc<Mutex<HashSet<SocketAddr>>>,
}

impl Network for Loopback {
    fn way(&self, _: &Snapshot, endpoint: &EndpointId) -> Result<Way, Failure> {
        if self.denied.lock().contains(&endpoint.address) {
            return Err(Failure::new(FailureReason::Denied, "denied"));
        }
        Ok(Way {
            endpoint: endpoint.address,
            path: Path::SameNode,
            workload: None,
        })
    }

    async fn open(
        &self,
        way: &Way,
        _: Option<&ObjectName>,
        limit: Duration,
    ) -> Result<HttpIo, Failure> {
        self.dialled.fetch_add(1, Ordering::Relaxed);
        let refused = |why: &str| Failure::of_endpoint(FailureReason::ConnectRefused, why);
        match tokio::time::timeout(limit, TcpStream::connect(way.endpoint)).await {
            Ok(Ok(stream)) => Ok(stream.into()),
            Ok(Err(error)) => Err(refused(&error.to_string())),
            Err(_) => Err(refused("too late")),
        }
    }
}

/// A mesh of Services whose endpoints are peers.
pub(super) struct World {
    pub(super) snapshot: SharedSnapshot,
    pub(super) destinations: Arc<Destinations>,
    pub(super) engine: Arc<Engine>,
    pub(super) telemetry: Arc<Telemetry>,
    pub(super) quotas: Quotas,
    pub(super) denied: Arc<Mutex<HashSet<SocketAddr>>>,
    pub(super) dialled: Arc<AtomicUsize>,
}

pub(super) fn name(service: &str) -> ObjectName {
    ObjectName::new("shop", service)
}

impl World {
    /// A Service `cart` with these endpoints.
    pub(super) fn new(endpoints: &[SocketAddr]) -> Self {
        Self::bounded(endpoints, QuotaLimits::default())
    }

    /// The same, with bounds for each pod.
    pub(super) fn bounded(endpoints: &[SocketAddr], limits: QuotaLimits) -> Self {
        let snapshot: SharedSnapshot = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
        let sink = Arc::new(EventLog::new(1000));
        let destinations = Destinations::new(snapshot.clone(), "node-a", Clock::start(), sink);
        let pool = UpstreamPool::new(PoolLimits::default());
        let world = Self {
            engine: Engine::new(snapshot.clone(), destinations.clone(), pool),
            quotas: Quotas::new(limits),
            telemetry: Telemetry::new(),
            snapshot,
            destinations,
            denied: Arc::default(),
            dialled: Arc::default(),
        };
        world.service("cart", endpoints);
        world
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut Snapshot)) {
        let mut snapshot = Snapshot::clone(&self.snapshot.load());
        change(&mut snapshot);
        self.snapshot.store(Arc::new(snapshot));
    }

    pub(super) fn service(&self, service: &str, endpoints: &[SocketAddr]) {
        let endpoint = |address: &SocketAddr| Endpoint {
            address: *address,
            readiness: crate::mesh::Readiness::Ready,
            workload: Some(WorkloadUid(address.to_string().into())),
        };
        let service = Service {
            name: name(service),
            vips: Vec::new(),
            ports: vec![ServicePort {
                name: "".into(),
                port: 80,
                app_protocol: None,
                opaque: false,
                endpoints: endpoints.iter().map(endpoint).collect(),
            }],
        };
        self.change(|snapshot| snapshot.insert_service(Arc::new(service)));
    }

    /// What a TrafficPolicy on a Service says.
    pub(super) fn policy(&self, service: &str, spec: &Value) {
        let mut spec = spec.clone();
        spec["targetRefs"] = json!([{"kind": "Service", "name": service}]);
        let spec: TrafficPolicySpec = serde_json::from_value(spec).unwrap();
        assert!(spec.faults().is_empty(), "{:?}", spec.faults());
        let layer = Layer {
            name: name("policy"),
            spec: Arc::new(spec),
        };
        let layers = ServiceLayers {
            whole: vec![layer],
            ..ServiceLayers::default()
        };
        self.change(|snapshot| snapshot.set_service_policies(&name(service), Some(layers)));
    }

    /// Routes of `cart`.
    pub(super) fn routes(&self, rules: Vec<Rule>) {
        let table = RouteTable::new(RouteKind::Http, rules.into_iter().map(Arc::new));
        let mut routes = ServiceRoutes::default();
        let attached = Attached::Requests(Arc::new(table));
        routes.producer.insert(80, attached);
        self.change(|snapshot| snapshot.set_routes(&name("cart"), Some(Arc::new(routes))));
    }

    /// Serves one connection of a pod of `shop`, to this Service.
    pub(super) async fn connect(&self, service: &str, wire: Wire) -> Connection {
        self.connect_from(7, service, wire).await
    }

    /// The same, of the pod with this number.
    pub(super) async fn connect_from(&self, number: u64, service: &str, wire: Wire) -> Connection {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let local = listener.local_addr().unwrap();
        let (near, accepted) = tokio::join!(TcpStream::connect(local), listener.accept());
        let (stream, peer) = accepted.unwrap();
        let pod = workload("web", "127.0.0.1");
        let caller = Caller {
            source: SourceId(number),
            quota: self.quotas.of(number),
            local: "10.96.0.1:80".parse().unwrap(),
            frontend: Frontend::Service {
                service: name(service),
                port: 80,
            },
            view: ClientView {
                address: peer.ip(),
                side: Side::Source,
            },
            requester: self.telemetry.requester(
                Direction::Outbound,
                Party::of(&pod, peer),
                local,
                1,
            ),
            workload: pod,
        };
        let network = Loopback {
            dialled: self.dialled.clone(),
            denied: self.denied.clone(),
        };
        let client = Client::new(self.engine.clone(), network, caller);
        let drain = CancellationToken::new();
        let token = drain.clone();
        let served = tokio::spawn(async move {
            let context = ServerContext {
                limits: &ServerLimits::default(),
                counters: &Arc::new(HttpCounters::default()),
                bytes: Arc::default(),
                requester: None,
            };
            let service = move |request| client.clone().serve(request);
            let stop = CancellationToken::new();
            serve_http(stream.into(), wire, context, service, &token, &stop).await;
        });
        Connection::new(near.unwrap(), wire, served, drain).await
    }

    /// The limit of connections to a Service.
    pub(super) fn places(&self, service: &str) -> Arc<crate::http::Places> {
        let all = self.destinations.all();
        let of = all.iter().find(|one| one.id().service == name(service));
        of.unwrap().places().unwrap()
    }

    /// A policy's breakers of a Service, by route.
    pub(super) fn breaker(&self, service: &str) -> Arc<crate::resilience::Breaker> {
        let all = self.destinations.all();
        let of = all.iter().find(|one| one.id().service == name(service));
        of.unwrap().routes()[0].breaker.clone()
    }
}

type Body = BoxBody<Bytes, std::io::Error>;
type Sending = Pin<Box<dyn Future<Output = Result<Response<Incoming>, hyper::Error>> + Send>>;

enum Sender {
    Http1(hyper::client::conn::http1::SendRequest<Body>),
    Http2(hyper::client::conn::http2::SendRequest<Body>),
}

/// The client's end.
pub(super) struct Connection {
    sender: Sender,
    /// The client's connection, which ends it when dropped.
    near: tokio::task::JoinHandle<()>,
    /// The engine's.
    pub(super) served: tokio::task::JoinHandle<()>,
    pub(super) drain: CancellationToken,
}

/// An answer as the client saw it.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: HeaderMap,
    pub(super) body: Result<Bytes, hyper::Error>,
    pub(super) trailers: Option<HeaderMap>,
}

impl Answer {
    pub(super) fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }

    pub(super) fn text(&self) -> &str {
        std::str::from_utf8(self.body.as_ref().unwrap()).unwrap()
    }
}

impl Connection {
    async fn new(
        stream: TcpStream,
        wire: Wire,
        served: tokio::task::JoinHandle<()>,
        drain: CancellationToken,
    ) -> Self {
        let io = TokioIo::new(stream);
        let (sender, near) = match wire {
            Wire::Http1 => {
                let (sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
                let near = tokio::spawn(async move {
                    let _ = connection.await;
                });
                (Sender::Http1(sender), near)
            }
            Wire::Http2 => {
                let executor = TokioExecutor::new();
                let (sender, connection) = hyper::client::conn::http2::handshake(executor, io)
                    .await
                    .unwrap();
                let near = tokio::spawn(async move {
                    let _ = connection.await;
                });
                (Sender::Http2(sender), near)
            }
        };
        Self {
            sender,
            near,
            served,
            drain,
        }
    }

    /// Sends a request; what comes of it is the caller's to wait for.
    pub(super) fn start(&mut self, mut request: Request<Body>) -> Sending {
        match &mut self.sender {
            Sender::Http1(sender) => {
                let host = HeaderValue::from_static("cart.shop");
                request.headers_mut().insert("host", host);
                Box::pin(sender.send_request(request))
            }
            Sender::Http2(sender) => {
                let uri = format!("http://cart.shop{}", request.uri().path());
                *request.uri_mut() = uri.parse().unwrap();
                *request.version_mut() = http::Version::HTTP_2;
                Box::pin(sender.send_request(request))
            }
        }
    }

    pub(super) async fn send(&mut self, request: Request<Body>) -> Answer {
        let sending = self.start(request);
        let response = tokio::time::timeout(FAR, sending).await.unwrap().unwrap();
        let (head, body) = response.into_parts();
        let collected = tokio::time::timeout(FAR, body.collect()).await.unwrap();
        let (trailers, body) = match collected {
            Ok(all) => (all.trailers().cloned(), Ok(all.to_bytes())),
            Err(error) => (None, Err(error)),
        };
        if let Sender::Http1(sender) = &mut self.sender {
            let _ = tokio::time::timeout(FAR, sender.ready()).await;
        }
        Answer {
            status: head.status.as_u16(),
            headers: head.headers,
            body,
            trailers,
        }
    }

    pub(super) async fn get(&mut self, path: &str) -> Answer {
        self.send(request("GET", path, &[], "")).await
    }

    /// A unary gRPC call.
    pub(super) async fn call(&mut self, headers: &[(&str, &str)]) -> Answer {
        let mut all = vec![("content-type", "application/grpc"), ("te", "trailers")];
        all.extend(headers);
        self.send(request("POST", "/shop.Cart/Add", &all, "\0\0\0\0\x01x"))
            .await
    }

    /// The client goes away, and the engine has noticed.
    pub(super) async fn go_away(self) {
        self.near.abort();
        drop(self.sender);
        tokio::time::timeout(FAR, self.served)
            .await
            .unwrap()
            .unwrap();
    }
}

pub(super) fn request(
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Request<Body> {
    let body = Full::new(Bytes::from(body.to_owned())).map_err(|never: Infallible| match never {});
    let mut request = Request::new(body.boxed());
    *request.method_mut() = method.parse().unwrap();
    *request.uri_mut() = path.parse().unwrap();
    for (name, value) in headers {
        let name: http::HeaderName = name.parse().unwrap();
        request.headers_mut().append(name, value.parse().unwrap());
    }
    request
}

/// A rule for all requests, to these Services by weight.
pub(super) fn rule(backends: &[(&str, u32)]) -> Rule {
    let backend = |(service, weight): &(&str, u32)| {
        let target = BackendTarget::Service {
            name: name(service),
            port: 80,
        };
        Backend::new(target, *weight, Filters::default())
    };
    Rule {
        name: "HTTPRoute/shop/cart/0".into(),
        route: RouteId {
            kind: RouteKind::Http,
            name: name("cart"),
        },
        matches: vec![RequestMatch::path(PathMatch::prefix("/"))],
        filters: Filters::default(),
        backends: backends.iter().map(backend).collect(),
        timeouts: None,
        retry: None,
        session: None,
    }
}

/// Waits until it holds.
pub(super) async fn until(what: &str, holds: impl Fn() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let waited = tokio::time::timeout(FAR, waiting).await;
    assert!(waited.is_ok(), "{what}");
}
