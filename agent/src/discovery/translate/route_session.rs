//! Session persistence, which HTTPRoutes and GRPCRoutes have in common.

use http::HeaderName;
use serde::Deserialize;

use super::super::object::Fault;
use super::http_route::duration;
use super::route_filter::header_name;
use crate::mesh::route::{CookieLifetime, SessionCarrier, SessionPersistence};

/// The longest name, in characters.
const NAME_MAX: usize = 128;

/// What sessions are called that nobody named. A session of one rule is none of another, so that
/// the name need not tell them apart.
const DEFAULT_NAME: &str = "undermesh-session";

/// `SessionPersistence`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct SessionManifest {
    session_name: Option<String>,
    absolute_timeout: Option<String>,
    idle_timeout: Option<String>,
    #[serde(rename = "type")]
    kind: Option<SessionKind>,
    cookie_config: Option<CookieManifest>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
enum SessionKind {
    #[default]
    Cookie,
    Header,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct CookieManifest {
    lifetime_type: Option<LifetimeKind>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
enum LifetimeKind {
    Session,
    Permanent,
}

/// The persistence of the rule of this name.
pub(super) fn session(
    field: &str,
    rule: &str,
    given: Option<SessionManifest>,
) -> Result<Option<SessionPersistence>, Fault> {
    let Some(given) = given else {
        return Ok(None);
    };
    let timeout = |leaf: &str, text: Option<String>| {
        let field = format!("{field}.{leaf}");
        let Some(text) = text else {
            return Ok(None);
        };
        match duration(&field, &text)? {
            limit if limit.as_secs() == 0 => Err(Fault::new(field, "a session lasts at least 1s")),
            limit => Ok(Some(limit)),
        }
    };
    let absolute_timeout = timeout("absoluteTimeout", given.absolute_timeout)?;
    let idle_timeout = timeout("idleTimeout", given.idle_timeout)?;
    let name = name(&format!("{field}.sessionName"), given.session_name)?;
    let lifetime = given.cookie_config.and_then(|cookie| cookie.lifetime_type);
    let carrier = match (given.kind.unwrap_or_default(), lifetime) {
        (SessionKind::Header, Some(_)) => {
            return Err(Fault::new(
                format!("{field}.cookieConfig"),
                "there is no cookie: type is Header",
            ));
        }
        (SessionKind::Header, None) => SessionCarrier::Header(name),
        (SessionKind::Cookie, Some(LifetimeKind::Permanent)) if absolute_timeout.is_none() => {
            return Err(Fault::new(
                format!("{field}.absoluteTimeout"),
                "is missing: a Permanent cookie lasts for this time",
            ));
        }
        (SessionKind::Cookie, lifetime) => SessionCarrier::Cookie {
            name: name.as_str().into(),
            lifetime: match lifetime {
                Some(LifetimeKind::Permanent) => CookieLifetime::Permanent,
                Some(LifetimeKind::Session) | None => CookieLifetime::Session,
            },
        },
    };
    let mut persistence = SessionPersistence::new(rule, carrier);
    persistence.absolute_timeout = absolute_timeout;
    persistence.idle_timeout = idle_timeout;
    Ok(Some(persistence))
}

/// A token is the name of a cookie as well as of a header.
fn name(field: &str, given: Option<String>) -> Result<HeaderName, Fault> {
    let text = given.as_deref().unwrap_or(DEFAULT_NAME);
    if text.len() > NAME_MAX {
        let reason = format!("has {} characters: at most {NAME_MAX}", text.len());
        return Err(Fault::new(field, reason));
    }
    header_name(field, text)
}
