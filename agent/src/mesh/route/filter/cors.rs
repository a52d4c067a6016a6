//! `CORS`.

use std::str::FromStr;
use std::time::Duration;

use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use thiserror::Error;

use super::Scheme;

/// Lets pages of other origins use a Service (`HTTPCORSFilter`). Preflights are answered here:
/// 204, with what is allowed if the origin is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cors {
    /// `allowOrigins`.
    pub origins: Vec<OriginPattern>,
    /// `allowCredentials`.
    pub credentials: Credentials,
    /// `allowMethods`, as one header value. `*` is every method.
    pub methods: Option<HeaderValue>,
    /// `allowHeaders`, as one header value. `*` is every header.
    pub headers: Option<HeaderValue>,
    /// `exposeHeaders`, as one header value. `*` is every header.
    pub expose: Option<HeaderValue>,
    /// `maxAge`: how long a preflight may be remembered. Default 5 s.
    pub max_age: Duration,
}

/// Whether cookies and the like may come with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Credentials {
    /// They may.
    Allowed,
    /// Nothing is said of them, so they may not.
    Unsaid,
}

/// Origins that are allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OriginPattern {
    /// `*`
    Any,
    /// `<scheme>://<host>(:<port>)`
    Site {
        /// Its scheme.
        scheme: Scheme,
        /// Its host, or what that ends in, in lower case.
        host: HostPattern,
        /// Its port: where none is given, that of the scheme.
        port: u16,
    },
}

/// Hosts of origins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostPattern {
    /// This one.
    Exact(Box<str>),
    /// All that end in this: `*` stands for any number of labels, and of characters.
    Suffix(Box<str>),
}

/// A text that is no [`OriginPattern`].
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "{0:?} is not an origin: \"*\", or http or https, \"://\", a host that may start with \"*\", and maybe a port"
)]
pub struct OriginPatternError(pub String);

impl FromStr for OriginPattern {
    type Err = OriginPatternError;

    fn from_str(text: &str) -> Result<Self, OriginPatternError> {
        if text == "*" {
            return Ok(Self::Any);
        }
        let wrong = || OriginPatternError(text.to_owned());
        let (scheme, host, port) = split(text).ok_or_else(wrong)?;
        let (host, is_suffix) = match host.strip_prefix('*') {
            Some(suffix) => (suffix, true),
            None => (host, false),
        };
        let is_host = host
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-._[]:".contains(&byte));
        if !is_host || (host.is_empty() && !is_suffix) {
            return Err(wrong());
        }
        let host = host.to_ascii_lowercase().into();
        Ok(Self::Site {
            scheme,
            host: if is_suffix {
                HostPattern::Suffix(host)
            } else {
                HostPattern::Exact(host)
            },
            port,
        })
    }
}

/// Scheme, host and port of an origin.
fn split(origin: &str) -> Option<(Scheme, &str, u16)> {
    let (scheme, rest) = origin.split_once("://")?;
    let scheme = [Scheme::Http, Scheme::Https]
        .into_iter()
        .find(|known| scheme.eq_ignore_ascii_case(known.as_str()))?;
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => {
            (host, port.parse().ok().filter(|port| *port != 0)?)
        }
        _ => (rest, scheme.port()),
    };
    Some((scheme, host, port))
}

impl OriginPattern {
    fn matches(&self, origin: &str) -> bool {
        let Self::Site { scheme, host, port } = self else {
            return true;
        };
        let Some((given_scheme, given_host, given_port)) = split(origin) else {
            return false;
        };
        let is_host = match host {
            HostPattern::Exact(host) => given_host.eq_ignore_ascii_case(host),
            HostPattern::Suffix(suffix) => given_host
                .len()
                .checked_sub(suffix.len())
                .and_then(|start| given_host.get(start..))
                .is_some_and(|end| end.eq_ignore_ascii_case(suffix)),
        };
        *scheme == given_scheme && *port == given_port && is_host
    }
}

const WILDCARD: HeaderValue = HeaderValue::from_static("*");

impl Cors {
    /// The answer to a preflight (Fetch, "CORS-preflight request"), if this is one.
    pub(super) fn preflight(&self, head: &Parts) -> Option<Response<()>> {
        let wanted = head.headers.get(ACCESS_CONTROL_REQUEST_METHOD)?;
        head.headers
            .get(ORIGIN)
            .filter(|_| head.method == Method::OPTIONS)?;
        let origin = head.headers.get(ORIGIN)?;
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::NO_CONTENT;
        if !self.allows(origin) {
            return Some(response);
        }
        let headers = response.headers_mut();
        let methods = self
            .methods
            .as_ref()
            .map(|methods| self.unless_wild(methods, Some(wanted)));
        let asked = head.headers.get(ACCESS_CONTROL_REQUEST_HEADERS);
        let names = self
            .headers
            .as_ref()
            .map(|names| self.unless_wild(names, asked));
        for (name, value) in [
            (ACCESS_CONTROL_ALLOW_METHODS, methods.flatten()),
            (ACCESS_CONTROL_ALLOW_HEADERS, names.flatten()),
        ] {
            if let Some(value) = value {
                headers.insert(name, value);
            }
        }
        headers.insert(
            ACCESS_CONTROL_MAX_AGE,
            HeaderValue::from(self.max_age.as_secs()),
        );
        Some(response)
    }

    /// Tells the page's browser that it may read this response, if its origin is allowed.
    pub(super) fn allow(&self, origin: &HeaderValue, headers: &mut HeaderMap) {
        if !self.allows(origin) {
            return;
        }
        let is_for_all =
            self.credentials == Credentials::Unsaid && self.origins.contains(&OriginPattern::Any);
        if is_for_all {
            headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, WILDCARD);
        } else {
            headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
            // A cache must not give one origin's answer to another.
            headers.append(VARY, HeaderValue::from_name(ORIGIN));
        }
        if self.credentials == Credentials::Allowed {
            headers.insert(
                ACCESS_CONTROL_ALLOW_CREDENTIALS,
                HeaderValue::from_static("true"),
            );
        }
        let expose = self
            .expose
            .as_ref()
            .and_then(|names| self.unless_wild(names, None));
        if let Some(expose) = expose {
            headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, expose);
        }
    }

    fn allows(&self, origin: &HeaderValue) -> bool {
        origin
            .to_str()
            .is_ok_and(|origin| self.origins.iter().any(|one| one.matches(origin)))
    }

    /// With credentials `*` is no wildcard: then what was asked for stands in its place.
    fn unless_wild(
        &self,
        allowed: &HeaderValue,
        asked: Option<&HeaderValue>,
    ) -> Option<HeaderValue> {
        if *allowed == WILDCARD && self.credentials == Credentials::Allowed {
            return asked.cloned();
        }
        Some(allowed.clone())
    }
}
