//! HTTPRoutes.

use std::sync::Arc;
use std::time::Duration;

use gateway_api::experimental::httproutes::HttpRoute;
use http::Method;
use serde::Deserialize;

use super::super::object::Fault;
use super::route::{BackendManifest, RouteFacts, RuleFacts, at_most, backends};
use super::route_filter::{FilterFacts, FilterManifest, PATH_MAX, check_path};
use super::route_match::{HeaderMatchManifest, MatchKind, header_matches, pattern};
use super::route_requests::{RequestRule, RequestSpec};
use super::route_session::{SessionManifest, session};
use crate::mesh::parse_duration;
use crate::mesh::route::{
    PathMatch, QueryMatch, RequestMatch, RouteId, RouteKind, RouteRetry, RouteTimeouts,
    TargetMatch, ValueMatch,
};

/// The most that these lists may hold, as the API has it.
const MATCHES_MAX: usize = 64;
const QUERIES_MAX: usize = 16;

/// The most retries.
const ATTEMPTS_MAX: i64 = 10;

/// `HTTPRouteRule`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RuleManifest {
    name: Option<String>,
    #[serde(default)]
    matches: Vec<MatchManifest>,
    #[serde(default)]
    filters: Vec<FilterManifest>,
    #[serde(default)]
    backend_refs: Vec<BackendManifest>,
    timeouts: Option<TimeoutsManifest>,
    retry: Option<RetryManifest>,
    session_persistence: Option<SessionManifest>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct MatchManifest {
    path: Option<PathManifest>,
    #[serde(default)]
    headers: Vec<HeaderMatchManifest>,
    #[serde(default)]
    query_params: Vec<QueryManifest>,
    method: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
struct PathManifest {
    #[serde(rename = "type")]
    kind: Option<PathKind>,
    value: Option<String>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
enum PathKind {
    Exact,
    PathPrefix,
    RegularExpression,
}

#[derive(Debug, Clone, Deserialize)]
struct QueryManifest {
    name: String,
    #[serde(rename = "type")]
    kind: Option<MatchKind>,
    value: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct TimeoutsManifest {
    request: Option<String>,
    backend_request: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
struct RetryManifest {
    #[serde(default)]
    codes: Vec<i64>,
    attempts: Option<i64>,
    backoff: Option<String>,
}

impl RouteFacts {
    /// Checks an HTTPRoute.
    pub fn of_http(route: &HttpRoute) -> Result<Self, Fault> {
        let spec = RequestSpec {
            hostnames: route.spec.hostnames.as_deref(),
            rules: &route.spec.rules,
            parents: &route.spec.parent_refs,
        };
        Self::of_requests::<RuleManifest>(&route.metadata, &spec)
    }
}

impl RequestRule for RuleManifest {
    const KIND: RouteKind = RouteKind::Http;
    const WITHOUT_WEIGHT: &'static str = "the answer is 500";

    fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    fn facts(self, id: &RouteId, field: &str, name: Arc<str>) -> Result<RuleFacts, Fault> {
        let matches = matches(&format!("{field}.matches"), self.matches)?;
        let filters = FilterFacts::of(id, &format!("{field}.filters"), self.filters, &matches)?;
        let list = format!("{field}.backendRefs");
        if filters.answers() && !self.backend_refs.is_empty() {
            return Err(Fault::new(
                list,
                "a rule with a RequestRedirect has no backends",
            ));
        }
        let backends = backends(id, &list, self.backend_refs, &matches)?;
        let persistence = format!("{field}.sessionPersistence");
        Ok(RuleFacts {
            timeouts: timeouts(&format!("{field}.timeouts"), self.timeouts)?,
            retry: retry(&format!("{field}.retry"), self.retry)?,
            session: session(&persistence, &name, self.session_persistence)?,
            name,
            matches,
            filters,
            backends,
        })
    }
}

fn matches(field: &str, given: Vec<MatchManifest>) -> Result<Vec<RequestMatch>, Fault> {
    at_most(field, &given, MATCHES_MAX)?;
    if given.is_empty() {
        return Ok(vec![RequestMatch::any()]);
    }
    let read = |(index, given): (usize, MatchManifest)| {
        let field = format!("{field}[{index}]");
        Ok(RequestMatch {
            target: TargetMatch::Path(path(&format!("{field}.path"), given.path)?),
            method: given
                .method
                .map(|method| self::method(&format!("{field}.method"), &method))
                .transpose()?,
            headers: header_matches(&format!("{field}.headers"), given.headers)?,
            query: queries(&format!("{field}.queryParams"), given.query_params)?,
        })
    };
    given.into_iter().enumerate().map(read).collect()
}

fn method(field: &str, text: &str) -> Result<Method, Fault> {
    Method::from_bytes(text.as_bytes())
        .map_err(|_| Fault::new(field, format!("{text:?} is not a method")))
}

fn path(field: &str, given: Option<PathManifest>) -> Result<PathMatch, Fault> {
    let Some(given) = given else {
        return Ok(PathMatch::prefix("/"));
    };
    let field = format!("{field}.value");
    let value = given.value.as_deref().unwrap_or("/");
    match given.kind.unwrap_or(PathKind::PathPrefix) {
        PathKind::Exact => {
            check_matched_path(&field, value)?;
            Ok(PathMatch::Exact(value.into()))
        }
        PathKind::PathPrefix => {
            check_matched_path(&field, value)?;
            Ok(PathMatch::prefix(value))
        }
        PathKind::RegularExpression => Ok(PathMatch::Regex(pattern(&field, value, PATH_MAX)?)),
    }
}

/// A path that can be matched: one that has no other way to be written, so that nobody thinks that
/// those are matched too.
fn check_matched_path(field: &str, text: &str) -> Result<(), Fault> {
    check_path(field, text)?;
    let within = ["//", "/./", "/../", "%2f", "%2F"].iter();
    let end = ["/.", "/.."].iter();
    let wrong = within
        .filter(|part| text.contains(**part))
        .chain(end.filter(|part| text.ends_with(**part)))
        .next();
    match wrong {
        Some(part) => Err(Fault::new(field, format!("{text:?} has {part:?}"))),
        None => Ok(()),
    }
}

fn queries(field: &str, given: Vec<QueryManifest>) -> Result<Vec<QueryMatch>, Fault> {
    const VALUE_MAX: usize = 1024;
    at_most(field, &given, QUERIES_MAX)?;
    let mut queries: Vec<QueryMatch> = Vec::with_capacity(given.len());
    for (index, given) in given.into_iter().enumerate() {
        let field = format!("{field}[{index}]");
        if given.name.is_empty() {
            return Err(Fault::new(format!("{field}.name"), "is empty"));
        }
        let value = match given.kind.unwrap_or_default() {
            MatchKind::Exact => ValueMatch::Exact(given.value.into()),
            MatchKind::RegularExpression => {
                ValueMatch::Regex(pattern(&format!("{field}.value"), &given.value, VALUE_MAX)?)
            }
        };
        let name = given.name.into();
        // Of equal names only the first counts.
        if queries.iter().all(|other| other.name != name) {
            queries.push(QueryMatch { name, value });
        }
    }
    Ok(queries)
}

fn timeouts(field: &str, given: Option<TimeoutsManifest>) -> Result<Option<RouteTimeouts>, Fault> {
    let Some(given) = given else {
        return Ok(None);
    };
    let limit = |leaf: &str, text: Option<String>| {
        let read = text.map(|text| duration(&format!("{field}.{leaf}"), &text));
        // 0 is no limit.
        let limit = read.transpose()?;
        Ok(limit.map(|limit| (!limit.is_zero()).then_some(limit)))
    };
    let timeouts = RouteTimeouts {
        request: limit("request", given.request)?,
        backend_request: limit("backendRequest", given.backend_request)?,
    };
    if let (Some(Some(whole)), Some(one)) = (timeouts.request, timeouts.backend_request)
        && one.is_none_or(|one| one > whole)
    {
        return Err(Fault::new(
            format!("{field}.backendRequest"),
            "is longer than request, of which it is a part",
        ));
    }
    Ok(Some(timeouts))
}

fn retry(field: &str, given: Option<RetryManifest>) -> Result<Option<RouteRetry>, Fault> {
    let Some(given) = given else {
        return Ok(None);
    };
    let code = |(index, code): (usize, &i64)| {
        u16::try_from(*code)
            .ok()
            .filter(|code| (400..=599).contains(code))
            .ok_or_else(|| {
                let reason = format!("{code} is not a status of an error: 400 to 599");
                Fault::new(format!("{field}.codes[{index}]"), reason)
            })
    };
    let attempts = |attempts: i64| {
        u32::try_from(attempts)
            .ok()
            .filter(|_| attempts <= ATTEMPTS_MAX)
            .ok_or_else(|| {
                let reason = format!("{attempts} is not a number of retries: 0 to {ATTEMPTS_MAX}");
                Fault::new(format!("{field}.attempts"), reason)
            })
    };
    Ok(Some(RouteRetry {
        codes: given
            .codes
            .iter()
            .enumerate()
            .map(code)
            .collect::<Result<_, _>>()?,
        attempts: given.attempts.map(attempts).transpose()?,
        backoff: given
            .backoff
            .map(|text| duration(&format!("{field}.backoff"), &text))
            .transpose()?,
    }))
}

/// A duration of the API (GEP-2257).
pub(super) fn duration(field: &str, text: &str) -> Result<Duration, Fault> {
    parse_duration(text).ok_or_else(|| {
        let reason = format!(
            "{text:?} is not a duration: numbers with units h, m, s, ms, like \"1s\" or \"1m30s\""
        );
        Fault::new(field, reason)
    })
}

#[cfg(test)]
#[path = "http_route_tests.rs"]
mod tests;
