//! TCPRoutes.

use gateway_api::experimental::tcproutes::TcpRoute;

use super::super::object::Fault;
use super::route::{RouteFacts, RouteRules, created, identify, parents};
use super::tls_route::stream_rules;
use crate::mesh::route::RouteKind;

impl RouteFacts {
    /// Checks a TCPRoute.
    pub fn of_tcp(route: &TcpRoute) -> Result<Self, Fault> {
        let id = identify(RouteKind::Tcp, &route.metadata);
        let (rules, notes) = stream_rules(&id, &route.spec.rules, &[])?;
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
