//! Matches on headers, which HTTPRoutes and GRPCRoutes have in common.

use serde::Deserialize;

use super::super::object::Fault;
use super::route::at_most;
use super::route_filter::header_name;
use crate::mesh::route::{HeaderMatch, HeaderMatchKind, Pattern, PatternError};

/// The most that a match may hold, as the API has it.
const HEADERS_MAX: usize = 16;

/// The longest value of a header, in characters.
const VALUE_MAX: usize = 4096;

/// `HTTPHeaderMatch` and `GRPCHeaderMatch`.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct HeaderMatchManifest {
    name: String,
    #[serde(rename = "type")]
    kind: Option<MatchKind>,
    value: String,
}

/// How a value is compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub(super) enum MatchKind {
    #[default]
    Exact,
    RegularExpression,
}

/// Matches on headers, `field` being the path of their list.
pub(super) fn header_matches(
    field: &str,
    given: Vec<HeaderMatchManifest>,
) -> Result<Vec<HeaderMatch>, Fault> {
    at_most(field, &given, HEADERS_MAX)?;
    let mut matches: Vec<HeaderMatch> = Vec::with_capacity(given.len());
    for (index, given) in given.into_iter().enumerate() {
        let field = format!("{field}[{index}]");
        let name = header_name(&format!("{field}.name"), &given.name)?;
        let field = format!("{field}.value");
        check_length(&field, &given.value, VALUE_MAX)?;
        let kind = match given.kind.unwrap_or_default() {
            MatchKind::Exact if given.value.is_empty() => {
                return Err(Fault::new(field, "is empty"));
            }
            MatchKind::Exact => HeaderMatchKind::Exact,
            MatchKind::RegularExpression => HeaderMatchKind::Regex,
        };
        // Of equal names only the first counts.
        if matches.iter().any(|other| *other.name() == name) {
            continue;
        }
        let header = HeaderMatch::new(name, kind, &given.value);
        matches.push(header.map_err(|error| refused(field, &error))?);
    }
    Ok(matches)
}

/// A regular expression of at most this many characters.
pub(super) fn pattern(field: &str, text: &str, most: usize) -> Result<Pattern, Fault> {
    check_length(field, text, most)?;
    Pattern::new(text).map_err(|error| refused(field.to_owned(), &error))
}

fn refused(field: String, error: &PatternError) -> Fault {
    Fault::new(field, error.to_string())
}

fn check_length(field: &str, text: &str, most: usize) -> Result<(), Fault> {
    let length = text.chars().count();
    if length <= most {
        return Ok(());
    }
    Err(Fault::new(
        field,
        format!("has {length} characters: at most {most}"),
    ))
}
