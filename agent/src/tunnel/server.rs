//! The server's side: one TLS connection that arrived on port 15008 of a local pod.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use h2::server::{Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::{Method, Request, Response};
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::error::{Refusal, Stage, StreamReset, TunnelError};
use super::headers::{self, Forwarded, Hearsay};
use super::limits::{self, Limits, MAX_STREAMS};
use super::liveness::{Liveness, Transport, Watched, silence};
use super::peer::proven;
use super::stream::{Stalled, TunnelReceive, TunnelSend, halves};
use super::tls::{self, TlsStream};
use crate::fairness;
use crate::identity::WorkloadCertificate;
use crate::mesh::SpiffeId;

/// The port of HBONE.
pub const HBONE_PORT: u16 = 15008;

/// Ports that are the agent's, not an app's: admin, ztunnel's outbound and inbound, HBONE,
/// metrics, readiness. Never dialled for a peer.
const OWN_PORTS: [u16; 6] = [15000, 15001, 15006, HBONE_PORT, 15020, 15021];

/// Connections of one tunnel that are handled at a time, those included that the peer has reset
/// while their handler still winds up. Beyond it, REFUSED_STREAM.
const MAX_HANDLED: usize = 2 * MAX_STREAMS as usize;

/// Streams that a peer may reset before they were answered: so many at once, and so many more per
/// second. A full tunnel of connections that all run into a 1 s timeout stays far below; a rapid
/// reset is cut off with GOAWAY.
const RESET_BURST: f64 = 512.0;
const RESETS_PER_SECOND: f64 = 256.0;

/// Decides about connections, and carries them.
pub trait TunnelService: Send + Sync + 'static {
    /// Handles one CONNECT to its end. Dropped if the peer gives up before it was answered; not
    /// after that.
    fn connect(&self, incoming: Incoming) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// A CONNECT that waits for its answer. Dropped unanswered, it is reset.
pub struct Incoming {
    /// Who asks: from the certificate.
    pub peer: SpiffeId,
    /// Where the TLS connection comes from.
    pub peer_address: SocketAddr,
    /// What is asked for: this pod's address, the app's port.
    pub authority: SocketAddr,
    /// What the peer says about the client: hearsay.
    pub forwarded: Option<Forwarded>,
    /// What the peer says about itself (W3C baggage): hearsay.
    pub baggage: Option<String>,
    /// W3C trace context.
    pub traceparent: Option<String>,
    respond: Arc<Mutex<Option<Respond>>>,
    receive: RecvStream,
    permit: Arc<OwnedSemaphorePermit>,
}

type Respond = SendResponse<Bytes>;

/// Serves a connection that was accepted on `local`, port 15008, with the default [`Limits`].
///
/// Returns when it ended; handlers may still be winding up then. After `drain` the peer is told
/// to open no more (GOAWAY), and what is open may go on for a bounded time. Then, as with any
/// loss of the tunnel, open streams are reset.
pub async fn serve(
    stream: TcpStream,
    certificate: Arc<WorkloadCertificate>,
    local: SocketAddr,
    service: Arc<dyn TunnelService>,
    drain: CancellationToken,
) -> Result<(), TunnelError> {
    let peer_address = stream.peer_addr().map_err(|error| TunnelError::Broken {
        address: local,
        reset: StreamReset::local(&error.to_string()),
    })?;
    let side = Side {
        local,
        peer_address,
        service,
        bounds: Limits::default(),
    };
    serve_with(stream, certificate, side, drain).await
}

/// What a served connection needs to know.
pub struct Side {
    /// The pod's address that was connected to.
    pub local: SocketAddr,
    /// Where the connection comes from.
    pub peer_address: SocketAddr,
    /// Who handles its streams.
    pub service: Arc<dyn TunnelService>,
    /// Its time bounds.
    pub bounds: Limits,
}

/// As [`serve`], over any transport and with any bounds.
pub async fn serve_with<T: Transport>(
    transport: T,
    certificate: Arc<WorkloadCertificate>,
    side: Side,
    drain: CancellationToken,
) -> Result<(), TunnelError> {
    let liveness = Liveness::new();
    let io = Watched::new(transport, liveness.clone());
    let shake = handshake(io, &certificate, side.peer_address);
    let (peer, connection) = match timeout(side.bounds.handshake, shake).await {
        Ok(done) => done?,
        Err(_) => {
            return Err(TunnelError::Timeout {
                address: side.peer_address,
                stage: Stage::Handshake,
                after: side.bounds.handshake,
            });
        }
    };
    let served = Served {
        side,
        peer,
        connection,
        liveness,
        handled: Arc::new(Semaphore::new(MAX_HANDLED)),
        resets: Arc::new(Mutex::new(ResetAllowance::new(Instant::now()))),
        flooded: CancellationToken::new(),
    };
    served.run(drain).await
}

async fn handshake<T: Transport>(
    io: Watched<T>,
    certificate: &WorkloadCertificate,
    address: SocketAddr,
) -> Result<(SpiffeId, Connection<TlsStream<Watched<T>>, Bytes>), TunnelError> {
    let failed = |error| TunnelError::tls(address, error);
    let shaken = tls::accept(certificate.server.clone(), io).await;
    let shaken = shaken.map_err(failed)?;
    let peer = proven(shaken.session(), address)?;
    let tls = shaken.into_stream().map_err(failed)?;
    let connection = limits::server()
        .handshake(tls)
        .await
        .map_err(|error| TunnelError::broken(address, error))?;
    Ok((peer, connection))
}

/// A tunnel in service.
struct Served<T: Transport> {
    side: Side,
    peer: SpiffeId,
    connection: Connection<TlsStream<Watched<T>>, Bytes>,
    liveness: Arc<Liveness>,
    handled: Arc<Semaphore>,
    resets: Arc<Mutex<ResetAllowance>>,
    flooded: CancellationToken,
}

impl<T: Transport> Served<T> {
    async fn run(mut self, drain: CancellationToken) -> Result<(), TunnelError> {
        let address = self.side.peer_address;
        let bounds = self.side.bounds.clone();
        let pings = self.connection.ping_pong();
        let liveness = self.liveness.clone();
        let silent = silence(pings, &liveness, bounds.ping_interval, bounds.ping_timeout);
        tokio::pin!(silent);
        let flooded = self.flooded.clone();
        let mut announced = bounds.room.announced();
        let mut draining = Drain::NotYet;
        let mut idle = IdleCheck::new(bounds.server_idle);
        loop {
            tokio::select! {
                accepted = self.connection.accept() => match accepted {
                    Some(Ok((request, respond))) => {
                        idle.accepted += 1;
                        self.take(request, respond);
                    }
                    // Without a stream in it, however it ends is in order.
                    Some(Err(error)) if error.is_io() && self.is_idle() => return Ok(()),
                    Some(Err(error)) => return Err(TunnelError::broken(address, error)),
                    None => return Ok(()),
                },
                () = &mut silent => {
                    liveness.abort();
                    return Err(TunnelError::Silent { address, after: bounds.ping_timeout });
                }
                () = flooded.cancelled() => {
                    return self.expel("resets", Reason::ENHANCE_YOUR_CALM).await;
                }
                () = drain.cancelled(), if draining == Drain::NotYet => {
                    self.connection.graceful_shutdown();
                    draining = Drain::Until(Instant::now() + bounds.drain);
                }
                () = sleep_until(draining.deadline()), if matches!(draining, Drain::Until(_)) => {
                    // Open streams end as reset: the agent that serves them goes away.
                    self.connection.abrupt_shutdown(Reason::INTERNAL_ERROR);
                    draining = Drain::Over;
                }
                window = announced.next() => {
                    let taken = self.connection.set_initial_window_size(window);
                    announced.settle(window, taken);
                }
                () = sleep_until(idle.next), if draining == Drain::NotYet => {
                    if idle.is_over(self.is_idle()) {
                        self.connection.graceful_shutdown();
                        draining = Drain::Until(Instant::now() + bounds.drain);
                    }
                }
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.handled.available_permits() == MAX_HANDLED
    }

    fn take(&self, request: Request<RecvStream>, mut respond: Respond) {
        let Ok(permit) = self.handled.clone().try_acquire_owned() else {
            respond.send_reset(Reason::REFUSED_STREAM);
            return;
        };
        let authority = match asked_for(&request, self.side.local) {
            Ok(authority) => authority,
            Err(refusal) => {
                tracing::debug!(peer = %self.peer, address = %self.side.peer_address, ?refusal,
                    method = %request.method(), "CONNECT refused");
                refuse(&mut respond, refusal);
                return;
            }
        };
        let (head, receive) = request.into_parts();
        let hearsay = Hearsay::read(&head.headers);
        let respond = Arc::new(Mutex::new(Some(respond)));
        let incoming = Incoming {
            peer: self.peer.clone(),
            peer_address: self.side.peer_address,
            authority,
            forwarded: hearsay.forwarded,
            baggage: hearsay.baggage,
            traceparent: hearsay.traceparent,
            respond: respond.clone(),
            receive,
            permit: Arc::new(permit),
        };
        let handler = self.side.service.connect(incoming);
        let (resets, flooded) = (self.resets.clone(), self.flooded.clone());
        fairness::spawn(async move {
            tokio::select! {
                () = handler => {
                    if let Some(mut respond) = respond.lock().take() {
                        respond.send_reset(Reason::INTERNAL_ERROR);
                    }
                }
                () = given_up(&respond) => {
                    if !resets.lock().allow(Instant::now()) {
                        flooded.cancel();
                    }
                }
            }
        });
    }

    /// Closes the tunnel with a reason, in a bounded time.
    async fn expel(mut self, what: &'static str, reason: Reason) -> Result<(), TunnelError> {
        let address = self.side.peer_address;
        tracing::warn!(peer = %self.peer, %address, what, "tunnel closed: flood");
        self.connection.abrupt_shutdown(reason);
        let closed = poll_fn(|cx| self.connection.poll_closed(cx));
        if timeout(Duration::from_secs(1), closed).await.is_err() {
            self.liveness.abort();
        }
        Err(TunnelError::Flood { address, what })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Drain {
    NotYet,
    Until(Instant),
    Over,
}

impl Drain {
    /// Only asked for while it stands.
    fn deadline(self) -> Instant {
        match self {
            Self::Until(deadline) => deadline,
            Self::NotYet | Self::Over => Instant::now(),
        }
    }
}

/// Looks now and then whether there was any stream since it last looked.
struct IdleCheck {
    every: Duration,
    next: Instant,
    accepted: u64,
    quiet_at: Option<u64>,
}

impl IdleCheck {
    fn new(every: Duration) -> Self {
        Self {
            every,
            next: Instant::now() + every,
            accepted: 0,
            quiet_at: None,
        }
    }

    /// Two looks in a row without a stream, then or between.
    fn is_over(&mut self, idle: bool) -> bool {
        self.next = Instant::now() + self.every;
        let quiet = idle.then_some(self.accepted);
        let over = quiet.is_some() && quiet == self.quiet_at;
        self.quiet_at = quiet;
        over
    }
}

/// The app that a request asks for, if it is one for this pod.
fn asked_for<B>(request: &Request<B>, local: SocketAddr) -> Result<SocketAddr, Refusal> {
    let extended = request.extensions().get::<h2::ext::Protocol>().is_some();
    if request.method() != Method::CONNECT || extended {
        return Err(Refusal::BadRequest);
    }
    let authority = request
        .uri()
        .authority()
        .and_then(|authority| headers::parse_address(authority.as_str()))
        .ok_or(Refusal::BadRequest)?;
    if authority.ip() != local.ip().to_canonical() {
        return Err(Refusal::BadRequest);
    }
    if OWN_PORTS.contains(&authority.port()) {
        return Err(Refusal::Unavailable);
    }
    Ok(authority)
}

/// Returns if the peer resets the stream, or the tunnel is lost, before the answer.
async fn given_up(respond: &Mutex<Option<Respond>>) {
    poll_fn(|cx| match respond.lock().as_mut() {
        Some(respond) => respond.poll_reset(cx).map(|_| ()),
        // Answered: from now on the handler learns it by itself.
        None => Poll::Pending,
    })
    .await
}

fn refuse(respond: &mut Respond, refusal: Refusal) {
    let mut response = Response::new(());
    *response.status_mut() = refusal.status();
    if let Err(error) = respond.send_response(response, true) {
        tracing::debug!(%error, "cannot answer CONNECT");
    }
}

impl Incoming {
    /// Answers 200: only after the app was dialled. `baggage` is about the destination.
    pub fn accept(self, baggage: Option<&str>) -> Result<(TunnelSend, TunnelReceive), StreamReset> {
        let Self {
            respond,
            receive,
            permit,
            ..
        } = self;
        let Some(mut respond) = respond.lock().take() else {
            return Err(StreamReset::local("already answered"));
        };
        let mut response = Response::new(());
        headers::set_baggage(response.headers_mut(), baggage);
        let send = respond.send_response(response, false)?;
        Ok(halves(send, receive, Stalled::default(), Box::new(permit)))
    }

    /// Answers with a refusal.
    pub fn refuse(self, refusal: Refusal) {
        if let Some(mut respond) = self.respond.lock().take() {
            refuse(&mut respond, refusal);
        }
    }
}

/// A token bucket over streams that were reset before their answer.
struct ResetAllowance {
    left: f64,
    at: Instant,
}

impl ResetAllowance {
    fn new(now: Instant) -> Self {
        Self {
            left: RESET_BURST,
            at: now,
        }
    }

    fn allow(&mut self, now: Instant) -> bool {
        let earned = now.duration_since(self.at).as_secs_f64() * RESETS_PER_SECOND;
        self.left = (self.left + earned).min(RESET_BURST) - 1.0;
        self.at = now;
        self.left >= 0.0
    }
}
