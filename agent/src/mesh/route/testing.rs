//! Requests and rules for tests.

use std::sync::Arc;

use http::request::Parts;
use http::{Method, Request};

use super::{
    Backend, BackendTarget, Filters, PathMatch, RequestMatch, RouteId, RouteKind, RouteTable, Rule,
};
use crate::mesh::ObjectName;

/// The head of a request with these headers.
pub(super) fn request(method: &str, target: &str, headers: &[(&str, &str)]) -> Parts {
    let method = Method::from_bytes(method.as_bytes()).unwrap();
    let mut request = Request::builder().method(method).uri(target);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap().into_parts().0
}

pub(super) fn get(target: &str) -> Parts {
    request("GET", target, &[])
}

pub(super) fn target(name: &str) -> BackendTarget {
    BackendTarget::Service {
        name: ObjectName::new("shop", name),
        port: 80,
    }
}

pub(super) fn backend(name: &str, weight: u32) -> Backend {
    Backend::new(target(name), weight, Filters::default())
}

/// A rule that is called by its backend.
pub(super) fn rule(kind: RouteKind, backend_name: &str, matches: Vec<RequestMatch>) -> Arc<Rule> {
    Arc::new(Rule {
        name: backend_name.into(),
        route: RouteId {
            kind,
            name: ObjectName::new("shop", "r"),
        },
        matches,
        filters: Filters::default(),
        backends: vec![backend(backend_name, 1)],
        timeouts: None,
        retry: None,
        session: None,
    })
}

/// A table of HTTPRoutes.
pub(super) fn table(rules: Vec<(&str, Vec<RequestMatch>)>) -> RouteTable {
    let rules = rules
        .into_iter()
        .map(|(name, matches)| rule(RouteKind::Http, name, matches));
    RouteTable::new(RouteKind::Http, rules)
}

pub(super) fn exact(path: &str) -> RequestMatch {
    RequestMatch::path(PathMatch::Exact(path.into()))
}

pub(super) fn prefix(path: &str) -> RequestMatch {
    RequestMatch::path(PathMatch::prefix(path))
}

/// Name of the rule that a request is for.
pub(super) fn selected<'a>(table: &'a RouteTable, head: &Parts) -> &'a str {
    table
        .select(head)
        .map_or("404", |selected| &selected.rule.name)
}
