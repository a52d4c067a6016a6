//! Where connections go that are not HTTP: TLSRoutes and TCPRoutes.

use std::sync::Arc;

use rand::Rng;

use super::rule::choose;
use super::{Backend, RouteId, RouteKind};

/// A rule of a TLSRoute or a TCPRoute.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamRule {
    /// Which rule it is, for labels and logs: `TLSRoute/shop/web/<name or index>`.
    pub name: Arc<str>,
    /// The route that it is of.
    pub route: RouteId,
    /// Names that the client hello must ask for, in lower case: any of them; `*.` stands for one
    /// label or more. Empty is any connection.
    pub hostnames: Vec<Box<str>>,
    /// Where connections go.
    pub backends: Vec<Backend>,
}

impl StreamRule {
    /// Where this connection goes, by weight. None if there is no backend or every weight is 0: it
    /// is refused.
    pub fn choose(&self, rng: &mut (impl Rng + ?Sized)) -> Option<&Backend> {
        choose(&self.backends, rng)
    }

    /// How well the name fits: characters of the longest hostname that it meets, exact ones first.
    fn fit(&self, sni: Option<&str>) -> Option<(bool, usize)> {
        if self.hostnames.is_empty() {
            return Some((false, 0));
        }
        let sni = sni?;
        self.hostnames
            .iter()
            .filter_map(|hostname| match hostname.strip_prefix('*') {
                Some(suffix) => ends_with(sni, suffix).then_some((false, hostname.len())),
                None => sni
                    .eq_ignore_ascii_case(hostname)
                    .then_some((true, hostname.len())),
            })
            .max()
    }
}

/// Whether the name ends in this, with at least one label before it.
fn ends_with(name: &str, suffix: &str) -> bool {
    name.len() > suffix.len()
        && name
            .get(name.len() - suffix.len()..)
            .is_some_and(|end| end.eq_ignore_ascii_case(suffix))
}

/// All rules of one kind for one port of a Service and the clients of one namespace.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamRoutes {
    kind: RouteKind,
    rules: Vec<Arc<StreamRule>>,
}

impl StreamRoutes {
    /// Rules of this kind (TLSRoutes or TCPRoutes), given in the order in which ties are broken: by
    /// age and name of their routes, then by their place in the route.
    #[must_use]
    pub fn new(kind: RouteKind, rules: impl IntoIterator<Item = Arc<StreamRule>>) -> Self {
        Self {
            kind,
            rules: rules.into_iter().collect(),
        }
    }

    /// The kind of the routes.
    #[must_use]
    pub fn kind(&self) -> RouteKind {
        self.kind
    }

    /// All rules, in the order in which ties are broken.
    pub fn rules(&self) -> impl Iterator<Item = &Arc<StreamRule>> {
        self.rules.iter()
    }

    /// The rule for a connection whose client hello asks for this name, if it is TLS and asks for
    /// one: that of the hostname with most characters, exact ones first. None if there is none: the
    /// connection is refused.
    #[must_use]
    pub fn select(&self, sni: Option<&str>) -> Option<&Arc<StreamRule>> {
        let mut best: Option<(&Arc<StreamRule>, (bool, usize))> = None;
        for rule in &self.rules {
            let Some(fit) = rule.fit(sni) else {
                continue;
            };
            if best.is_none_or(|(_, best)| fit > best) {
                best = Some((rule, fit));
            }
        }
        best.map(|(rule, _)| rule)
    }
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
