//! TLSRoutes.

use gateway_api::experimental::tlsroutes::TlsRoute;
use serde::Deserialize;

use super::super::object::Fault;
use super::route::{
    BackendManifest, RULES_MAX, RouteFacts, RouteRules, RuleNames, StreamRuleFacts, Wildcard,
    at_most, backends, check_hostname, created, identify, note_on_weights, parents, reread,
};
use crate::mesh::route::{RouteId, RouteKind};

/// The most that a route may hold, as the API has it.
const HOSTNAMES_MAX: usize = 16;

/// `TLSRouteRule` and `TCPRouteRule`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RuleManifest {
    name: Option<String>,
    #[serde(default)]
    backend_refs: Vec<BackendManifest>,
}

impl RouteFacts {
    /// Checks a TLSRoute.
    pub fn of_tls(route: &TlsRoute) -> Result<Self, Fault> {
        let id = identify(RouteKind::Tls, &route.metadata);
        let hostnames = hostnames(&route.spec.hostnames)?;
        let (rules, notes) = stream_rules(&id, &route.spec.rules, &hostnames)?;
        Ok(Self {
            generation: route.metadata.generation,
            created: created(&route.metadata),
            parents: parents(&id, &route.spec.parent_refs)?,
            rules: RouteRules::Streams(rules),
            notes,
            id,
        })
    }
}

fn hostnames(given: &[String]) -> Result<Vec<Box<str>>, Fault> {
    const FIELD: &str = "spec.hostnames";
    at_most(FIELD, given, HOSTNAMES_MAX)?;
    let mut hostnames = Vec::with_capacity(given.len());
    for (index, text) in given.iter().enumerate() {
        check_hostname(&format!("{FIELD}[{index}]"), text, Wildcard::Allowed)?;
        hostnames.push(text.as_str().into());
    }
    Ok(hostnames)
}

/// Rules of a TLSRoute or a TCPRoute, for client hellos that ask for one of these names.
pub(super) fn stream_rules(
    id: &RouteId,
    given: &impl serde::Serialize,
    hostnames: &[Box<str>],
) -> Result<(Vec<StreamRuleFacts>, Vec<std::sync::Arc<str>>), Fault> {
    const FIELD: &str = "spec.rules";
    let given: Vec<RuleManifest> = reread(given, FIELD)?;
    at_most(FIELD, &given, RULES_MAX)?;
    let mut names = RuleNames::default();
    let mut rules = Vec::with_capacity(given.len());
    let mut notes = Vec::new();
    for (index, given) in given.into_iter().enumerate() {
        let field = format!("{FIELD}[{index}]");
        let name = names.take(id, index, given.name.as_deref())?;
        let list = format!("{field}.backendRefs");
        let backends = backends(id, &list, given.backend_refs, &[])?;
        notes.extend(note_on_weights(
            &field,
            &backends,
            "connections are refused",
        ));
        rules.push(StreamRuleFacts {
            name,
            hostnames: hostnames.to_vec(),
            backends,
        });
    }
    if rules.len() > 1 {
        notes.push("spec.rules: only the first is ever chosen".into());
    }
    Ok((rules, notes))
}

#[cfg(test)]
#[path = "stream_route_tests.rs"]
mod tests;
