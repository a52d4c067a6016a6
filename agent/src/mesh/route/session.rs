//! Sessions that stay with one endpoint (`sessionPersistence`, GEP-1619).
//!
//! The client carries all there is to know: which rule began the session, which backend and
//! endpoint it is with, and when it began and was last used. So every agent continues it, and
//! nothing is kept here.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::digest::{SHA256, digest};
use http::header::{COOKIE, SET_COOKIE};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::Backend;

/// How a rule keeps a client with one endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionPersistence {
    /// Of the rule: a session of another rule is none here.
    rule: u64,
    /// `type`, with what goes with it.
    pub carrier: SessionCarrier,
    /// `absoluteTimeout`: since it began.
    pub absolute_timeout: Option<Duration>,
    /// `idleTimeout`: since it was last used.
    pub idle_timeout: Option<Duration>,
}

/// What carries a session between client and agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionCarrier {
    /// A cookie of this name.
    Cookie {
        /// `sessionName`.
        name: Box<str>,
        /// `cookieConfig.lifetimeType`.
        lifetime: CookieLifetime,
    },
    /// A header of this name (`sessionName`), in responses and in requests.
    Header(HeaderName),
}

/// How long the client keeps the cookie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CookieLifetime {
    /// Until it ends: the cookie has no `Max-Age`.
    Session,
    /// For the absolute timeout, which the cookie gives as its `Max-Age`.
    Permanent,
}

/// A session that a request is part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Session {
    pub(super) backend: u64,
    endpoint: SocketAddr,
    /// Seconds since 1970.
    began: u64,
    seen: u64,
}

impl Session {
    /// The endpoint that it is with. Not to be trusted: use it only if it is one of the backend's.
    #[must_use]
    pub fn endpoint(&self) -> SocketAddr {
        self.endpoint
    }
}

impl SessionPersistence {
    /// Persistence of the rule with this name (see [`super::Rule::name`]).
    #[must_use]
    pub fn new(rule: &str, carrier: SessionCarrier) -> Self {
        Self {
            rule: fingerprint(rule),
            carrier,
            absolute_timeout: None,
            idle_timeout: None,
        }
    }

    /// The session that a request is part of, if it is of this rule and neither of its timeouts has
    /// passed.
    #[must_use]
    pub fn read(&self, headers: &HeaderMap, now: SystemTime) -> Option<Session> {
        match &self.carrier {
            SessionCarrier::Cookie { name, .. } => headers
                .get_all(COOKIE)
                .iter()
                .filter_map(|cookies| cookies.to_str().ok())
                .flat_map(|cookies| cookies.split(';'))
                .filter_map(|pair| pair.trim().split_once('='))
                .filter(|(given, _)| *given == &**name)
                .find_map(|(_, token)| self.parse(token, now)),
            SessionCarrier::Header(name) => headers
                .get_all(name)
                .iter()
                .filter_map(|token| token.to_str().ok())
                .find_map(|token| self.parse(token, now)),
        }
    }

    /// The header that tells the client which backend and endpoint answered it. None if it need not
    /// be told: the session is the one that it has, and nothing counts its last use.
    #[must_use]
    pub fn answer(
        &self,
        former: Option<&Session>,
        backend: &Backend,
        endpoint: SocketAddr,
        now: SystemTime,
    ) -> Option<(HeaderName, HeaderValue)> {
        let now = seconds(now);
        let same = former.filter(|former| {
            former.backend == backend.fingerprint() && former.endpoint == endpoint
        });
        if same.is_some() && self.idle_timeout.is_none() {
            return None;
        }
        let session = Session {
            backend: backend.fingerprint(),
            endpoint,
            began: same.map_or(now, |same| same.began),
            seen: now,
        };
        let token = self.token(&session);
        match &self.carrier {
            SessionCarrier::Header(name) => {
                Some((name.clone(), HeaderValue::from_str(&token).ok()?))
            }
            SessionCarrier::Cookie { name, lifetime } => {
                let mut cookie = format!("{name}={token}; Path=/; HttpOnly; SameSite=Lax");
                let ends = self
                    .absolute_timeout
                    .map(|limit| session.began.saturating_add(limit.as_secs()));
                if let (CookieLifetime::Permanent, Some(ends)) = (lifetime, ends) {
                    cookie += &format!("; Max-Age={}", ends.saturating_sub(now));
                }
                Some((SET_COOKIE, HeaderValue::from_str(&cookie).ok()?))
            }
        }
    }

    fn token(&self, session: &Session) -> String {
        let address = match session.endpoint.ip() {
            IpAddr::V4(address) => address.to_ipv6_mapped(),
            IpAddr::V6(address) => address,
        };
        format!(
            "{VERSION}{:016x}{:016x}{:032x}{:04x}{:010x}{:010x}",
            self.rule,
            session.backend,
            address.to_bits(),
            session.endpoint.port(),
            session.began,
            session.seen,
        )
    }

    fn parse(&self, token: &str, now: SystemTime) -> Option<Session> {
        let mut rest = token.strip_prefix(VERSION)?;
        if rest.len() != 88 || !rest.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let mut take = |digits: usize| {
            let (field, after) = rest.split_at_checked(digits)?;
            rest = after;
            u128::from_str_radix(field, 16).ok()
        };
        let rule = u64::try_from(take(16)?).ok()?;
        let backend = u64::try_from(take(16)?).ok()?;
        let address = Ipv6Addr::from_bits(take(32)?).to_canonical();
        let port = u16::try_from(take(4)?).ok()?;
        let began = u64::try_from(take(10)?).ok()?;
        let seen = u64::try_from(take(10)?).ok()?;
        let now = seconds(now);
        let passed = |since: u64, limit: Option<Duration>| {
            limit.is_some_and(|limit| now.saturating_sub(since) >= limit.as_secs().max(1))
        };
        let over = passed(began, self.absolute_timeout) || passed(seen, self.idle_timeout);
        (rule == self.rule && !over).then_some(Session {
            backend,
            endpoint: SocketAddr::new(address, port),
            began,
            seen,
        })
    }
}

/// Of the token's form.
const VERSION: &str = "1";

fn seconds(now: SystemTime) -> u64 {
    now.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// A number that stands for a text, the same in every agent.
pub(super) fn fingerprint(text: &str) -> u64 {
    let digest = digest(&SHA256, text.as_bytes());
    digest
        .as_ref()
        .iter()
        .take(8)
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
