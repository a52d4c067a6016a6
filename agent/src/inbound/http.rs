//! HTTP to an app of this node: request by request, over connections that show the app its client's
//! address.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, Request, Response, StatusCode, request};
use hyper::body::Incoming;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use super::gate::{Caller, Refused, RequestGate};
use crate::http::{
    BodyEnd, BodyWatch, ClientView, Connected, Dialect, HttpCounters, HttpIo, NeverSent,
    PoolLimits, ProxyBody, Replay, RequestId, ResetNow, SendError, Served, ServerContext,
    ServerLimits, Side, Terms, Upstreams, Wire, own_response_in, request_info, serve_http,
    to_downstream, to_upstream,
};
use crate::mesh::Workload;
use crate::telemetry::{ByteCount, RequestEnd, RequestRecord, Requester, ResponseFlag, Security};

const GRPC_STATUS: &str = "grpc-status";

/// What serves HTTP of all connections.
pub struct HttpService {
    /// Bounds of a client's connection.
    pub limits: ServerLimits,
    /// What the guards refused.
    pub counters: Arc<HttpCounters>,
    /// Who may ask for what.
    pub gate: Arc<dyn RequestGate>,
}

impl Default for HttpService {
    /// Default bounds, counters of its own, and every request admitted.
    fn default() -> Self {
        Self {
            limits: ServerLimits::default(),
            counters: Arc::default(),
            gate: Arc::new(super::gate::Open),
        }
    }
}

/// Reaches the app anew, when its first connection has ended.
pub(super) trait Redial: Send + Sync + 'static {
    /// A connection to the app, or why there is none.
    fn redial(&self) -> impl Future<Output = Result<TcpStream, String>> + Send;
}

/// A client that talks HTTP to an app.
pub(super) struct Visit<R> {
    pub(super) redial: R,
    pub(super) caller: Caller,
    pub(super) app: SocketAddr,
    pub(super) workload: Arc<Workload>,
    pub(super) security: Security,
    pub(super) requester: Arc<Requester>,
    pub(super) gate: Arc<dyn RequestGate>,
    pub(super) upstreams: Arc<Upstreams>,
}

/// Tokens that end a connection: in order, and at once.
pub(super) struct Stops<'a> {
    pub(super) drain: &'a CancellationToken,
    pub(super) gone: &'a CancellationToken,
}

/// How long idle connections to the app are kept: as long as the client keeps its own, which is
/// bounded by [`ServerLimits::idle`].
pub(super) fn upstreams(wire: Wire) -> Arc<Upstreams> {
    let kept = PoolLimits {
        idle: Duration::MAX,
        idle_h2: Duration::MAX,
        ..PoolLimits::default()
    };
    Upstreams::new(wire, kept)
}

/// Serves a client's connection to its end; `app` is the connection that was made for it.
pub(super) async fn serve<R: Redial>(
    service: &HttpService,
    visit: Visit<R>,
    wire: Wire,
    client: HttpIo,
    app: TcpStream,
    bytes: Arc<ByteCount>,
    stops: Stops<'_>,
) -> Result<Served, SendError> {
    visit.upstreams.adopt(app.into()).await?;
    let visit = Arc::new(visit);
    let context = ServerContext {
        limits: &service.limits,
        counters: &service.counters,
        bytes,
        requester: Some(visit.requester.clone()),
    };
    let answer = move |request| visit.clone().answer(request);
    Ok(serve_http(client, wire, context, answer, stops.drain, stops.gone).await)
}

/// Why there is no answer of the app's.
#[derive(Debug, thiserror::Error)]
enum Unanswered {
    #[error("no connection to the app: {0}")]
    Unreached(String),
    #[error(transparent)]
    Send(#[from] SendError),
}

impl<R: Redial> Visit<R> {
    async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<ProxyBody>, ResetNow> {
        let (mut head, body) = request.into_parts();
        let id = RequestId::of(&head.headers);
        let dialect = Dialect::of(&head.headers);
        let mut record = self.requester.request(request_info(&head, dialect, &id));
        record.endpoint(self.app, Some(&self.workload), self.security);
        if let Err(refused) = self.gate.admit(&head, &self.caller) {
            return Ok(refuse(record, dialect, &refused));
        }
        let view = ClientView {
            address: self.caller.address.ip(),
            side: Side::Destination,
        };
        to_upstream(&mut head, &view, &id);
        // Nothing is kept of the body: only what was never sent is sent again.
        let replay = Replay::new(body, 0);
        let answered = self.send(head, &replay).await;
        record.bytes().add_received(replay.taken());
        match answered {
            Ok(answer) => Ok(pass_on(record, answer, replay)),
            Err(Unanswered::Send(SendError::BodyEnded(_))) => {
                record.close(RequestEnd::ResetBySource);
                Err(ResetNow)
            }
            // What became of the request nobody knows, and the client's side decides what to do:
            // it sees what it would see without a proxy.
            Err(error @ Unanswered::Send(SendError::Reset(_))) => {
                record.flag(ResponseFlag::UpstreamReset);
                record.detail(&crate::telemetry::error_chain(&error));
                record.close(RequestEnd::ResetByDestination);
                Err(ResetNow)
            }
            Err(error) => {
                let (status, flag) = match &error {
                    Unanswered::Send(SendError::Malformed(_)) => {
                        (StatusCode::BAD_GATEWAY, ResponseFlag::UpstreamMalformed)
                    }
                    _ => (StatusCode::SERVICE_UNAVAILABLE, ResponseFlag::ConnectFailed),
                };
                record.detail(&crate::telemetry::error_chain(&error));
                Ok(refuse(record, dialect, &Refused { status, flag }))
            }
        }
    }

    /// Sends a request to the app; once more if the first connection had ended before it.
    async fn send(
        &self,
        head: request::Parts,
        replay: &Replay,
    ) -> Result<Response<crate::http::UpstreamBody>, Unanswered> {
        let connect = || async {
            let socket = self.redial.redial().await.map_err(Unanswered::Unreached)?;
            Ok::<_, Unanswered>(Connected::from(socket))
        };
        let lease = self.upstreams.get(&Terms::default(), connect).await?;
        if !lease.is_reused() {
            let request = Request::from_parts(head, replay.attempt());
            return Ok(lease.send(request).await?);
        }
        let copy = (!lease.gives_back()).then(|| head.clone());
        let request = Request::from_parts(head, replay.attempt());
        let unsent = match lease.send_or_return(request).await {
            Ok(answer) => return Ok(answer),
            Err(crate::http::Unanswered {
                error: SendError::NeverSent(_),
                unsent,
            }) => unsent,
            Err(unanswered) => return Err(unanswered.error.into()),
        };
        let unsent = unsent.map(|request| request.into_parts().0);
        // One of the two is there, as the lease said.
        let Some(head) = unsent.or(copy) else {
            return Err(SendError::NeverSent(NeverSent::ClosedBeforeSent).into());
        };
        let lease = self.upstreams.get(&Terms::default(), connect).await?;
        let request = Request::from_parts(head, replay.attempt());
        Ok(lease.send(request).await?)
    }
}

/// Answers in the app's place.
fn refuse(mut record: RequestRecord, dialect: Dialect, refused: &Refused) -> Response<ProxyBody> {
    let Refused { status, flag } = *refused;
    record.flag(flag);
    let answer = own_response_in(dialect, status, flag.as_str());
    record.answered(answer.status());
    if let Some(status) = grpc_status(answer.headers()) {
        record.grpc_status(status);
    }
    record.close(RequestEnd::Complete);
    answer
}

fn pass_on(
    mut record: RequestRecord,
    answer: Response<crate::http::UpstreamBody>,
    replay: Replay,
) -> Response<ProxyBody> {
    let (mut head, body) = answer.into_parts();
    record.answered(head.status);
    if let Some(status) = grpc_status(&head.headers) {
        record.grpc_status(status);
    }
    to_downstream(&mut head);
    let counted = replay.taken();
    let watch = Watch {
        bytes: record.bytes().clone(),
        record: Some(record),
        replay,
        counted,
    };
    let body = ProxyBody::from(body).watched(Box::new(watch));
    Response::from_parts(head, body)
}

fn grpc_status(headers: &HeaderMap) -> Option<u32> {
    headers.get(GRPC_STATUS)?.to_str().ok()?.parse().ok()
}

/// Keeps a request's record until its answer has ended.
struct Watch {
    bytes: Arc<ByteCount>,
    record: Option<RequestRecord>,
    replay: Replay,
    /// Bytes of the request that were counted already.
    counted: u64,
}

impl BodyWatch for Watch {
    fn data(&mut self, bytes: usize) {
        self.bytes.add_sent(bytes as u64);
    }

    fn trailers(&mut self, trailers: &mut HeaderMap) {
        if let (Some(record), Some(status)) = (&mut self.record, grpc_status(trailers)) {
            record.grpc_status(status);
        }
    }

    fn end(&mut self, end: BodyEnd) {
        self.bytes
            .add_received(self.replay.taken().saturating_sub(self.counted));
        if let Some(record) = self.record.take() {
            record.close(match end {
                BodyEnd::Complete => RequestEnd::Complete,
                BodyEnd::Broken => RequestEnd::ResetByDestination,
                BodyEnd::Abandoned => RequestEnd::ResetBySource,
            });
        }
    }
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
