//! All rules for one port of a Service, in the order in which they are asked.

use std::cmp::Ordering;
use std::sync::Arc;

use http::request::Parts;

use super::matching::{compare_prefixes, is_grpc};
use super::{PathMatch, RequestMatch, RouteKind, Rule, TargetMatch};

/// All rules for one port of a Service and the clients of one namespace, by the precedence of the
/// Gateway API. Exact paths and prefixes are found by search, so that a request costs the number
/// of its segments times the logarithm of the number of rules, not the number of rules.
#[derive(Debug, Clone, PartialEq)]
pub struct RouteTable {
    kind: RouteKind,
    entries: Vec<Entry>,
    /// `entries[..exact]` are exact paths, sorted by path.
    exact: usize,
    /// `entries[prefixes..]` are prefixes, longest first. What is between, and the calls of a
    /// GRPCRoute, are asked one by one.
    prefixes: usize,
}

#[derive(Debug, Clone, PartialEq)]
struct Entry {
    rule: Arc<Rule>,
    /// Index into the rule's matches.
    index: usize,
}

impl Entry {
    fn matched(&self) -> &RequestMatch {
        &self.rule.matches[self.index]
    }

    fn exact(&self) -> Option<&str> {
        match &self.matched().target {
            TargetMatch::Path(PathMatch::Exact(path)) => Some(path),
            _ => None,
        }
    }

    fn prefix(&self) -> Option<&str> {
        self.matched().matched_prefix()
    }
}

/// The rule that a request is for.
#[derive(Debug, Clone, Copy)]
pub struct Selected<'a> {
    /// The rule.
    pub rule: &'a Arc<Rule>,
    /// Which of its matches was met.
    pub matched: &'a RequestMatch,
}

impl RouteTable {
    /// A table of rules of this kind (GRPCRoutes or HTTPRoutes), given in the order in which ties
    /// are broken: by age and name of their routes, then by their place in the route.
    #[must_use]
    pub fn new(kind: RouteKind, rules: impl IntoIterator<Item = Arc<Rule>>) -> Self {
        let mut entries: Vec<Entry> = rules
            .into_iter()
            .flat_map(|rule| {
                (0..rule.matches.len()).map(move |index| Entry {
                    rule: rule.clone(),
                    index,
                })
            })
            .collect();
        // Stable: ties stay in the order given.
        entries.sort_by(|one, other| one.matched().precedence(other.matched()));
        let exact = entries.partition_point(|entry| entry.exact().is_some());
        let prefixes = entries.partition_point(|entry| entry.prefix().is_none());
        Self {
            kind,
            entries,
            exact,
            prefixes,
        }
    }

    /// The kind of the routes.
    #[must_use]
    pub fn kind(&self) -> RouteKind {
        self.kind
    }

    /// All rules, each once for every match, in the order in which they are asked.
    pub fn rules(&self) -> impl Iterator<Item = Selected<'_>> {
        self.entries.iter().map(|entry| Selected {
            rule: &entry.rule,
            matched: entry.matched(),
        })
    }

    /// The rule that this request is for. None if there is none: the answer is 404, for gRPC
    /// `UNIMPLEMENTED`.
    #[must_use]
    pub fn select(&self, head: &Parts) -> Option<Selected<'_>> {
        let found = if self.kind == RouteKind::Grpc {
            if !is_grpc(head) {
                return None;
            }
            first(&self.entries, |one| one.matches(head))
        } else {
            self.select_exact(head)
                .or_else(|| {
                    first(&self.entries[self.exact..self.prefixes], |one| {
                        one.matches(head)
                    })
                })
                .or_else(|| self.select_prefix(head))
        };
        found.map(|entry| Selected {
            rule: &entry.rule,
            matched: entry.matched(),
        })
    }

    fn select_exact(&self, head: &Parts) -> Option<&Entry> {
        let path = head.uri.path();
        let candidates = equal_range(&self.entries[..self.exact], |entry| {
            entry.exact().unwrap_or_default().cmp(path)
        });
        first(candidates, |one| one.matches_besides_target(head))
    }

    fn select_prefix(&self, head: &Parts) -> Option<&Entry> {
        let path = head.uri.path();
        let prefixes = &self.entries[self.prefixes..];
        // Longer than the longest one there is: a path of a thousand slashes costs no more.
        let longest = prefixes.first()?.prefix()?.len();
        let end = path.len().min(longest.saturating_add(1));
        let whole = (path.len() <= longest).then_some(path.len());
        let cuts = path.as_bytes()[..end]
            .iter()
            .enumerate()
            .rev()
            .filter(|(_, byte)| **byte == b'/')
            .map(|(index, _)| index);
        // `*` of `OPTIONS *` has no segment, and `/` is the prefix of every request.
        let cuts = whole.into_iter().chain(cuts);
        let none = (!path.starts_with('/')).then_some(0);
        cuts.chain(none).find_map(|cut| {
            let prefix = &path[..cut];
            let candidates = equal_range(prefixes, |entry| {
                compare_prefixes(entry.prefix().unwrap_or_default(), prefix)
            });
            first(candidates, |one| one.matches_besides_target(head))
        })
    }
}

fn first(entries: &[Entry], fits: impl Fn(&RequestMatch) -> bool) -> Option<&Entry> {
    entries.iter().find(|entry| fits(entry.matched()))
}

/// The entries that compare equal, of those that are sorted by this comparison.
fn equal_range(entries: &[Entry], compare: impl Fn(&Entry) -> Ordering) -> &[Entry] {
    let start = entries.partition_point(|entry| compare(entry) == Ordering::Less);
    let length = entries[start..].partition_point(|entry| compare(entry) == Ordering::Equal);
    &entries[start..start + length]
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
