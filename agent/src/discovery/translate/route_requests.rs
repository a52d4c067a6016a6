//! What HTTPRoute and GRPCRoute have in common: rules that match requests.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::super::object::Fault;
use super::route::{
    RULES_MAX, RouteFacts, RouteRules, RuleFacts, RuleNames, at_most, check_rules, created,
    identify, note_on_hostnames, note_on_weights, parents, reread,
};
use crate::mesh::route::{RouteId, RouteKind};

/// A rule as its kind of route writes it. The default one matches every request, as the API has it for a route without
/// rules.
pub(super) trait RequestRule: DeserializeOwned + Default {
    /// The kind of the route.
    const KIND: RouteKind;
    /// What a client gets if no backend has a weight.
    const WITHOUT_WEIGHT: &'static str;

    /// `name`.
    fn name(&self) -> Option<&str>;

    /// Checks the rule, which `field` leads to and which bears `name` from now on.
    fn facts(self, id: &RouteId, field: &str, name: Arc<str>) -> Result<RuleFacts, Fault>;
}

/// The parts of a route's `spec`, whichever kind it is of.
pub(super) struct RequestSpec<'a, Rules, Parents> {
    pub(super) hostnames: Option<&'a [String]>,
    pub(super) rules: &'a Rules,
    pub(super) parents: &'a Parents,
}

impl RouteFacts {
    /// Checks a route of requests.
    pub(super) fn of_requests<Rule: RequestRule>(
        metadata: &ObjectMeta,
        spec: &RequestSpec<'_, impl Serialize, impl Serialize>,
    ) -> Result<Self, Fault> {
        const FIELD: &str = "spec.rules";
        let id = identify(Rule::KIND, metadata);
        let given: Option<Vec<Rule>> = reread(spec.rules, FIELD)?;
        let given = given.unwrap_or_else(|| vec![Rule::default()]);
        at_most(FIELD, &given, RULES_MAX)?;
        let hostnames = spec.hostnames.unwrap_or_default();
        let mut notes: Vec<_> = note_on_hostnames(hostnames).into_iter().collect();
        let mut names = RuleNames::default();
        let mut rules = Vec::with_capacity(given.len());
        for (index, given) in given.into_iter().enumerate() {
            let field = format!("{FIELD}[{index}]");
            let name = names.take(&id, index, given.name())?;
            let rule = given.facts(&id, &field, name)?;
            notes.extend(note_on_weights(
                &field,
                &rule.backends,
                Rule::WITHOUT_WEIGHT,
            ));
            rules.push(rule);
        }
        check_rules(&rules)?;
        Ok(Self {
            generation: metadata.generation,
            created: created(metadata),
            parents: parents(&id, spec.parents)?,
            rules: RouteRules::Requests(rules),
            notes,
            id,
        })
    }
}
