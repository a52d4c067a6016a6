//! What an endpoint is chosen by where balancing hashes.

use std::hash::{DefaultHasher, Hash, Hasher};

use http::header::COOKIE;
use http::{HeaderMap, HeaderName};

/// Something of a request that requests which belong together have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashKey {
    /// A header's value.
    Header(HeaderName),
    /// A cookie's value.
    Cookie(Box<str>),
    /// The pod that asks.
    Source,
}

impl HashKey {
    /// The hash of a request, if it has this. `source` tells one pod from another (its netns
    /// cookie). Of a header that comes several times all values count, in their order.
    #[must_use]
    pub fn of(&self, headers: &HeaderMap, source: u64) -> Option<u64> {
        // Without keys of its own: all agents of a version hash alike.
        let mut hasher = DefaultHasher::new();
        match self {
            Self::Header(name) => {
                let mut values = headers.get_all(name).iter().peekable();
                values.peek()?;
                values.for_each(|value| value.as_bytes().hash(&mut hasher));
            }
            Self::Cookie(name) => cookie(headers, name)?.hash(&mut hasher),
            Self::Source => source.hash(&mut hasher),
        }
        Some(hasher.finish())
    }
}

/// The value of a cookie (RFC 6265 section 5.4): HTTP/2 may send each in a header of its own.
fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find_map(|(key, value)| (key == name).then_some(value))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn requests_with_the_same_value_hash_alike_and_those_without_do_not_hash() {
        let mut jane = HeaderMap::new();
        jane.insert("x-user", HeaderValue::from_static("jane"));
        jane.append(COOKIE, HeaderValue::from_static("a=1; session=xyz"));
        let mut other = HeaderMap::new();
        other.append(COOKIE, HeaderValue::from_static("b=2"));
        other.append(COOKIE, HeaderValue::from_static("session=xyz"));

        let header = HashKey::Header(HeaderName::from_static("x-user"));
        assert!(header.of(&jane, 1).is_some());
        assert_eq!(header.of(&jane, 1), header.of(&jane.clone(), 2));
        assert_eq!(header.of(&other, 1), None);

        let cookie = HashKey::Cookie("session".into());
        assert_eq!(cookie.of(&jane, 1), cookie.of(&other, 1));
        assert!(cookie.of(&jane, 1).is_some());
        assert_eq!(HashKey::Cookie("c".into()).of(&jane, 1), None);

        assert_eq!(HashKey::Source.of(&jane, 1), HashKey::Source.of(&other, 1));
        assert_ne!(HashKey::Source.of(&jane, 1), HashKey::Source.of(&jane, 2));
    }
}
