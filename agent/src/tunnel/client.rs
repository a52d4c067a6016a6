//! One tunnel, as the client sees it.

use std::future::pending;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use h2::client::{Connection, SendRequest};
use http::StatusCode;
use parking_lot::Mutex;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, CommonState};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::error::{Stage, StreamReset, TunnelError};
use super::headers::{self, ConnectRequest};
use super::limits::{self, Limits};
use super::liveness::{Liveness, Transport, Watched, silence};
use super::peer::proven;
use super::pool::{TunnelKey, Tunnelled};
use super::stream::{Stalled, halves};
use super::tls::{self, TlsStream};
use crate::identity::WorkloadCertificate;
use crate::mesh::SpiffeId;

/// How many stalled senders a tunnel may have before new streams avoid it. A ztunnel peer gives a
/// stream 4 MiB of a window of 16 MiB, so a fourth would freeze it for all.
const STALLED_MAX: usize = 3;

/// A connection to one peer, on behalf of one source.
pub(super) struct Tunnel {
    pub(super) id: u64,
    pub(super) address: SocketAddr,
    pub(super) peer: SpiffeId,
    pub(super) serial: String,
    pub(super) established: SystemTime,
    /// Ends it at once, streams and all.
    pub(super) abort: CancellationToken,
    client: Arc<ClientConfig>,
    expires: SystemTime,
    liveness: Arc<Liveness>,
    stalled: Stalled,
    usage: Mutex<Usage>,
    idled: Notify,
}

/// Who uses a tunnel now.
struct Usage {
    /// `None` once it takes no new streams: h2 closes the connection after the last one.
    requests: Option<SendRequest<Bytes>>,
    streams: usize,
    idle_since: Instant,
    /// Reads at the time when a CONNECT had waited in vain: until there is another one, it is not
    /// given to new streams.
    suspected_at: Option<u64>,
}

/// How long a tunnel without streams is kept.
#[derive(Debug, Clone, Copy)]
pub(super) struct IdleBounds {
    pub(super) alone: Duration,
    /// Beside another that would take the next stream.
    pub(super) surplus: Duration,
}

/// How well a tunnel would serve one more stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fitness {
    /// Not at all.
    Full,
    /// As a last resort: some of its streams do not move.
    Stalled,
    /// Well.
    Good,
}

/// Why a CONNECT did not lead to a connection.
pub(super) enum ConnectFailure {
    /// The peer said no, or is alive and takes too long: another tunnel would change nothing.
    Final(TunnelError),
    /// The tunnel, not the peer's word: another tunnel may do.
    Tunnel(TunnelError),
}

/// A place for one stream in a tunnel.
pub(super) struct Place {
    tunnel: Arc<Tunnel>,
    requests: SendRequest<Bytes>,
    held: Held,
}

/// Counts as a stream of the tunnel until dropped.
struct Held(Arc<Tunnel>);

impl Drop for Held {
    fn drop(&mut self) {
        let mut state = self.0.usage.lock();
        state.streams -= 1;
        if state.streams == 0 {
            state.idle_since = Instant::now();
            drop(state);
            self.0.idled.notify_one();
        }
    }
}

/// A tunnel that nobody drives yet.
pub(super) struct Established<T: Transport> {
    pub(super) tunnel: Arc<Tunnel>,
    connection: Connection<TlsStream<Watched<T>>, Bytes>,
}

/// Secures a fresh TCP connection, and makes sure of who answers.
pub(super) async fn establish<T: Transport>(
    id: u64,
    key: &TunnelKey,
    certificate: &WorkloadCertificate,
    transport: T,
    bounds: &Limits,
) -> Result<Established<T>, TunnelError> {
    let address = key.address;
    let liveness = Liveness::new();
    let io = Watched::new(transport, liveness.clone());
    let shake = async {
        let name = ServerName::IpAddress(address.ip().into());
        let failed = |error| TunnelError::tls(address, error);
        let shaken = tls::connect(certificate.client.clone(), name, io).await;
        let shaken = shaken.map_err(failed)?;
        let peer = identify(key, shaken.session())?;
        let tls = shaken.into_stream().map_err(failed)?;
        let (requests, connection) = limits::client()
            .handshake::<_, Bytes>(tls)
            .await
            .map_err(|error| TunnelError::broken(address, error))?;
        Ok((peer, requests, connection))
    };
    let (peer, requests, connection) = match timeout(bounds.handshake, shake).await {
        Ok(done) => done?,
        Err(_) => {
            return Err(TunnelError::Timeout {
                address,
                stage: Stage::Handshake,
                after: bounds.handshake,
            });
        }
    };
    let tunnel = Arc::new(Tunnel {
        id,
        address,
        peer,
        serial: certificate.serial.clone(),
        established: SystemTime::now(),
        abort: CancellationToken::new(),
        client: certificate.client.clone(),
        expires: certificate.not_after,
        liveness,
        stalled: Stalled::default(),
        usage: Mutex::new(Usage {
            requests: Some(requests),
            streams: 0,
            idle_since: Instant::now(),
            suspected_at: None,
        }),
        idled: Notify::new(),
    });
    Ok(Established { tunnel, connection })
}

fn identify(key: &TunnelKey, session: &CommonState) -> Result<SpiffeId, TunnelError> {
    let address = key.address;
    let peer = proven(session, address)?;
    if !key.destinations.contains(&peer) {
        return Err(TunnelError::PeerIdentity {
            address,
            expected: key.destinations.clone(),
            actual: peer,
        });
    }
    Ok(peer)
}

impl<T: Transport> Established<T> {
    /// Moves the tunnel's frames until it ends.
    pub(super) async fn drive(
        self,
        idle: IdleBounds,
        is_surplus: impl Fn() -> bool,
        bounds: Limits,
    ) {
        let Self {
            tunnel,
            mut connection,
        } = self;
        let pings = connection.ping_pong();
        let silent = silence(
            pings,
            &tunnel.liveness,
            bounds.ping_interval,
            bounds.ping_timeout,
        );
        let retired = tunnel.retire_when_idle(idle, is_surplus);
        let mut announced = bounds.room.announced();
        tokio::pin!(silent, retired);
        loop {
            tokio::select! {
                end = &mut connection => {
                    match end {
                        Ok(()) => tracing::debug!("tunnel closed"),
                        Err(error) => tracing::debug!(%error, "tunnel lost"),
                    }
                    break;
                }
                () = &mut silent => {
                    tunnel.liveness.abort();
                    tracing::debug!(after = ?bounds.ping_timeout, "tunnel silent");
                    break;
                }
                () = tunnel.abort.cancelled() => {
                    tunnel.liveness.abort();
                    tracing::debug!("tunnel aborted");
                    break;
                }
                () = &mut retired => break,
                window = announced.next() => {
                    let taken = connection.set_initial_window_size(window);
                    announced.settle(window, taken);
                }
            }
        }
        tunnel.retire();
    }
}

impl Tunnel {
    /// Whether this certificate, or the same one with other roots, has taken the place of the
    /// tunnel's. An older one, in the hands of a straggler, has not.
    pub(super) fn is_replaced_by(&self, certificate: &WorkloadCertificate) -> bool {
        !Arc::ptr_eq(&self.client, &certificate.client) && self.expires <= certificate.not_after
    }

    /// Takes no new streams from now on, and is closed after the last.
    pub(super) fn retire(&self) {
        self.usage.lock().requests = None;
    }

    pub(super) fn is_retired(&self) -> bool {
        self.usage.lock().requests.is_none()
    }

    pub(super) fn streams(&self) -> usize {
        self.usage.lock().streams
    }

    pub(super) fn stalled(&self) -> usize {
        self.stalled.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Since when it has no stream.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let state = self.usage.lock();
        (state.streams == 0).then_some(state.idle_since)
    }

    pub(super) fn fitness(&self, limit: usize) -> Fitness {
        let mut state = self.usage.lock();
        let Some(requests) = &state.requests else {
            return Fitness::Full;
        };
        if state.streams >= limit.min(requests.current_max_send_streams()) {
            return Fitness::Full;
        }
        if let Some(reads) = state.suspected_at {
            if reads == self.liveness.reads() {
                return Fitness::Full;
            }
            state.suspected_at = None;
        }
        if self.stalled() >= STALLED_MAX {
            Fitness::Stalled
        } else {
            Fitness::Good
        }
    }

    /// A place for one more stream, unless it was retired or filled meanwhile.
    pub(super) fn claim(self: &Arc<Self>, limit: usize) -> Option<Place> {
        let mut state = self.usage.lock();
        let requests = state.requests.clone()?;
        if state.streams >= limit {
            return None;
        }
        state.streams += 1;
        Some(Place {
            tunnel: self.clone(),
            requests,
            held: Held(self.clone()),
        })
    }

    /// Whether it is surplus is asked again and again: others may get room.
    async fn retire_when_idle(&self, bounds: IdleBounds, is_surplus: impl Fn() -> bool) {
        loop {
            let Some(since) = self.idle_since() else {
                self.idled.notified().await;
                continue;
            };
            let idle = since.elapsed();
            if idle >= bounds.alone || (idle >= bounds.surplus && is_surplus()) {
                let mut state = self.usage.lock();
                if state.streams == 0 {
                    state.requests = None;
                    break;
                }
                continue;
            }
            let next_look = match idle < bounds.surplus {
                true => since + bounds.surplus,
                false => Instant::now() + bounds.surplus,
            };
            tokio::time::sleep_until(next_look.min(since + bounds.alone)).await;
        }
        pending().await
    }

    /// To be called when a CONNECT has waited for [`Limits::nudge`], before which there were so many reads. Returns
    /// if the peer gives no sign of life in time.
    async fn silence_after_connect(&self, before: u64, bounds: &Limits) {
        if self.liveness.reads() == before {
            self.liveness.nudge();
            tokio::time::sleep(bounds.silence).await;
        }
        if self.liveness.reads() != before {
            pending().await
        }
    }
}

/// A CONNECT that waits for its answer. Given up before anything came back, it leaves a suspicion.
struct Waiting<'a> {
    tunnel: &'a Tunnel,
    reads: u64,
    since: Instant,
    nudge: Duration,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let silent = self.tunnel.liveness.reads() == self.reads;
        if silent && self.since.elapsed() >= self.nudge {
            self.tunnel.usage.lock().suspected_at = Some(self.reads);
            self.tunnel.liveness.nudge();
        }
    }
}

impl Place {
    pub(super) fn tunnel(&self) -> &Arc<Tunnel> {
        &self.tunnel
    }

    /// Asks for a connection through the tunnel, and waits for the answer.
    pub(super) async fn connect(
        self,
        request: &ConnectRequest,
        bounds: &Limits,
    ) -> Result<Tunnelled, ConnectFailure> {
        let Self {
            tunnel,
            requests,
            held,
        } = self;
        let address = tunnel.address;
        let broken = |error: h2::Error| ConnectFailure::Tunnel(TunnelError::broken(address, error));
        let timed_out = |after| TunnelError::Timeout {
            address,
            stage: Stage::Answer,
            after,
        };
        let limit = bounds
            .answer
            .min(request.answer_within.unwrap_or(bounds.answer));
        let request = request.to_http().map_err(|error| {
            ConnectFailure::Final(TunnelError::Broken {
                address,
                reset: StreamReset::local(&error.to_string()),
            })
        })?;

        let waiting = Waiting {
            tunnel: &tunnel,
            reads: tunnel.liveness.reads(),
            since: Instant::now(),
            nudge: bounds.nudge,
        };
        let mut requests = requests.ready().await.map_err(broken)?;
        let (mut response, send) = requests.send_request(request, false).map_err(broken)?;
        drop(requests);
        let (sent, before) = (Instant::now(), tunnel.liveness.reads());
        // Nearly every answer comes before anything else has to be done than to wait for it: one timer for those,
        // and room for the others where they need it.
        let soon = sent + bounds.nudge.min(limit);
        let response = match timeout_at(soon, &mut response).await {
            Ok(answer) => answer.map_err(broken)?,
            Err(_) => {
                let late = async {
                    tokio::select! {
                        biased;
                        answer = timeout_at(sent + limit, &mut response) => match answer {
                            Ok(answer) => answer.map_err(broken),
                            Err(_) => Err(ConnectFailure::Final(timed_out(limit))),
                        },
                        () = tunnel.silence_after_connect(before, bounds) => {
                            Err(ConnectFailure::Tunnel(timed_out(bounds.nudge + bounds.silence)))
                        }
                    }
                };
                Box::pin(late).await?
            }
        };
        drop(waiting);

        let (head, receive) = response.into_parts();
        if head.status != StatusCode::OK {
            return Err(ConnectFailure::Final(TunnelError::Refused {
                status: head.status.as_u16(),
            }));
        }
        let (send, receive) = halves(send, receive, tunnel.stalled.clone(), Box::new(held));
        Ok(Tunnelled {
            send,
            receive,
            peer: tunnel.peer.clone(),
            baggage: headers::baggage(&head.headers),
        })
    }
}
