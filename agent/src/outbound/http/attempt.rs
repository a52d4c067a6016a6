//! Attempts of one request, until one is answered for good.

use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Response, Version, response};
use hyper::body::Frame;
use tokio::time::{sleep, timeout};

use super::admit::Admission;
use super::answer;
use super::leg::{Leg, To};
use super::refusal::Refusal;
use super::request::Outgoing;
use super::verdict::judge;
use super::view::View;
use super::{Client, Network};
use crate::http::{
    Crowded, Lease, SendError, Terms, UpstreamBody, UpstreamKey, Way as KeyWay, Wire,
};
use crate::outbound::connect::{Failure, Way};
use crate::outbound::destinations::EndpointId;
use crate::outbound::path::Path;
use crate::resilience::budget::{BudgetSpent, Deposit, Purse, Share};
use crate::resilience::destination::{Ask, Attempt, Probing};
use crate::resilience::fallback::Trouble;
use crate::resilience::retry::{Decision, Facts, Nature, Stop};
use crate::resilience::{Outcome, Retries, RetryBudget, Timestamp};
use crate::telemetry::{AttemptView, FailureReason, RequestEvent};
use crate::workers::WorkerId;

/// The answer that the client gets.
pub(super) struct Answered {
    pub(super) head: response::Parts,
    pub(super) body: UpstreamBody,
    /// What was looked at of the body already.
    pub(super) first: Option<Frame<Bytes>>,
    pub(super) endpoint: SocketAddr,
    /// How it went; none if the trailers will tell.
    pub(super) outcome: Option<Outcome>,
    /// Why there was no further attempt, if it went badly.
    pub(super) stop: Option<Stop>,
    pub(super) attempt: Option<Attempt<EndpointId>>,
}

/// No attempt was answered.
pub(super) struct Failed {
    pub(super) refusal: Refusal,
    /// What it says about the destination.
    pub(super) outcome: Outcome,
    pub(super) trouble: Option<Trouble>,
}

/// How far an attempt has come to a connection.
pub(super) struct Reaching {
    /// Since when it is on its way.
    began: Timestamp,
    /// How long it took, if none was free.
    connecting: Duration,
    /// Whether it waits for one of those that others use.
    waits: AtomicBool,
}

impl Reaching {
    pub(super) fn begin(now: Timestamp) -> Self {
        Self {
            began: now,
            connecting: Duration::ZERO,
            waits: AtomicBool::new(false),
        }
    }
}

/// Why one attempt was not answered.
pub(super) enum AttemptError {
    /// No connection.
    Connect(Failure),
    /// On a connection, which had served others before, or not.
    Send { error: SendError, reused: bool },
    /// There was no connection for it, and no more may be made.
    Crowded(Crowded),
    /// It took too long.
    Late,
}

impl From<Failure> for AttemptError {
    fn from(failure: Failure) -> Self {
        Self::Connect(failure)
    }
}

impl From<SendError> for AttemptError {
    /// Of a connection that broke while it was made.
    fn from(error: SendError) -> Self {
        if let SendError::Crowded(crowded) = error {
            return Self::Crowded(crowded);
        }
        Self::Connect(Failure::of_endpoint(
            FailureReason::ConnectRefused,
            "the connection broke at once",
        ))
    }
}

/// Makes attempts within the policy, the budget and the deadline.
pub(super) async fn attempts<N: Network>(
    client: &Client<N>,
    view: &View,
    leg: &Leg,
    session: Option<SocketAddr>,
    request: &mut Outgoing,
    admission: &Admission,
) -> Result<Answered, Failed> {
    let clock = client.engine.clock();
    let purse = match &leg.to {
        To::Service(to) => Budget::Service(to.endpoints.budget()),
        To::Pod(_, budget) => Budget::Pod(budget),
        To::Nowhere => return Err(no_endpoint()),
    };
    let nature = Nature {
        method: request.method(),
        body: request.body.nature(),
    };
    let mut began = clock.now();
    let mut retries = Retries::begin(&purse, nature, request.deadline, began);
    let mut tried: Vec<EndpointId> = Vec::new();
    let mut waited = Duration::ZERO;
    loop {
        let may_probe = !admission.is_probe() && retries.can_repeat(&leg.retry);
        let probing = match may_probe {
            true => Probing::Allowed,
            false => Probing::Forbidden,
        };
        let session = session.filter(|_| tried.is_empty());
        let mut hash = leg.policy.hash.iter();
        let hash = hash.find_map(|key| key.of(&request.head.headers, client.caller.source.0));
        let ask = Ask {
            tried: &tried,
            hash,
            probing,
        };
        let picked = pick(view, leg, session, &ask, began);
        let Some(mut picked) = picked else {
            return Err(no_endpoint());
        };
        let endpoint = picked.endpoint().clone();
        let mut reaching = Reaching::begin(began);
        let sent = {
            let limit = leg.timeouts.attempt(request.deadline, began);
            let number = retries.made() + 1;
            // Pinned here, and not moved any more.
            let attempt = pin!(send(
                client,
                view,
                leg,
                request,
                &endpoint,
                number,
                &mut reaching
            ));
            within(limit, attempt).await
        };
        let sent = match sent {
            Err(AttemptError::Late) if reaching.waits.load(Ordering::Relaxed) => {
                Err(AttemptError::Crowded(Crowded::Connections))
            }
            sent => sent,
        };
        let connecting = reaching.connecting;
        let now = clock.now();
        if sent.is_ok() {
            picked.answered(now);
        }
        let ended = judge(leg, request, sent, now).await;
        request.record.attempt(AttemptView {
            endpoint: Some(endpoint.address),
            outcome: ended.verdict.label(),
            status: ended
                .answer
                .as_ref()
                .map(|answer| answer.head.status.as_u16()),
            waited,
            connect: connecting,
            took: now.since(began).saturating_sub(connecting),
        });
        let decision = match ended.retry {
            Outcome::Success => Decision::Stop(Stop::Done),
            outcome => {
                retries.set_body(request.body.nature());
                let facts = Facts {
                    retry_after: ended.retry_after,
                    ..Facts::default()
                };
                let rng = &mut rand::rng();
                retries.next(&leg.retry, outcome, facts, &purse, rng, clock.now())
            }
        };
        match decision {
            Decision::Retry { after } => {
                picked.finish(ended.verdict, clock.now());
                request.record.event(RequestEvent::RetryGranted);
                if let Some(answer) = ended.answer {
                    answer::discard(answer.body);
                }
                tried.push(endpoint);
                waited = after;
                sleep(after).await;
                began = clock.now();
            }
            Decision::Stop(stop) => {
                if let Some(event) = refused(stop) {
                    request.record.event(event);
                }
                let failed = ended.retry != Outcome::Success;
                let Some(answer) = ended.answer else {
                    picked.finish(ended.verdict, clock.now());
                    return Err(Failed {
                        refusal: ended.refusal,
                        outcome: ended.verdict,
                        // A limit of our own says nothing of the destination.
                        trouble: (ended.verdict != Outcome::Shed).then_some(Trouble::Failed(stop)),
                    });
                };
                return Ok(Answered {
                    head: answer.head,
                    body: answer.body,
                    first: answer.first,
                    endpoint: endpoint.address,
                    outcome: answer.outcome,
                    stop: failed.then_some(stop),
                    attempt: picked.into_attempt(),
                });
            }
        }
    }
}

/// Sends one attempt, and waits for the head of its answer.
async fn send<N: Network>(
    client: &Client<N>,
    view: &View,
    leg: &Leg,
    request: &mut Outgoing,
    endpoint: &EndpointId,
    number: u32,
    reaching: &mut Reaching,
) -> Result<Response<UpstreamBody>, AttemptError> {
    let way = view.way(client, endpoint)?;
    request
        .record
        .endpoint(way.endpoint, way.workload.as_ref(), way.security());
    let limit = leg.timeouts.connect(request.deadline, reaching.began);
    let lease = lease(client, leg, &way, request.head.version, limit, reaching).await?;
    client.network.reached(&way);
    let reused = lease.is_reused();
    let attempt = request.attempt(request.body.attempt(), number, client.engine.clock());
    let sent = lease.send(attempt).await;
    sent.map_err(|error| AttemptError::Send { error, reused })
}

/// A connection for a request in this version of HTTP: one of the pod's that is free, or a new one.
pub(super) async fn lease<N: Network>(
    client: &Client<N>,
    leg: &Leg,
    way: &Way,
    version: Version,
    limit: Duration,
    reaching: &mut Reaching,
) -> Result<Lease, AttemptError> {
    let key = UpstreamKey {
        source: client.caller.source.0,
        endpoint: way.endpoint,
        protocol: match version {
            Version::HTTP_2 => Wire::Http2,
            _ => Wire::Http1,
        },
        way: kind_of(way),
        worker: WorkerId::current(),
    };
    let connect = || async {
        let connected = client.network.open(way, leg.service.as_ref(), limit).await;
        Ok::<_, AttemptError>(connected?.into())
    };
    let terms = Terms {
        requests: leg.policy.connections.requests_per_connection,
        idle: leg.policy.streams.idle,
        places: match &leg.to {
            To::Service(to) => to.destination.places(),
            To::Pod(..) | To::Nowhere => None,
        },
        waits: Some(&reaching.waits),
    };
    let upstreams = client.engine.pool.upstreams(&key);
    if let Some(lease) = upstreams.find(&terms) {
        return Ok(lease);
    }
    let clock = client.engine.clock();
    let began = clock.now();
    let connected = upstreams.get(&terms, connect).await;
    reaching.connecting = clock.now().since(began);
    connected
}

fn kind_of(way: &Way) -> KeyWay {
    match way.path {
        Path::SameNode => KeyWay::SameNode,
        Path::Tunnel(_) => KeyWay::Tunnel,
        Path::Plaintext => KeyWay::Plaintext,
    }
}

async fn within<F>(
    limit: Option<Duration>,
    attempt: Pin<&mut F>,
) -> Result<Response<UpstreamBody>, AttemptError>
where
    F: Future<Output = Result<Response<UpstreamBody>, AttemptError>>,
{
    match limit {
        Some(limit) => timeout(limit, attempt)
            .await
            .unwrap_or(Err(AttemptError::Late)),
        None => attempt.await,
    }
}

/// Where an attempt goes.
enum Picked {
    Balanced(Attempt<EndpointId>),
    /// The one pod that was dialled.
    Pod(EndpointId),
}

impl Picked {
    fn endpoint(&self) -> &EndpointId {
        match self {
            Self::Balanced(attempt) => attempt.target(),
            Self::Pod(endpoint) => endpoint,
        }
    }

    fn answered(&mut self, now: Timestamp) {
        if let Self::Balanced(attempt) = self {
            attempt.answered(now);
        }
    }

    fn finish(self, outcome: Outcome, now: Timestamp) {
        if let Self::Balanced(attempt) = self {
            attempt.finish(outcome, now);
        }
    }

    fn into_attempt(self) -> Option<Attempt<EndpointId>> {
        match self {
            Self::Balanced(attempt) => Some(attempt),
            Self::Pod(_) => None,
        }
    }
}

fn pick(
    view: &View,
    leg: &Leg,
    session: Option<SocketAddr>,
    ask: &Ask<'_, EndpointId>,
    now: Timestamp,
) -> Option<Picked> {
    let to = match &leg.to {
        To::Service(to) => to,
        To::Pod(endpoint, _) => return Some(Picked::Pod(endpoint.clone())),
        To::Nowhere => return None,
    };
    let with_session = session.and_then(|address| {
        let endpoint = view.endpoint_at(to.destination.id(), address)?;
        to.endpoints.pick_this(&endpoint, now)
    });
    if let Some(attempt) = with_session {
        return Some(Picked::Balanced(attempt));
    }
    let attempt = to.endpoints.pick(ask, &mut rand::rng(), now);
    attempt.map(Picked::Balanced)
}

fn no_endpoint() -> Failed {
    Failed {
        refusal: Refusal::NoEndpoint,
        outcome: Outcome::Shed,
        trouble: Some(Trouble::NoEndpoint),
    }
}

fn refused(stop: Stop) -> Option<RequestEvent> {
    Some(match stop {
        Stop::Done | Stop::NotRetriable => return None,
        Stop::NotRepeatable => RequestEvent::RetryNotRepeatable,
        Stop::AnswerBegun => RequestEvent::RetryAnswerBegun,
        Stop::AttemptsSpent => RequestEvent::RetryAttemptsSpent,
        Stop::DeadlineNear => RequestEvent::RetryDeadlineNear,
        Stop::RetryAfterTooLong => RequestEvent::RetryAfterTooLong,
        Stop::BudgetSpent => RequestEvent::RetryBudgetSpent,
    })
}

/// What pays for retries.
enum Budget<'a> {
    Service(Share<'a>),
    Pod(&'a RetryBudget),
}

impl Purse for Budget<'_> {
    fn deposit(&self, now: Timestamp) -> Deposit {
        match self {
            Self::Service(share) => share.deposit(now),
            Self::Pod(budget) => budget.deposit(now),
        }
    }

    fn withdraw(&self, deposit: &Deposit, now: Timestamp) -> Result<(), BudgetSpent> {
        match self {
            Self::Service(share) => share.withdraw(deposit, now),
            Self::Pod(budget) => budget.withdraw(deposit, now),
        }
    }
}
