//! What a request has to pass before it is sent: its pod's quota, faults on purpose, limits, the
//! breaker.

use std::sync::Arc;
use std::time::Duration;

use super::leg::{Leg, To};
use super::refusal::Refusal;
use super::request::Outgoing;
use super::{Client, Frontend, Network};
use crate::resilience::breaker::Permit;
use crate::resilience::limit::{AdaptiveLimit, Axis, Slot};
use crate::resilience::{Outcome, Timestamp};
use crate::telemetry::{RequestEvent, RequestRecord};

/// Leave to be sent. Dropped, it gives everything back, and is no verdict.
#[derive(Default)]
pub(super) struct Admission {
    permit: Option<Permit>,
    /// Its place among the requests in flight.
    _place: Option<Slot>,
    measured: Option<Measured>,
}

/// A place under a limit that follows how long requests take, of which this is one.
struct Measured {
    limit: Arc<AdaptiveLimit>,
    _place: Slot,
    since: Timestamp,
}

impl Admission {
    /// Whether this request decides over a breaker.
    pub(super) fn is_probe(&self) -> bool {
        self.permit.as_ref().is_some_and(Permit::is_probe)
    }

    /// Tells how the request ended.
    pub(super) fn finish(mut self, outcome: Outcome, now: Timestamp) {
        self.settle(outcome, now);
        if let Some(measured) = self.measured.take() {
            let latency = now.since(measured.since);
            measured.limit.sample(latency, outcome, now);
        }
    }

    /// Tells the breaker how it goes, while it goes on.
    pub(super) fn settle(&mut self, outcome: Outcome, now: Timestamp) {
        if let Some(permit) = self.permit.take() {
            permit.finish(outcome, now);
        }
    }
}

/// A place among the requests of its pod, until it is dropped. Comes before everything else, so that
/// a pod which asks for more than its share costs its neighbours next to nothing.
pub(super) fn of_pod<N: Network>(
    client: &Client<N>,
    record: &mut RequestRecord,
) -> Result<Slot, Refusal> {
    let admitted = client.caller.quota.admit();
    admitted.map_err(|unserved| {
        if let Frontend::Service { service, .. } = &client.caller.frontend {
            record.route(Some(service), None);
        }
        record.event(RequestEvent::ShedSource);
        record.detail(&unserved);
        record.flag(Refusal::Overload.flag());
        Refusal::Overload
    })
}

/// Asks all who may refuse. The breaker comes last, so that a place of its probes is taken by none
/// that another refuses.
pub(super) async fn admit<N: Network>(
    client: &Client<N>,
    leg: &Leg,
    request: &mut Outgoing,
) -> Result<Admission, Refusal> {
    fault(client, leg, request).await?;
    let to = match &leg.to {
        To::Service(to) => to,
        To::Pod(..) => return Ok(Admission::default()),
        To::Nowhere => return Err(Refusal::NoEndpoint),
    };
    let now = client.engine.clock().now();
    if let Some(rates) = &to.route.rates {
        rates.take(client.caller.source, now).map_err(|limited| {
            request.record.event(match limited.axis {
                Axis::Source => RequestEvent::RateLimitedSource,
                Axis::Route => RequestEvent::RateLimitedRoute,
                Axis::Total => RequestEvent::RateLimitedTotal,
            });
            Refusal::RateLimited(limited)
        })?;
    }
    let place = to
        .route
        .places
        .as_ref()
        .map(|places| places.take())
        .transpose();
    let place = place.map_err(|_| {
        request.record.event(RequestEvent::ShedInFlight);
        Refusal::Overload
    })?;
    let asked_for = leg.policy.settings.limits.adaptive;
    let measured = asked_for.and_then(|_| to.destination.adaptive());
    let measured = measured.map(|limit| {
        let place = limit.take();
        place.map(|place| Measured {
            limit,
            _place: place,
            since: now,
        })
    });
    let measured = measured.transpose().map_err(|_| {
        request.record.event(RequestEvent::ShedAdaptive);
        Refusal::Overload
    })?;
    let permit = to
        .route
        .breaker
        .admit(now)
        .map_err(|open| Refusal::CircuitOpen {
            retry_after: open.retry_after,
        })?;
    Ok(Admission {
        permit: Some(permit),
        _place: place,
        measured,
    })
}

/// Delays and failures on purpose.
async fn fault<N: Network>(
    client: &Client<N>,
    leg: &Leg,
    request: &mut Outgoing,
) -> Result<(), Refusal> {
    let policy = &leg.policy;
    let settings = &policy.settings.fault;
    if settings.delay.is_none() && settings.abort.is_none()
        || !policy.faults_apply_to(&request.head)
    {
        return Ok(());
    }
    let fault = settings.decide(&mut rand::rng());
    if let Some(delay) = fault.delay {
        request.record.event(RequestEvent::FaultDelay);
        let now = client.engine.clock().now();
        let left = request.deadline.left(now).unwrap_or(Duration::MAX);
        tokio::time::sleep(delay.min(left)).await;
        if delay >= left {
            return Err(Refusal::RequestTimeout);
        }
    }
    if let Some(code) = fault.abort {
        request.record.event(RequestEvent::FaultAbort);
        return Err(Refusal::Fault(code));
    }
    Ok(())
}
