//! What a rule or a backend does to requests and responses.

mod cors;
mod headers;
mod mirror;
mod redirect;
mod rewrite;

pub use cors::{Cors, Credentials, OriginPattern, OriginPatternError};
pub use headers::HeaderModifier;
pub use mirror::{Fraction, Mirror};
pub use redirect::{Redirect, Scheme};
pub use rewrite::{PathModifier, Rewrite};

use http::header::ORIGIN;
use http::{HeaderMap, HeaderValue, Response, request, response};

use super::RequestMatch;

/// One filter (`HTTPRouteFilter`, `GRPCRouteFilter`).
#[derive(Debug, Clone, PartialEq)]
pub enum Filter {
    /// `RequestHeaderModifier`.
    RequestHeaders(HeaderModifier),
    /// `ResponseHeaderModifier`.
    ResponseHeaders(HeaderModifier),
    /// `RequestRedirect`.
    Redirect(Redirect),
    /// `URLRewrite`.
    Rewrite(Rewrite),
    /// `CORS`.
    Cors(Cors),
}

/// The filters of a rule or of a backend. They are applied in the order in which they are given;
/// those of the rule come before those of the backend for requests, and after them for responses.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Filters {
    steps: Vec<Filter>,
    mirrors: Vec<Mirror>,
}

/// Where a request came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frontend {
    /// The scheme that the client speaks.
    pub scheme: Scheme,
    /// The Service's port.
    pub port: u16,
}

/// What becomes of a request after its filters.
#[derive(Debug)]
pub enum FilterVerdict {
    /// It goes on, as it is now.
    Continue,
    /// It is answered with this, which is complete: a redirect, or a preflight of CORS.
    Respond(Box<Response<()>>),
}

/// The `origin` of a request, which [`Filters::on_response`] asks for when the request is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin(HeaderValue);

impl Filters {
    /// These filters, in this order, and these mirrors.
    #[must_use]
    pub fn new(steps: Vec<Filter>, mirrors: Vec<Mirror>) -> Self {
        Self { steps, mirrors }
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.mirrors.is_empty()
    }

    /// Where copies of the request go, each with its share (`RequestMirror`).
    #[must_use]
    pub fn mirrors(&self) -> &[Mirror] {
        &self.mirrors
    }

    /// Whether a request is answered here whatever its backends: it needs none.
    #[must_use]
    pub fn answers(&self) -> bool {
        self.steps
            .iter()
            .any(|step| matches!(step, Filter::Redirect(_)))
    }

    /// What [`Filters::on_response`] will want to know of this request.
    #[must_use]
    pub fn origin(&self, headers: &HeaderMap) -> Option<Origin> {
        self.steps
            .iter()
            .any(|step| matches!(step, Filter::Cors(_)))
            .then(|| headers.get(ORIGIN).cloned().map(Origin))?
    }

    /// Changes a request on its way in, or answers it. `matched` is the match that selected the
    /// rule.
    pub fn on_request(
        &self,
        head: &mut request::Parts,
        matched: &RequestMatch,
        frontend: Frontend,
    ) -> FilterVerdict {
        for step in &self.steps {
            let answer = match step {
                Filter::RequestHeaders(modifier) => {
                    modifier.apply(&mut head.headers);
                    None
                }
                Filter::Rewrite(rewrite) => {
                    rewrite.apply(head, matched);
                    None
                }
                Filter::Redirect(redirect) => Some(redirect.answer(head, matched, frontend)),
                Filter::Cors(cors) => cors.preflight(head),
                Filter::ResponseHeaders(_) => None,
            };
            if let Some(answer) = answer {
                let (mut parts, ()) = answer.into_parts();
                self.on_response(self.origin(&head.headers).as_ref(), &mut parts);
                return FilterVerdict::Respond(Box::new(Response::from_parts(parts, ())));
            }
        }
        FilterVerdict::Continue
    }

    /// Changes a response on its way out. `origin` is what [`Filters::origin`] said of the request
    /// as it came in.
    pub fn on_response(&self, origin: Option<&Origin>, head: &mut response::Parts) {
        for step in &self.steps {
            match step {
                Filter::ResponseHeaders(modifier) => modifier.apply(&mut head.headers),
                Filter::Cors(cors) => {
                    if let Some(Origin(origin)) = origin {
                        cors.allow(origin, &mut head.headers);
                    }
                }
                Filter::RequestHeaders(_) | Filter::Rewrite(_) | Filter::Redirect(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests;
