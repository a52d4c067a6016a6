//! Connections whose bytes mean nothing to the agent: choose an endpoint, connect, relay, judge.

use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use tokio::net::TcpStream;

use super::Outbound;
use super::clock::Clock;
use super::connect::{Failure, Upstream};
use super::destinations::{DestinationId, EndpointId, Reachable, Route, RouteKey, Traffic};
use super::target::Target;
use super::tries::{Tries, no_endpoint};
use crate::capture::{Capture, EnrolledPod, OfPod};
use crate::http::{Crowded, Place, Places};
use crate::mesh::route::{BackendTarget, StreamRule};
use crate::mesh::{ObjectName, Snapshot, StreamTimeouts, TrafficPolicy};
use crate::relay::{self, Ended, Peer};
use crate::resilience::breaker::Permit;
use crate::resilience::destination::Attempt;
use crate::resilience::ejection::SourceId;
use crate::resilience::{self, Outcome, Timestamp};
use crate::telemetry::{ByteCount, Connection, FailureReason};
use crate::tunnel::Tunnelled;

/// A connection that lives for so long is served well. One that the server resets before, without
/// a byte of an answer, was not.
const SERVED_AFTER: Duration = Duration::from_secs(1);

/// Whose connection it is, and where it wants to go.
pub(super) struct Origin {
    pub(super) pod: Arc<EnrolledPod>,
    pub(super) capture: Arc<Capture>,
    pub(super) peer: SocketAddr,
    pub(super) local: SocketAddr,
    pub(super) target: Target,
    pub(super) connection: Connection,
}

/// An upstream connection, and what waits for its outcome.
pub(super) struct Connected {
    upstream: Upstream,
    judged: Option<Judged>,
    limits: StreamTimeouts,
}

/// A destination, as one connection may use it.
struct Bound {
    places: Option<Arc<Places>>,
    route: Arc<Route>,
    reachable: Reachable,
    policy: Arc<TrafficPolicy>,
}

/// What an outcome is told to, of a connection to a Service. Dropped, it tells of no verdict.
struct Judged {
    attempt: Attempt<EndpointId>,
    permit: Option<Permit>,
    /// Its place among the connections that are open.
    _place: Option<Place>,
}

impl Judged {
    fn settle(&mut self, outcome: Outcome, now: Timestamp) {
        self.attempt.settle(outcome, now);
        if let Some(permit) = self.permit.take() {
            permit.finish(outcome, now);
        }
    }
}

impl Outbound {
    /// Connects to the target, by its routes, and elsewhere if an endpoint fails.
    pub(super) async fn connect(
        &self,
        origin: &Origin,
        snapshot: &Snapshot,
        sni: Option<&str>,
    ) -> Result<Connected, Failure> {
        let bound = match &origin.target {
            Target::Service { service, port } => {
                self.route(origin, snapshot, &service.name, port.port, sni)?
            }
            Target::Pod(endpoint) => {
                // There is no other pod that has this address.
                let limit = snapshot.config().last_connect_limit();
                return Ok(Connected {
                    upstream: self.connect_to(origin, snapshot, endpoint, limit).await?,
                    judged: None,
                    limits: StreamTimeouts::default(),
                });
            }
        };
        self.connect_within(origin, snapshot, &bound).await
    }

    /// Where connections to a Service's port go: a backend of the TLSRoute or TCPRoute that is
    /// attached to it, else its own endpoints.
    fn route(
        &self,
        origin: &Origin,
        snapshot: &Snapshot,
        service: &ObjectName,
        port: u16,
        sni: Option<&str>,
    ) -> Result<Bound, Failure> {
        let client = origin.pod.workload();
        let routes = snapshot.stream_routes(service, port, &client.name.namespace);
        let Some(routes) = routes else {
            return self.bound(origin, snapshot, None, service, port);
        };
        let no_route = |detail: &str| Failure::new(FailureReason::NoRoute, detail);
        let rule = routes.select(sni);
        let rule = rule.ok_or_else(|| no_route("no rule of the attached routes is for it"))?;
        let backend = rule.choose(&mut rand::rng());
        match backend.map(|backend| &backend.target) {
            Some(BackendTarget::Service { name, port }) => {
                self.bound(origin, snapshot, Some(rule), name, *port)
            }
            Some(BackendTarget::Invalid { reason }) => Err(no_route(&format!(
                "{}: invalid backend: {reason}",
                rule.name
            ))),
            None => Err(no_route(&format!("{} leads to no backend", rule.name))),
        }
    }

    fn bound(
        &self,
        origin: &Origin,
        snapshot: &Snapshot,
        rule: Option<&Arc<StreamRule>>,
        service: &ObjectName,
        port: u16,
    ) -> Result<Bound, Failure> {
        let now = self.destinations.clock().now();
        let id = DestinationId {
            service: service.clone(),
            port,
            traffic: Traffic::Connections,
        };
        let destination = self.destinations.of(&id, snapshot);
        let destination = destination.ok_or_else(no_endpoint)?;
        let policy = snapshot.policy_of(service, port, rule.map(|rule| &rule.route));
        let settings = &policy.settings;
        let key = rule.map_or(RouteKey::Tcp, |rule| RouteKey::Rule(rule.name.clone()));
        let route = destination.route(&key, &settings.breaker, &settings.limits, now);
        let source = SourceId(origin.pod.netns_cookie());
        let client = origin.pod.workload();
        Ok(Bound {
            reachable: destination.reachable(&client, source, origin.local, now),
            places: destination.places(),
            route,
            policy,
        })
    }

    /// Asks the breaker, waits for a place, then tries endpoints as often as the policy allows.
    async fn connect_within(
        &self,
        origin: &Origin,
        snapshot: &Snapshot,
        bound: &Bound,
    ) -> Result<Connected, Failure> {
        let Bound {
            places,
            route,
            reachable,
            policy,
        } = bound;
        let clock = self.destinations.clock();
        let permit = route.breaker.admit(clock.now()).map_err(|open| {
            let detail = format!("{open} for {}", route.breaker.name());
            Failure::new(FailureReason::CircuitOpen, detail)
        })?;
        let opened = async {
            let place = match places {
                None => None,
                Some(places) => {
                    let limit = policy.connect_limit(snapshot.config());
                    Some(place_within(places, limit).await?)
                }
            };
            let tries = Tries {
                reachable,
                policy,
                config: snapshot.config(),
                clock,
            };
            let open = |endpoint, limit| async move {
                self.connect_to(origin, snapshot, &endpoint, limit).await
            };
            let (attempt, upstream) = tries.run(open).await?;
            Ok::<_, Failure>((place, attempt, upstream))
        };
        match opened.await {
            Ok((place, attempt, upstream)) => Ok(Connected {
                upstream,
                judged: Some(Judged {
                    attempt,
                    permit: Some(permit),
                    _place: place,
                }),
                limits: policy.streams,
            }),
            Err(failure) => {
                permit.finish(failure.outcome(), clock.now());
                Err(failure)
            }
        }
    }

    async fn connect_to(
        &self,
        origin: &Origin,
        snapshot: &Snapshot,
        endpoint: &EndpointId,
        limit: Duration,
    ) -> Result<Upstream, Failure> {
        let way = self
            .dialer
            .way(&origin.pod, &origin.capture, snapshot, endpoint)?;
        origin.connection.update(|info| {
            info.destination = way.party();
            info.security = way.security();
        });
        let service = origin.target.service();
        self.dialer
            .open(
                &origin.pod,
                &origin.capture,
                &way,
                origin.peer,
                service,
                limit,
            )
            .await
    }
}

/// Relays to the end of the connection, and tells how the endpoint did. If it was silent or lasted for longer than the
/// policy allows, it is reset.
///
/// This is in memory for as long as a connection idles. So it is no `async fn`, which would hold its arguments twice,
/// and what few connections need, or only for a moment, is boxed.
pub(super) fn relay(
    stream: TcpStream,
    connected: Connected,
    pod: Arc<EnrolledPod>,
    connection: Connection,
    clock: Clock,
) -> impl Future<Output = ()> + Send {
    let Connected {
        upstream,
        mut judged,
        limits,
    } = connected;
    let bytes = connection.bytes().clone();
    let mut relay = carry(stream, upstream, pod, bytes.clone());
    let mut overdue = is_limited(&limits).then(|| Box::pin(overdue(limits, bytes)));
    async move {
        let mut ended = None;
        if let Some(judged) = &mut judged {
            judged.attempt.answered(clock.now());
            let mut served = Box::pin(tokio::time::sleep(SERVED_AFTER));
            let told = tokio::select! {
                outcome = end_of(&mut relay, &mut overdue) => {
                    ended = Some(outcome);
                    outcome_of(outcome, connection.bytes())
                }
                () = &mut served => Outcome::Success,
            };
            judged.settle(told, clock.now());
        }
        let ended = match ended {
            Some(ended) => ended,
            // It still counts as load.
            None => end_of(&mut relay, &mut overdue).await,
        };
        // One that is overdue ends here. Whoever hears of an end finds everything free again.
        drop((relay, judged));
        match ended {
            Some(ended) => connection.close(ended.into()),
            None => connection.fail(FailureReason::Idle, &"by the policy of its destination"),
        }
    }
}

/// A place among the connections of a destination, by its turn and within this time.
async fn place_within(places: &Arc<Places>, limit: Duration) -> Result<Place, Failure> {
    let taken = tokio::time::timeout(limit, places.take()).await;
    taken
        .unwrap_or(Err(Crowded::Connections))
        .map_err(|crowded| {
            let detail = format!("{crowded}: the limit of its policy");
            Failure::new(FailureReason::Overload, detail)
        })
}

/// Moves the bytes of a connection.
type Carrying = Pin<Box<dyn Future<Output = Ended> + Send>>;

fn carry(
    stream: TcpStream,
    upstream: Upstream,
    pod: Arc<EnrolledPod>,
    bytes: Arc<ByteCount>,
) -> Carrying {
    match upstream {
        Upstream::Socket(upstream) => {
            Box::pin(relay::relay_tcp(stream, upstream, OfPod { pod, bytes }))
        }
        Upstream::Tunnel(Tunnelled { send, receive, .. }) => Box::pin(relay::relay_tunnel(
            stream,
            Peer::Downstream,
            send,
            receive,
            OfPod { pod, bytes },
        )),
    }
}

/// How the connection ends; none if it is overdue.
fn end_of<'a>(
    relay: &'a mut Carrying,
    overdue: &'a mut Option<Pin<Box<impl Future<Output = ()>>>>,
) -> impl Future<Output = Option<Ended>> + 'a {
    poll_fn(move |cx| {
        if let Poll::Ready(ended) = relay.as_mut().poll(cx) {
            return Poll::Ready(Some(ended));
        }
        match overdue {
            Some(overdue) => overdue.as_mut().poll(cx).map(|()| None),
            None => Poll::Pending,
        }
    })
}

fn is_limited(limits: &StreamTimeouts) -> bool {
    limits.idle.is_some() || limits.max_duration.is_some()
}

/// Returns when a connection has been silent, or has lasted, for longer than is allowed. Silence is
/// noticed up to a quarter later.
async fn overdue(limits: StreamTimeouts, bytes: Arc<ByteCount>) {
    let lasted = async {
        match limits.max_duration {
            Some(most) => tokio::time::sleep(most).await,
            None => std::future::pending().await,
        }
    };
    let silent = async {
        let Some(idle) = limits.idle else {
            return std::future::pending().await;
        };
        let moved = || bytes.sent.load(Ordering::Relaxed) + bytes.received.load(Ordering::Relaxed);
        let (mut last, mut looks) = (moved(), 0);
        while looks < LOOKS {
            tokio::time::sleep(idle / LOOKS).await;
            looks += 1;
            if std::mem::replace(&mut last, moved()) != last {
                looks = 0;
            }
        }
    };
    tokio::select! {
        () = lasted => {}
        () = silent => {}
    }
}

/// How often a silent connection is looked at before it is given up.
const LOOKS: u32 = 4;

/// What the end of a connection says about the endpoint.
fn outcome_of(ended: Option<Ended>, bytes: &ByteCount) -> Outcome {
    let Some(ended) = ended else {
        return Outcome::Cancelled;
    };
    let has_answered = bytes.sent.load(Ordering::Relaxed) > 0;
    match ended {
        Ended::InOrder => Outcome::Success,
        // Many a protocol ends with a reset.
        Ended::Reset(_) if has_answered => Outcome::Success,
        Ended::Reset(Peer::Upstream) => Outcome::Failure(resilience::Failure::Reset),
        Ended::Reset(Peer::Downstream) | Ended::Stopped => Outcome::Cancelled,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resilience::Verdict;

    /// The size of what a function of these arguments gives back.
    fn size_of_relay<F>(
        _: impl FnOnce(TcpStream, Connected, Arc<EnrolledPod>, Connection, Clock) -> F,
    ) -> usize {
        size_of::<F>()
    }

    /// Beside the two futures that it boxes, of which one is for connections with limits.
    #[test]
    fn what_sets_a_connection_up_is_not_kept_while_it_idles() {
        let relay = size_of_relay(relay);
        assert!(relay <= 320, "{relay} bytes");
    }

    #[test]
    fn only_a_server_that_resets_before_it_says_a_byte_has_failed() {
        let silent = ByteCount::default();
        let spoken = ByteCount::default();
        spoken.add_sent(1);
        for (ended, bytes, verdict) in [
            (Ended::InOrder, &silent, Some(Verdict::Good)),
            (Ended::Reset(Peer::Upstream), &silent, Some(Verdict::Bad)),
            (Ended::Reset(Peer::Upstream), &spoken, Some(Verdict::Good)),
            (Ended::Reset(Peer::Downstream), &silent, None),
            (Ended::Reset(Peer::Downstream), &spoken, Some(Verdict::Good)),
            (Ended::Stopped, &spoken, None),
        ] {
            let outcome = outcome_of(Some(ended), bytes);
            assert_eq!(outcome.of_endpoint(), verdict, "{ended:?}");
            assert_eq!(outcome.of_destination(), verdict, "{ended:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_given_up_when_nothing_moves_or_when_it_has_lasted_too_long() {
        let idle = Duration::from_secs(40);
        let limits = StreamTimeouts {
            idle: Some(idle),
            max_duration: Some(10 * idle),
            ..StreamTimeouts::default()
        };
        let bytes = Arc::new(ByteCount::default());
        let began = tokio::time::Instant::now();
        overdue(limits, bytes.clone()).await;
        assert_eq!(began.elapsed(), idle);

        let moving = async {
            loop {
                tokio::time::sleep(idle / 2).await;
                bytes.add_sent(1);
            }
        };
        let began = tokio::time::Instant::now();
        tokio::select! {
            () = moving => {}
            () = overdue(limits, bytes.clone()) => {}
        }
        assert_eq!(began.elapsed(), 10 * idle);
        let unlimited = StreamTimeouts {
            idle: None,
            ..StreamTimeouts::default()
        };
        assert!(is_limited(&limits) && !is_limited(&unlimited));
        let forever = overdue(unlimited, bytes.clone());
        assert!(tokio::time::timeout(100 * idle, forever).await.is_err());
    }
}
