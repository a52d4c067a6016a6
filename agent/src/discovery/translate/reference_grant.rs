//! ReferenceGrants.

use std::sync::Arc;

use gateway_api::experimental::referencegrants::ReferenceGrant;

use super::super::object::Fault;
use super::check_name;
use super::route::{GATEWAY_GROUP, at_most};
use crate::mesh::ObjectName;
use crate::mesh::route::RouteId;

/// The most that these lists may hold, as the API has it.
const LIST_MAX: usize = 16;

/// Which routes of other namespaces may send to the Services of a namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrantFacts {
    /// Kinds of routes, and the namespaces that they are of.
    from: Vec<(Arc<str>, Arc<str>)>,
    /// The Services: none is all of them.
    to: Vec<Option<Arc<str>>>,
}

impl GrantFacts {
    /// Checks a ReferenceGrant. What it says of objects that are no routes or Services is not the
    /// mesh's.
    pub fn of(grant: &ReferenceGrant) -> Result<Self, Fault> {
        let spec = &grant.spec;
        at_most("spec.from", &spec.from, LIST_MAX)?;
        at_most("spec.to", &spec.to, LIST_MAX)?;
        let mut from = Vec::new();
        for (index, given) in spec.from.iter().enumerate() {
            check_name(&format!("spec.from[{index}].namespace"), &given.namespace)?;
            if given.group == GATEWAY_GROUP {
                from.push((given.kind.as_str().into(), given.namespace.as_str().into()));
            }
        }
        let mut to = Vec::new();
        for (index, given) in spec.to.iter().enumerate() {
            let name = given.name.as_deref().filter(|name| !name.is_empty());
            if let Some(name) = name {
                check_name(&format!("spec.to[{index}].name"), name)?;
            }
            if given.group.is_empty() && given.kind == "Service" {
                to.push(name.map(Arc::from));
            }
        }
        Ok(Self { from, to })
    }

    /// Whether this route may send to this Service of the grant's namespace.
    #[must_use]
    pub fn permits(&self, route: &RouteId, service: &ObjectName) -> bool {
        let kind = route.kind.to_string();
        let from = self
            .from
            .iter()
            .any(|(given, namespace)| **given == *kind && *namespace == route.name.namespace);
        from && self
            .to
            .iter()
            .any(|name| name.as_ref().is_none_or(|name| *name == service.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::route::RouteKind;
    use serde_json::{Value, json};

    fn grant(from: Value, to: Value) -> Result<GrantFacts, Fault> {
        let manifest = json!({"metadata": {"name": "g", "namespace": "shop"},
            "spec": {"from": from, "to": to}});
        GrantFacts::of(&serde_json::from_value(manifest).unwrap())
    }

    fn route(kind: RouteKind, namespace: &str) -> RouteId {
        RouteId {
            kind,
            name: ObjectName::new(namespace, "r"),
        }
    }

    #[test]
    fn a_grant_permits_its_kinds_and_namespaces_and_no_others() {
        let from = json!([{"group": GATEWAY_GROUP, "kind": "HTTPRoute", "namespace": "web"}]);
        let any = grant(from.clone(), json!([{"group": "", "kind": "Service"}])).unwrap();
        let cart = ObjectName::new("shop", "cart");
        assert!(any.permits(&route(RouteKind::Http, "web"), &cart));
        assert!(!any.permits(&route(RouteKind::Grpc, "web"), &cart));
        assert!(!any.permits(&route(RouteKind::Http, "other"), &cart));
        let named = json!([{"group": "", "kind": "Service", "name": "cart"}]);
        let named = grant(from, named).unwrap();
        assert!(named.permits(&route(RouteKind::Http, "web"), &cart));
        let pay = ObjectName::new("shop", "pay");
        assert!(!named.permits(&route(RouteKind::Http, "web"), &pay));
    }

    #[test]
    fn a_grant_to_something_else_than_services_permits_no_service() {
        let from = json!([{"group": GATEWAY_GROUP, "kind": "HTTPRoute", "namespace": "web"}]);
        let secrets = grant(from, json!([{"group": "", "kind": "Secret"}])).unwrap();
        let cart = ObjectName::new("shop", "cart");
        assert!(!secrets.permits(&route(RouteKind::Http, "web"), &cart));
        let elsewhere = json!([{"group": "example.com", "kind": "HTTPRoute", "namespace": "web"}]);
        let elsewhere = grant(elsewhere, json!([{"group": "", "kind": "Service"}])).unwrap();
        assert!(!elsewhere.permits(&route(RouteKind::Http, "web"), &cart));
    }
}
