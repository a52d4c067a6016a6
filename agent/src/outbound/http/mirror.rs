//! Copies of requests for mirrors. Whatever becomes of one, the request itself is not concerned.

use std::sync::Arc;
use std::time::Duration;

use http::Request;
use http_body_util::BodyExt;
use tokio::time::timeout;

use super::attempt::{AttemptError, Reaching, lease};
use super::leg::{Leg, To};
use super::request::{Kind, Outgoing};
use super::route::Routed;
use super::view::View;
use super::{Client, Network};
use crate::fairness;
use crate::http::ReplayBody;
use crate::resilience::destination::{Ask, Probing};
use crate::resilience::{Failure, Outcome, Unsent};
use crate::telemetry::RequestEvent;

/// How long a mirror may take where its policy has no limit.
const PATIENCE: Duration = Duration::from_secs(15);

/// Sends copies to the mirrors of the rule and of its backend that are due. To be called when the
/// request itself was answered: its body is known by then. One that is larger than what is kept for
/// retries, or still on its way, is not copied.
pub(super) fn copy<N: Network>(
    client: &Arc<Client<N>>,
    view: &Arc<View>,
    routed: &Routed,
    request: &mut Outgoing,
) {
    let Some(by) = &routed.by else {
        return;
    };
    let of_backend = by.backend().map(|backend| backend.filters.mirrors());
    let mirrors = by.rule.filters.mirrors().iter();
    for mirror in mirrors.chain(of_backend.into_iter().flatten()) {
        if !mirror.is_due(&mut rand::rng()) {
            continue;
        }
        let leg = view.mirror(client, mirror);
        let place = client.engine.mirrors.clone().try_acquire_owned();
        let (Some(leg), Ok(place), Some(body)) = (leg, place, request.body.copy()) else {
            request.record.event(RequestEvent::MirrorDropped);
            continue;
        };
        request.record.event(RequestEvent::MirrorSent);
        let copy = request.attempt(body.attempt(), 1, client.engine.clock());
        let (client, view, kind) = (client.clone(), view.clone(), request.kind);
        let events = request.record.events();
        fairness::spawn(async move {
            let limit = leg.timeouts.request.unwrap_or(PATIENCE);
            let sent = timeout(limit, send(&client, &view, &leg, kind, copy)).await;
            if !matches!(sent, Ok(Ok(()))) {
                let service = leg.service.as_ref().map(tracing::field::display);
                tracing::debug!(service, "mirror: no answer");
                events.count(RequestEvent::MirrorFailed);
            }
            drop(place);
        });
    }
}

/// One attempt, whose answer is read and forgotten.
async fn send<N: Network>(
    client: &Client<N>,
    view: &View,
    leg: &Leg,
    kind: Kind,
    request: Request<ReplayBody>,
) -> Result<(), ()> {
    let To::Service(to) = &leg.to else {
        return Err(());
    };
    let clock = client.engine.clock();
    let permit = to.route.breaker.admit(clock.now()).map_err(drop)?;
    let ask = Ask {
        probing: Probing::Forbidden,
        ..Ask::default()
    };
    let picked = to.endpoints.pick(&ask, &mut rand::rng(), clock.now());
    let mut attempt = picked.ok_or(())?;
    let exchange = async {
        let way = view
            .way(client, attempt.target())
            .map_err(AttemptError::from)?;
        let version = request.version();
        let reaching = &mut Reaching::begin(clock.now());
        let lease = lease(client, leg, &way, version, leg.timeouts.connect, reaching).await?;
        let reused = lease.is_reused();
        let sent = lease.send(request).await;
        sent.map_err(|error| AttemptError::Send { error, reused })
    };
    let answered = exchange.await;
    attempt.answered(clock.now());
    let outcome = match answered {
        Ok(answer) => {
            let outcome = leg.policy.settings.http.classify(answer.status().as_u16());
            let mut body = answer.into_body();
            let mut outcome = match kind {
                Kind::Http => outcome,
                Kind::Grpc => Outcome::Success,
            };
            while let Some(frame) = body.frame().await {
                if frame.is_err() {
                    outcome = Outcome::Failure(Failure::Reset);
                    break;
                }
            }
            outcome
        }
        Err(AttemptError::Connect(failure)) => failure.outcome(),
        Err(AttemptError::Send {
            error,
            reused: false,
        }) => error.outcome(),
        Err(AttemptError::Crowded(_)) => Outcome::Shed,
        Err(AttemptError::Send { .. } | AttemptError::Late) => Outcome::Unsent(Unsent::GoingAway),
    };
    attempt.finish(outcome, clock.now());
    permit.finish(outcome, clock.now());
    match outcome {
        Outcome::Success | Outcome::CallerError(_) => Ok(()),
        _ => Err(()),
    }
}
