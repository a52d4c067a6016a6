//! `RequestRedirect`.

use http::header::LOCATION;
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderValue, Response, StatusCode};

use super::{Frontend, PathModifier};
use crate::mesh::route::RequestMatch;
use crate::mesh::route::header::{authority, without_port};

/// Sends the client elsewhere (`HTTPRequestRedirectFilter`). The query stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redirect {
    /// `scheme`: the request's where it is not given.
    pub scheme: Option<Scheme>,
    /// `hostname`: the request's where it is not given.
    pub hostname: Option<Authority>,
    /// `port`: that of the scheme if one is given, else the Service's.
    pub port: Option<u16>,
    /// `path`: the request's where it is not given.
    pub path: Option<PathModifier>,
    /// `statusCode`: 301, 302 (the default), 303, 307 or 308.
    pub status: StatusCode,
}

/// A scheme of a redirect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// `http`
    Http,
    /// `https`
    Https,
}

impl Scheme {
    /// As it is written.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    /// The port that goes without saying.
    #[must_use]
    pub fn port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

impl Redirect {
    pub(super) fn answer(
        &self,
        head: &Parts,
        matched: &RequestMatch,
        frontend: Frontend,
    ) -> Response<()> {
        let mut response = Response::new(());
        *response.status_mut() = self.status;
        if let Ok(location) = HeaderValue::from_str(&self.location(head, matched, frontend)) {
            response.headers_mut().insert(LOCATION, location);
        }
        response
    }

    fn location(&self, head: &Parts, matched: &RequestMatch, frontend: Frontend) -> String {
        let modified = self
            .path
            .as_ref()
            .and_then(|modifier| modifier.apply(&head.uri, matched));
        let target = modified
            .as_ref()
            .or_else(|| head.uri.path_and_query())
            .map_or("/", |target| target.as_str());
        let host = self
            .hostname
            .as_ref()
            .map(Authority::as_str)
            .or_else(|| authority(head).map(without_port));
        // HTTP/1.0 may do without a host; the client knows where it is.
        let Some(host) = host else {
            return target.to_owned();
        };
        let scheme = self.scheme.unwrap_or(frontend.scheme);
        let port = self.port.unwrap_or(match self.scheme {
            Some(scheme) => scheme.port(),
            None => frontend.port,
        });
        if port == scheme.port() {
            format!("{}://{host}{target}", scheme.as_str())
        } else {
            format!("{}://{host}:{port}{target}", scheme.as_str())
        }
    }
}
