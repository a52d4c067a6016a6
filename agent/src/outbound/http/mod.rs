//! HTTP from a pod of this node to the mesh. One request's way:
//!
//! its pod must not have more under way than it may; its route is found ([`route`]), whose filters change it or answer it; faults, limits and the
//! breaker of its destination let it pass or not ([`admit`]); attempts are made until one is
//! answered for good ([`attempt`]); the answer goes to the client, and its end tells breaker,
//! ejection and telemetry how it went ([`answer`]). What cannot be had is answered here and says why
//! ([`refusal`]), or another backend answers.
//!
//! A request reads one snapshot, so a change of routes or policies is in force for the next request
//! and cuts none in flight. A client that goes away drops the request's future, and with it all
//! that it holds: no attempt follows, and nobody takes it for a failure.

mod admit;
mod answer;
mod attempt;
mod deadline;
mod leg;
mod mirror;
mod network;
mod refusal;
mod request;
mod route;
#[cfg(test)]
mod tests;
mod verdict;
mod view;

use std::net::SocketAddr;
use std::sync::Arc;

use http::{Request, Response};
use hyper::body::Incoming;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::clock::Clock;
use super::destinations::{Destinations, EndpointId};
use crate::fairness::Quota;
use crate::http::{ClientView, ProxyBody, ResetNow, UpstreamPool};
use crate::mesh::{ObjectName, SharedSnapshot, Workload};
use crate::resilience::ejection::SourceId;
use crate::resilience::fallback::{Fallback, Fallen, FixedResponse, Trouble};
use crate::resilience::limit::RatesSettings;
use crate::resilience::{Outcome, RetryBudget};
use crate::telemetry::{RequestEnd, RequestEvent, RequestRecord, Requester, ResponseFlag};

use answer::Judges;
use attempt::{Answered, Failed};
use leg::Leg;
use refusal::Refusal;
use request::{Arrived, Outgoing};
use route::Routed;
use view::View;

pub(super) use network::{Network, PodNetwork};

/// Copies of requests for mirrors that may be under way on a node; beyond it none is made, which is
/// counted.
const MIRRORS: usize = 256;

/// What the requests of all pods of a node share.
pub struct Engine {
    snapshot: SharedSnapshot,
    destinations: Arc<Destinations>,
    pool: Arc<UpstreamPool>,
    /// Retries of requests to pods' own addresses are paid from here.
    direct_budget: Arc<RetryBudget>,
    mirrors: Arc<Semaphore>,
}

impl Engine {
    /// Puts it together.
    #[must_use]
    pub fn new(
        snapshot: SharedSnapshot,
        destinations: Arc<Destinations>,
        pool: Arc<UpstreamPool>,
    ) -> Arc<Self> {
        Arc::new(Self {
            snapshot,
            destinations,
            pool,
            direct_budget: Arc::new(RetryBudget::new(&Default::default())),
            mirrors: Arc::new(Semaphore::new(MIRRORS)),
        })
    }

    fn clock(&self) -> Clock {
        self.destinations.clock()
    }
}

/// Who asks, on one downstream connection.
pub(super) struct Caller {
    /// The pod.
    pub(super) workload: Arc<Workload>,
    pub(super) source: SourceId,
    /// What it may hold of the agent.
    pub(super) quota: Arc<Quota>,
    /// The address that it dialled.
    pub(super) local: SocketAddr,
    /// What that address stands for.
    pub(super) frontend: Frontend,
    /// As servers are told of it.
    pub(super) view: ClientView,
    pub(super) requester: Arc<Requester>,
}

/// One downstream connection of a pod.
pub(super) struct Client<N> {
    engine: Arc<Engine>,
    network: N,
    caller: Caller,
    /// What the last request saw of the mesh.
    seen: Mutex<Option<Arc<View>>>,
}

/// What a client dialled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Frontend {
    /// A port of a Service: routes attach to it.
    Service { service: ObjectName, port: u16 },
    /// A pod.
    Pod(EndpointId),
}

impl<N: Network> Client<N> {
    pub(super) fn new(engine: Arc<Engine>, network: N, caller: Caller) -> Arc<Self> {
        Arc::new(Self {
            engine,
            network,
            caller,
            seen: Mutex::default(),
        })
    }

    /// One request, from its head to the head of its answer; the answer's body brings the rest.
    pub(super) async fn serve(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<ProxyBody>, ResetNow> {
        let mut arrived = Arrived::receive(&self, request);
        let place = match admit::of_pod(&self, &mut arrived.record) {
            Ok(place) => place,
            Err(refusal) => {
                let answer = refusal.respond(&arrived.head.headers, &RatesSettings::default());
                return Ok(own(answer, arrived.record));
            }
        };
        let view = self.view();
        let routed = match route::route(&self, &view, &mut arrived) {
            Ok(routed) => routed,
            Err(answer) => return Ok(own(*answer, arrived.record)),
        };
        let now = self.engine.clock().now();
        let mut request = arrived.over(&routed.leg, &self.caller.quota, place, now);
        let asked = self.ask(&view, &routed, &mut request).await;
        mirror::copy(&self, &view, &routed, &mut request);
        Ok(match asked {
            Asked::Answer(answered, judges) => {
                answer::pass_on(&self, &routed, request, *answered, judges)
            }
            Asked::Refused(refusal, rates) => {
                request.record.flag(refusal.flag());
                let answer = refusal.respond(&request.head.headers, &rates);
                own(routed.filtered(answer), request.record)
            }
            Asked::Fixed(answer) => own(routed.filtered(answer), request.record),
        })
    }

    /// Asks the destination, and where that is of no use what its policy falls back to.
    async fn ask(&self, view: &View, routed: &Routed, request: &mut Outgoing) -> Asked {
        let mut leg = routed.leg.clone();
        let mut fallen = Fallen::NotYet;
        loop {
            request.record.route(leg.service.as_ref(), leg.rule_name());
            let session = routed.session_endpoint(fallen);
            let (asked, trouble) = self.ask_over(view, &leg, session, request).await;
            let fallback =
                trouble.and_then(|trouble| leg.policy.settings.fallback.decide(trouble, fallen));
            match fallback {
                None | Some(Fallback::None) => return asked,
                Some(Fallback::Fixed(response)) => {
                    asked.give_up(self.engine.clock());
                    request.record.event(RequestEvent::FallbackFixed);
                    request.record.flag(ResponseFlag::Fallback);
                    return Asked::Fixed(fixed(response));
                }
                Some(Fallback::Backend(backend)) => {
                    let next = view.fallback(self, &leg, backend);
                    asked.give_up(self.engine.clock());
                    request.record.event(RequestEvent::FallbackBackend);
                    request.record.flag(ResponseFlag::Fallback);
                    leg = next;
                    fallen = Fallen::Already;
                }
            }
        }
    }

    /// Asks over one leg: if it is let in, attempts are made. Tells what is wrong if the destination
    /// itself does not answer as it should.
    async fn ask_over(
        &self,
        view: &View,
        leg: &Arc<Leg>,
        session: Option<SocketAddr>,
        request: &mut Outgoing,
    ) -> (Asked, Option<Trouble>) {
        let admission = match admit::admit(self, leg, request).await {
            Ok(admission) => admission,
            Err(refusal) => {
                let trouble = match refusal {
                    Refusal::CircuitOpen { .. } => Some(Trouble::BreakerOpen),
                    _ => None,
                };
                return (Asked::refused(refusal, leg), trouble);
            }
        };
        match attempt::attempts(self, view, leg, session, request, &admission).await {
            Ok(mut answered) => {
                let attempt = answered.attempt.take();
                let trouble = answered.stop.map(Trouble::Failed);
                let judges = Judges::new(leg.clone(), admission, attempt);
                (Asked::Answer(Box::new(answered), judges), trouble)
            }
            Err(Failed {
                refusal,
                outcome,
                trouble,
            }) => {
                admission.finish(outcome, self.engine.clock().now());
                (Asked::refused(refusal, leg), trouble)
            }
        }
    }

    /// The mesh as it is now.
    fn view(&self) -> Arc<View> {
        let newest = self.engine.snapshot.load();
        let mut seen = self.seen.lock();
        if let Some(view) = &*seen
            && Arc::ptr_eq(&view.snapshot, &newest)
        {
            return view.clone();
        }
        let namespace = &self.caller.workload.name.namespace;
        let view = Arc::new(View::new(newest.clone(), &self.caller.frontend, namespace));
        *seen = Some(view.clone());
        view
    }
}

/// What came of asking.
enum Asked {
    /// The destination has answered, well or not.
    Answer(Box<Answered>, Judges),
    /// We answer, and say why; with the limits that such an answer may tell of.
    Refused(Refusal, RatesSettings),
    /// The policy answers.
    Fixed(Response<ProxyBody>),
}

impl Asked {
    fn refused(refusal: Refusal, leg: &Leg) -> Self {
        Self::Refused(refusal, leg.policy.settings.limits.rates)
    }

    /// The client gets something else: what was learned is told all the same.
    fn give_up(self, clock: Clock) {
        if let Self::Answer(answered, judges) = self {
            judges.finish(answered.outcome.unwrap_or(Outcome::Cancelled), clock.now());
            answer::discard(answered.body);
        }
    }
}

/// An answer of our own, which is all of it.
fn own(answer: Response<ProxyBody>, mut record: RequestRecord) -> Response<ProxyBody> {
    record.answered(answer.status());
    record.close(RequestEnd::Complete);
    answer
}

fn fixed(response: &FixedResponse) -> Response<ProxyBody> {
    let mut answer = Response::new(ProxyBody::fixed(response.body.clone()));
    // Checked when the policy was read.
    *answer.status_mut() = http::StatusCode::from_u16(response.status)
        .unwrap_or(http::StatusCode::SERVICE_UNAVAILABLE);
    let reason = http::HeaderValue::from_static(ResponseFlag::Fallback.as_str());
    answer.headers_mut().insert(crate::http::REASON, reason);
    answer
}
