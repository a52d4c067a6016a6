//! Which requests a rule is for.

use std::cmp::Ordering;

use http::Method;
use http::header::CONTENT_TYPE;
use http::request::Parts;

use super::{HeaderMatch, Pattern};

/// A value that something must have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ValueMatch {
    /// This very text.
    Exact(Box<str>),
    /// Any text that matches as a whole.
    Regex(Pattern),
}

impl ValueMatch {
    /// Whether this is such a value.
    #[must_use]
    pub fn matches(&self, value: &[u8]) -> bool {
        match self {
            Self::Exact(wanted) => wanted.as_bytes() == value,
            Self::Regex(pattern) => pattern.matches(value),
        }
    }

    /// How long it is written, in characters.
    fn characters(&self) -> usize {
        match self {
            Self::Exact(text) => text.chars().count(),
            Self::Regex(pattern) => pattern.as_str().chars().count(),
        }
    }
}

/// What a path must be. The path is looked at as it was sent, without its query: nothing is
/// decoded, no `..` resolved, no `//` merged. What the application gets is what was matched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathMatch {
    /// `Exact`.
    Exact(Box<str>),
    /// `RegularExpression`, the whole path.
    Regex(Pattern),
    /// `PathPrefix` by whole segments, without a trailing slash: `/` is the empty one.
    Prefix(Box<str>),
}

impl PathMatch {
    /// `PathPrefix` of this path; a trailing slash says nothing.
    #[must_use]
    pub fn prefix(path: &str) -> Self {
        Self::Prefix(path.strip_suffix('/').unwrap_or(path).into())
    }

    /// Whether this path matches.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::Exact(wanted) => &**wanted == path,
            Self::Regex(pattern) => pattern.matches(path.as_bytes()),
            Self::Prefix(prefix) => path
                .strip_prefix(&**prefix)
                .is_some_and(|rest| rest.is_empty() || prefix.is_empty() || rest.starts_with('/')),
        }
    }
}

/// The service and method that a gRPC call must be for (`GRPCMethodMatch`). None is any.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GrpcMatch {
    /// The service, as in the path `/<service>/<method>`.
    pub service: Option<ValueMatch>,
    /// The method.
    pub method: Option<ValueMatch>,
}

impl GrpcMatch {
    fn matches(&self, path: &str) -> bool {
        if self.service.is_none() && self.method.is_none() {
            return true;
        }
        let Some((service, method)) = path
            .strip_prefix('/')
            .and_then(|path| path.rsplit_once('/'))
        else {
            return false;
        };
        let fits = |wanted: &Option<ValueMatch>, value: &str| {
            wanted
                .as_ref()
                .is_none_or(|wanted| wanted.matches(value.as_bytes()))
        };
        fits(&self.service, service) && fits(&self.method, method)
    }
}

/// A query parameter that a request must have (`HTTPQueryParamMatch`): the first of this name.
/// Names and values are compared as they were sent, not decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueryMatch {
    /// Its name.
    pub name: Box<str>,
    /// Its value; empty where there is no `=`.
    pub value: ValueMatch,
}

impl QueryMatch {
    fn matches(&self, query: &str) -> bool {
        query
            .split('&')
            .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
            .find(|(name, _)| *name == &*self.name)
            .is_some_and(|(_, value)| self.value.matches(value.as_bytes()))
    }
}

/// What a request must be for a rule (`HTTPRouteMatch`, `GRPCRouteMatch`): all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestMatch {
    /// Its path or call.
    pub target: TargetMatch,
    /// Its method.
    pub method: Option<Method>,
    /// Its headers.
    pub headers: Vec<HeaderMatch>,
    /// Its query parameters.
    pub query: Vec<QueryMatch>,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetMatch {
    /// A path.
    Path(PathMatch),
    /// A gRPC call.
    Grpc(GrpcMatch),
}

impl RequestMatch {
    /// Every request: the prefix `/`.
    #[must_use]
    pub fn any() -> Self {
        Self::path(PathMatch::prefix("/"))
    }

    /// Requests for this path.
    #[must_use]
    pub fn path(path: PathMatch) -> Self {
        Self {
            target: TargetMatch::Path(path),
            method: None,
            headers: Vec::new(),
            query: Vec::new(),
        }
    }

    /// Calls of this service and method.
    #[must_use]
    pub fn grpc(call: GrpcMatch) -> Self {
        Self {
            target: TargetMatch::Grpc(call),
            method: None,
            headers: Vec::new(),
            query: Vec::new(),
        }
    }

    /// The prefix of the path that was matched, without a trailing slash, if it was one.
    #[must_use]
    pub fn matched_prefix(&self) -> Option<&str> {
        match &self.target {
            TargetMatch::Path(PathMatch::Prefix(prefix)) => Some(prefix),
            TargetMatch::Path(PathMatch::Exact(_) | PathMatch::Regex(_)) | TargetMatch::Grpc(_) => {
                None
            }
        }
    }

    /// How many regular expressions it has, which take memory and time.
    #[must_use]
    pub fn patterns(&self) -> usize {
        let is_pattern = |value: &ValueMatch| matches!(value, ValueMatch::Regex(_));
        let of_target = match &self.target {
            TargetMatch::Path(path) => usize::from(matches!(path, PathMatch::Regex(_))),
            TargetMatch::Grpc(call) => [&call.service, &call.method]
                .into_iter()
                .flatten()
                .filter(|value| is_pattern(value))
                .count(),
        };
        let headers = self.headers.iter().map(HeaderMatch::value);
        let query = self.query.iter().map(|query| &query.value);
        of_target
            + headers
                .chain(query)
                .filter(|value| is_pattern(value))
                .count()
    }

    /// Whether this is such a request.
    #[must_use]
    pub fn matches(&self, head: &Parts) -> bool {
        let target = match &self.target {
            TargetMatch::Path(path) => path.matches(head.uri.path()),
            TargetMatch::Grpc(call) => is_grpc(head) && call.matches(head.uri.path()),
        };
        target && self.matches_besides_target(head)
    }

    /// The same for a request whose path or call is known to match.
    pub(super) fn matches_besides_target(&self, head: &Parts) -> bool {
        self.method
            .as_ref()
            .is_none_or(|method| *method == head.method)
            && self.headers.iter().all(|header| header.matches(head))
            && self
                .query
                .iter()
                .all(|query| query.matches(head.uri.query().unwrap_or_default()))
    }

    /// Which of two matches comes first, as far as the matches themselves tell
    /// (`HTTPRouteRule.matches`, `GRPCRouteRule.matches`). Where the API leaves it open a regular
    /// expression of a path stands between exact paths and prefixes, so that it is not hidden by
    /// the prefix `/`, and longer ones come first.
    pub(super) fn precedence(&self, other: &Self) -> Ordering {
        let more = |mine: usize, theirs: usize| theirs.cmp(&mine);
        compare_targets(&self.target, &other.target)
            .then_with(|| {
                more(
                    usize::from(self.method.is_some()),
                    usize::from(other.method.is_some()),
                )
            })
            .then_with(|| more(self.headers.len(), other.headers.len()))
            .then_with(|| more(self.query.len(), other.query.len()))
    }
}

fn compare_targets(one: &TargetMatch, other: &TargetMatch) -> Ordering {
    match (one, other) {
        (TargetMatch::Path(one), TargetMatch::Path(other)) => compare_paths(one, other),
        (TargetMatch::Grpc(one), TargetMatch::Grpc(other)) => compare_calls(one, other),
        // One table holds routes of one kind.
        (TargetMatch::Grpc(_), TargetMatch::Path(_)) => Ordering::Less,
        (TargetMatch::Path(_), TargetMatch::Grpc(_)) => Ordering::Greater,
    }
}

/// Different exact paths, and different prefixes of one length, exclude each other; they are told
/// apart all the same so that equal ones stand together and can be found by search.
fn compare_paths(one: &PathMatch, other: &PathMatch) -> Ordering {
    let rank = |path: &PathMatch| match path {
        PathMatch::Exact(_) => 0,
        PathMatch::Regex(_) => 1,
        PathMatch::Prefix(_) => 2,
    };
    match (one, other) {
        (PathMatch::Exact(one), PathMatch::Exact(other)) => one.cmp(other),
        (PathMatch::Prefix(one), PathMatch::Prefix(other)) => compare_prefixes(one, other),
        (PathMatch::Regex(one), PathMatch::Regex(other)) => {
            other.as_str().len().cmp(&one.as_str().len())
        }
        _ => rank(one).cmp(&rank(other)),
    }
}

/// Longer ones first.
pub(super) fn compare_prefixes(one: &str, other: &str) -> Ordering {
    other.len().cmp(&one.len()).then_with(|| one.cmp(other))
}

/// Most characters of the service, then of the method; exact ones before expressions.
fn compare_calls(one: &GrpcMatch, other: &GrpcMatch) -> Ordering {
    let exactness = |value: &Option<ValueMatch>| match value {
        Some(ValueMatch::Exact(_)) => 0,
        Some(ValueMatch::Regex(_)) => 1,
        None => 2,
    };
    let characters = |value: &Option<ValueMatch>| value.as_ref().map_or(0, ValueMatch::characters);
    let part = |one: &Option<ValueMatch>, other: &Option<ValueMatch>| {
        exactness(one)
            .cmp(&exactness(other))
            .then_with(|| characters(other).cmp(&characters(one)))
    };
    part(&one.service, &other.service).then_with(|| part(&one.method, &other.method))
}

/// Whether a request is a gRPC call: a POST whose content is of a type `application/grpc…`.
pub(super) fn is_grpc(head: &Parts) -> bool {
    const TYPE: &[u8] = b"application/grpc";
    head.method == Method::POST
        && head.headers.get(CONTENT_TYPE).is_some_and(|content| {
            content
                .as_bytes()
                .get(..TYPE.len())
                .is_some_and(|start| start.eq_ignore_ascii_case(TYPE))
        })
}

#[cfg(test)]
#[path = "matching_tests.rs"]
mod tests;
