//! Matching on headers.

use http::header::{COOKIE, HOST};
use http::request::Parts;
use http::{HeaderMap, HeaderName};

use super::matching::ValueMatch;
use super::pattern::Case;
use super::{Pattern, PatternError};

/// A header that a request must have (`HTTPHeaderMatch`, `GRPCHeaderMatch`).
///
/// A header that is there more than once is looked at as one whose values are joined by `,` in
/// their order, as RFC 9110 §5.3 allows and Envoy does; `cookie` by `; ` (RFC 9113 §8.2.3). So
/// neither the first nor the last of them can pass for all.
///
/// `host` is the authority of the request, which HTTP/2 has instead of the header. Its case does
/// not matter, and neither does its port, unless the value has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderMatch {
    name: HeaderName,
    value: ValueMatch,
}

/// How a header's value is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderMatchKind {
    /// `Exact`.
    Exact,
    /// `RegularExpression`.
    Regex,
}

impl HeaderMatch {
    /// A match of this name's value.
    pub fn new(name: HeaderName, kind: HeaderMatchKind, value: &str) -> Result<Self, PatternError> {
        let case = if name == HOST {
            Case::Insensitive
        } else {
            Case::Sensitive
        };
        let value = match kind {
            HeaderMatchKind::Exact => ValueMatch::Exact(value.into()),
            HeaderMatchKind::Regex => ValueMatch::Regex(Pattern::with_case(value, case)?),
        };
        Ok(Self { name, value })
    }

    /// The header's name.
    #[must_use]
    pub fn name(&self) -> &HeaderName {
        &self.name
    }

    /// What its value must be.
    #[must_use]
    pub fn value(&self) -> &ValueMatch {
        &self.value
    }

    /// Whether the request has it.
    #[must_use]
    pub fn matches(&self, head: &Parts) -> bool {
        if self.name == HOST {
            return authority(head).is_some_and(|authority| self.matches_host(authority));
        }
        let separator: &[u8] = if self.name == COOKIE { b"; " } else { b"," };
        match &self.value {
            ValueMatch::Exact(wanted) => {
                is_joined(&head.headers, &self.name, separator, wanted.as_bytes())
            }
            ValueMatch::Regex(pattern) => {
                let mut values = head.headers.get_all(&self.name).iter();
                match (values.next(), values.next()) {
                    (None, _) => false,
                    (Some(value), None) => pattern.matches(value.as_bytes()),
                    (Some(_), Some(_)) => {
                        pattern.matches(&join(&head.headers, &self.name, separator))
                    }
                }
            }
        }
    }

    fn matches_host(&self, authority: &str) -> bool {
        let host = without_port(authority);
        match &self.value {
            ValueMatch::Exact(wanted) if without_port(wanted) == &**wanted => {
                host.eq_ignore_ascii_case(wanted)
            }
            ValueMatch::Exact(wanted) => authority.eq_ignore_ascii_case(wanted),
            ValueMatch::Regex(pattern) => pattern.matches(host.as_bytes()),
        }
    }
}

/// The authority that a request is for: of its target, else of its `host`.
pub(super) fn authority(head: &Parts) -> Option<&str> {
    if let Some(authority) = head.uri.authority() {
        return Some(authority.as_str());
    }
    head.headers.get(HOST)?.to_str().ok()
}

/// A host without its port. The colons of an IPv6 address are within brackets.
pub(super) fn without_port(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port))
            if !port.contains(']') && port.bytes().all(|byte| byte.is_ascii_digit()) =>
        {
            host
        }
        _ => authority,
    }
}

/// Whether the header's values, joined, are this.
fn is_joined(headers: &HeaderMap, name: &HeaderName, separator: &[u8], wanted: &[u8]) -> bool {
    let mut values = headers.get_all(name).iter();
    let Some(first) = values.next() else {
        return false;
    };
    let Some(mut rest) = wanted.strip_prefix(first.as_bytes()) else {
        return false;
    };
    for value in values {
        let next = rest
            .strip_prefix(separator)
            .and_then(|rest| rest.strip_prefix(value.as_bytes()));
        match next {
            Some(next) => rest = next,
            None => return false,
        }
    }
    rest.is_empty()
}

fn join(headers: &HeaderMap, name: &HeaderName, separator: &[u8]) -> Vec<u8> {
    let mut joined = Vec::new();
    for value in headers.get_all(name) {
        if !joined.is_empty() {
            joined.extend_from_slice(separator);
        }
        joined.extend_from_slice(value.as_bytes());
    }
    joined
}

#[cfg(test)]
#[path = "header_tests.rs"]
mod tests;
