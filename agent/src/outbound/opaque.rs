//! Connections whose bytes mean nothing to the agent: choose an endpoint, connect, relay, judge.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::net::TcpStream;

use super::Outbound;
use super::connect::{Failure, Upstream};
use super::destinations::{DestinationId, EndpointId, Reachable, Route, RouteKey, Traffic};
use super::target::Target;
use super::tries::{Tries, no_endpoint};
use crate::capture::{Capture, EnrolledPod};
use crate::http::{Crowded, Place, Places};
use crate::mesh::route::{BackendTarget, StreamRule};
use crate::mesh::{ObjectName, Snapshot, StreamTimeouts, TrafficPolicy};
use crate::relay::{self, Ended, Peer};
use crate::resilience::breaker::Permit;
use crate::resilience::destination::Attempt;
use crate::resilience::ejection::SourceId;
use crate::resilience::{self, Outcome};
use crate::telemetry::{ByteCount, Connection, FailureReason};

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
    permit: Permit,
    /// Its place among the connections that are open.
    place: Option<Place>,
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
        let place = match places {
            None => None,
            Some(places) => {
                match place_within(places, policy.connect_limit(snapshot.config())).await {
                    Ok(place) => Some(place),
                    Err(failure) => {
                        permit.finish(failure.outcome(), clock.now());
                        return Err(failure);
                    }
                }
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
        match tries.run(open).await {
            Ok((attempt, upstream)) => Ok(Connected {
                upstream,
                judged: Some(Judged {
                    attempt,
                    permit,
                    place,
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

    /// Relays to the end of the connection, and tells how the endpoint did. None if it was silent or
    /// lasted for longer than the policy allows: then it is reset.
    pub(super) async fn relay(
        &self,
        stream: TcpStream,
        connected: Connected,
        pod: &EnrolledPod,
        bytes: &ByteCount,
    ) -> Option<Ended> {
        let Connected {
            upstream,
            judged,
            limits,
        } = connected;
        // On the heap, and once: it is large, and whatever holds it would be as large again.
        let relay = Box::pin(async {
            match upstream {
                Upstream::Socket(upstream) => {
                    relay::relay_tcp(stream, upstream, bytes.into(), pod.gone()).await
                }
                Upstream::Tunnel(tunnel) => {
                    let (send, receive) = (tunnel.send, tunnel.receive);
                    let counts = bytes.into();
                    relay::relay_tunnel(stream, Peer::Downstream, send, receive, counts, pod.gone())
                        .await
                }
            }
        });
        let relay = async {
            tokio::select! {
                ended = relay => Some(ended),
                () = overdue(&limits, bytes) => None,
            }
        };
        let Some(mut judged) = judged else {
            return relay.await;
        };
        let mut relay = pin!(relay);
        let clock = self.destinations.clock();
        judged.attempt.answered(clock.now());
        let (ended, outcome) = tokio::select! {
            ended = &mut relay => (Some(ended), outcome(ended, bytes)),
            () = tokio::time::sleep(SERVED_AFTER) => (None, Outcome::Success),
        };
        let Judged {
            mut attempt,
            permit,
            place: _place,
        } = judged;
        attempt.settle(outcome, clock.now());
        permit.finish(outcome, clock.now());
        match ended {
            Some(ended) => ended,
            // It still counts as load.
            None => relay.await,
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

/// Returns when a connection has been silent, or has lasted, for longer than is allowed. Silence is
/// noticed up to a quarter later.
async fn overdue(limits: &StreamTimeouts, bytes: &ByteCount) {
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
fn outcome(ended: Option<Ended>, bytes: &ByteCount) -> Outcome {
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
            let outcome = outcome(Some(ended), bytes);
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
        let bytes = ByteCount::default();
        let began = tokio::time::Instant::now();
        overdue(&limits, &bytes).await;
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
            () = overdue(&limits, &bytes) => {}
        }
        assert_eq!(began.elapsed(), 10 * idle);
        let unlimited = StreamTimeouts {
            idle: None,
            ..StreamTimeouts::default()
        };
        let forever = overdue(&unlimited, &bytes);
        assert!(tokio::time::timeout(100 * idle, forever).await.is_err());
    }
}
