//! GRPCRoutes.

use std::sync::Arc;

use gateway_api::experimental::grpcroutes::GrpcRoute;
use serde::Deserialize;

use super::super::object::Fault;
use super::route::{BackendManifest, RouteFacts, RuleFacts, at_most, backends};
use super::route_filter::{FilterFacts, FilterManifest};
use super::route_match::{HeaderMatchManifest, MatchKind, header_matches, pattern};
use super::route_requests::{RequestRule, RequestSpec};
use super::route_session::{SessionManifest, session};
use crate::mesh::route::{GrpcMatch, RequestMatch, RouteId, RouteKind, ValueMatch};

/// The most that a rule may hold, as the API has it.
const MATCHES_MAX: usize = 64;

/// The longest name of a service or a method, in characters.
const NAME_MAX: usize = 1024;

/// `GRPCRouteRule`.
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
    session_persistence: Option<SessionManifest>,
}

#[derive(Debug, Clone, Deserialize)]
struct MatchManifest {
    method: Option<CallManifest>,
    #[serde(default)]
    headers: Vec<HeaderMatchManifest>,
}

#[derive(Debug, Clone, Deserialize)]
struct CallManifest {
    #[serde(rename = "type")]
    kind: Option<MatchKind>,
    service: Option<String>,
    method: Option<String>,
}

impl RouteFacts {
    /// Checks a GRPCRoute.
    pub fn of_grpc(route: &GrpcRoute) -> Result<Self, Fault> {
        let spec = RequestSpec {
            hostnames: route.spec.hostnames.as_deref(),
            rules: &route.spec.rules,
            parents: &route.spec.parent_refs,
        };
        Self::of_requests::<RuleManifest>(&route.metadata, &spec)
    }
}

impl RequestRule for RuleManifest {
    const KIND: RouteKind = RouteKind::Grpc;
    const WITHOUT_WEIGHT: &'static str = "the answer is UNAVAILABLE";

    fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    fn facts(self, id: &RouteId, field: &str, name: Arc<str>) -> Result<RuleFacts, Fault> {
        let matches = matches(&format!("{field}.matches"), self.matches)?;
        let filters = FilterFacts::of(id, &format!("{field}.filters"), self.filters, &matches)?;
        let list = format!("{field}.backendRefs");
        let backends = backends(id, &list, self.backend_refs, &matches)?;
        let persistence = format!("{field}.sessionPersistence");
        Ok(RuleFacts {
            session: session(&persistence, &name, self.session_persistence)?,
            name,
            matches,
            filters,
            backends,
            timeouts: None,
            retry: None,
        })
    }
}

fn matches(field: &str, given: Vec<MatchManifest>) -> Result<Vec<RequestMatch>, Fault> {
    at_most(field, &given, MATCHES_MAX)?;
    if given.is_empty() {
        return Ok(vec![RequestMatch::grpc(GrpcMatch::default())]);
    }
    let read = |(index, given): (usize, MatchManifest)| {
        let field = format!("{field}[{index}]");
        Ok(RequestMatch {
            headers: header_matches(&format!("{field}.headers"), given.headers)?,
            ..RequestMatch::grpc(call(&format!("{field}.method"), given.method)?)
        })
    };
    given.into_iter().enumerate().map(read).collect()
}

fn call(field: &str, given: Option<CallManifest>) -> Result<GrpcMatch, Fault> {
    let Some(given) = given else {
        return Ok(GrpcMatch::default());
    };
    let kind = given.kind.unwrap_or_default();
    let read = |leaf: &str, text: Option<String>, is_name: fn(&str) -> bool| {
        let field = format!("{field}.{leaf}");
        // Empty is any.
        let Some(text) = text.filter(|text| !text.is_empty()) else {
            return Ok(None);
        };
        match kind {
            MatchKind::RegularExpression => {
                let pattern = pattern(&field, &text, NAME_MAX)?;
                Ok(Some(ValueMatch::Regex(pattern)))
            }
            MatchKind::Exact if text.len() <= NAME_MAX && is_name(&text) => {
                Ok(Some(ValueMatch::Exact(text.into())))
            }
            MatchKind::Exact => {
                let reason = format!("{text:?} is not the name of a gRPC {leaf}");
                Err(Fault::new(field, reason))
            }
        }
    };
    let call = GrpcMatch {
        service: read("service", given.service, is_service)?,
        method: read("method", given.method, is_identifier)?,
    };
    if call.service.is_none() && call.method.is_none() {
        return Err(Fault::new(field, "has neither service nor method"));
    }
    Ok(call)
}

/// A full name of protocol buffers, as `shop.v1.Cart`; other languages start it with a dot.
fn is_service(name: &str) -> bool {
    name.strip_prefix('.')
        .unwrap_or(name)
        .split('.')
        .all(is_identifier)
}

fn is_identifier(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes
        .next()
        .is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

#[cfg(test)]
#[path = "grpc_route_tests.rs"]
mod tests;
