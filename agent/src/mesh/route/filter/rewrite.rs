//! `URLRewrite`.

use http::header::HOST;
use http::request::Parts;
use http::uri::{Authority, PathAndQuery};
use http::{HeaderValue, Uri};

use crate::mesh::route::RequestMatch;

/// Changes where a request says that it goes (`HTTPURLRewriteFilter`). Its query stays.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rewrite {
    /// `hostname`: in place of the whole authority, port included.
    pub hostname: Option<Authority>,
    /// `path`.
    pub path: Option<PathModifier>,
}

/// How a path is changed (`HTTPPathModifier`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathModifier {
    /// `ReplaceFullPath`.
    Full(Box<str>),
    /// `ReplacePrefixMatch`, without a trailing slash: in place of the prefix that matched.
    Prefix(Box<str>),
}

impl PathModifier {
    /// `ReplacePrefixMatch` with this; a trailing slash says nothing.
    #[must_use]
    pub fn prefix(replacement: &str) -> Self {
        Self::Prefix(replacement.strip_suffix('/').unwrap_or(replacement).into())
    }

    /// The path and query of this request after the change. As they were where the prefix is not
    /// there, as after another rewrite.
    pub(super) fn apply(&self, uri: &Uri, matched: &RequestMatch) -> Option<PathAndQuery> {
        let path = match self {
            Self::Full(path) => path.to_string(),
            Self::Prefix(replacement) => {
                let rest = uri.path().strip_prefix(matched.matched_prefix()?)?;
                if !(rest.is_empty() || rest.starts_with('/')) {
                    return None;
                }
                match format!("{replacement}{rest}") {
                    path if path.is_empty() => "/".to_owned(),
                    path => path,
                }
            }
        };
        let whole = match uri.query() {
            Some(query) => format!("{path}?{query}"),
            None => path,
        };
        PathAndQuery::try_from(whole).ok()
    }
}

impl Rewrite {
    pub(super) fn apply(&self, head: &mut Parts, matched: &RequestMatch) {
        let path = self
            .path
            .as_ref()
            .and_then(|modifier| modifier.apply(&head.uri, matched));
        if path.is_none() && self.hostname.is_none() {
            return;
        }
        let mut parts = head.uri.clone().into_parts();
        if path.is_some() {
            parts.path_and_query = path;
        }
        if let Some(hostname) = &self.hostname {
            let is_in_target = parts.authority.is_some();
            if is_in_target {
                parts.authority = Some(hostname.clone());
            }
            // HTTP/2 has no such header, unless somebody sent it.
            if (!is_in_target || head.headers.contains_key(HOST))
                && let Ok(value) = HeaderValue::from_str(hostname.as_str())
            {
                head.headers.insert(HOST, value);
            }
        }
        if let Ok(uri) = Uri::from_parts(parts) {
            head.uri = uri;
        }
    }
}
