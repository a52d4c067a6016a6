//! Which way a request goes, and what its route's filters make of it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use http::{HeaderValue, Response};

use super::leg::Leg;
use super::refusal::Refusal;
use super::request::Arrived;
use super::view::View;
use super::{Client, Frontend, Network};
use crate::http::{ProxyBody, REASON};
use crate::mesh::route::{self as routes, Backend, FilterVerdict, Origin, Rule, Session};
use crate::resilience::fallback::Fallen;
use crate::resilience::limit::RatesSettings;
use crate::telemetry::ResponseFlag;

/// Where a request goes, and what will be done to its answer.
pub(super) struct Routed {
    pub(super) leg: Arc<Leg>,
    pub(super) by: Option<ByRule>,
}

/// The rule that a request met.
pub(super) struct ByRule {
    pub(super) rule: Arc<Rule>,
    /// Which of its backends was drawn.
    backend: usize,
    /// What CORS wants to know of the request.
    origin: Option<Origin>,
    backend_origin: Option<Origin>,
    session: Option<Session>,
}

impl ByRule {
    pub(super) fn backend(&self) -> Option<&Backend> {
        self.rule.backends.get(self.backend)
    }

    /// Tells the client of its session with this endpoint, where the rule has sessions.
    pub(super) fn answer_session(&self, endpoint: SocketAddr, head: &mut http::response::Parts) {
        let (Some(session), Some(backend)) = (&self.rule.session, self.backend()) else {
            return;
        };
        let former = self.session.as_ref();
        if let Some((name, value)) = session.answer(former, backend, endpoint, SystemTime::now()) {
            head.headers.append(name, value);
        }
    }
}

impl Routed {
    /// The endpoint that the request's session is with; a fallback has no part in it.
    pub(super) fn session_endpoint(&self, fallen: Fallen) -> Option<SocketAddr> {
        let session = self.by.as_ref()?.session.as_ref()?;
        (fallen == Fallen::NotYet).then(|| session.endpoint())
    }

    /// What the filters make of an answer's head: the backend's first, then the rule's.
    pub(super) fn filter(&self, head: &mut http::response::Parts) {
        let Some(by) = &self.by else {
            return;
        };
        if let Some(backend) = by.backend() {
            backend
                .filters
                .on_response(by.backend_origin.as_ref(), head);
        }
        by.rule.filters.on_response(by.origin.as_ref(), head);
    }

    /// An answer of our own, as the rule's filters change it: a browser reads no error either that
    /// CORS does not let it.
    pub(super) fn filtered(&self, answer: Response<ProxyBody>) -> Response<ProxyBody> {
        let (mut head, body) = answer.into_parts();
        if let Some(by) = &self.by {
            by.rule.filters.on_response(by.origin.as_ref(), &mut head);
        }
        Response::from_parts(head, body)
    }
}

/// Finds the way, or the answer that the route itself gives.
pub(super) fn route<N: Network>(
    client: &Client<N>,
    view: &View,
    request: &mut Arrived,
) -> Result<Routed, Box<Response<ProxyBody>>> {
    let (Some(table), Frontend::Service { service, port }) =
        (view.routes(), &client.caller.frontend)
    else {
        return Ok(Routed {
            leg: view.own(client),
            by: None,
        });
    };
    let refuse = |request: &mut Arrived, refusal: Refusal| {
        request.record.flag(refusal.flag());
        Box::new(refusal.respond(&request.head.headers, &RatesSettings::default()))
    };
    let Some(selected) = table.select(&request.head) else {
        request.record.route(Some(service), None);
        return Err(refuse(request, Refusal::NoRoute));
    };
    let (rule, matched) = (selected.rule.clone(), selected.matched);
    request.record.route(Some(service), Some(&rule.name));
    let frontend = routes::Frontend {
        scheme: routes::Scheme::Http,
        port: *port,
    };
    let origin = rule.filters.origin(&request.head.headers);
    if let FilterVerdict::Respond(answer) =
        rule.filters
            .on_request(&mut request.head, matched, frontend)
    {
        return Err(direct(request, *answer));
    }
    let persistence = rule.session.as_ref();
    let session =
        persistence.and_then(|session| session.read(&request.head.headers, SystemTime::now()));
    let chosen = rule.choose(session.as_ref(), &mut rand::rng());
    let found = chosen.and_then(|backend| Some((backend, view.backend(client, &rule, backend)?)));
    let Some((backend, leg)) = found else {
        let routed = Routed {
            leg: view.own(client),
            by: Some(ByRule {
                backend: usize::MAX,
                origin,
                backend_origin: None,
                session: None,
                rule: rule.clone(),
            }),
        };
        let answer = refuse(request, Refusal::InvalidBackend);
        return Err(Box::new(routed.filtered(*answer)));
    };
    let backend_origin = backend.filters.origin(&request.head.headers);
    if let FilterVerdict::Respond(answer) =
        backend
            .filters
            .on_request(&mut request.head, matched, frontend)
    {
        return Err(direct(request, *answer));
    }
    let place = rule
        .backends
        .iter()
        .position(|one| std::ptr::eq(one, backend));
    Ok(Routed {
        leg,
        by: Some(ByRule {
            backend: place.unwrap_or(usize::MAX),
            origin,
            backend_origin,
            session,
            rule: rule.clone(),
        }),
    })
}

/// An answer of a filter, which says so like every answer of our own.
fn direct(request: &mut Arrived, answer: Response<()>) -> Box<Response<ProxyBody>> {
    const FLAG: ResponseFlag = ResponseFlag::DirectResponse;
    request.record.flag(FLAG);
    let mut answer = answer.map(|()| ProxyBody::Empty);
    let reason = HeaderValue::from_static(FLAG.as_str());
    answer.headers_mut().insert(REASON, reason);
    Box::new(answer)
}
