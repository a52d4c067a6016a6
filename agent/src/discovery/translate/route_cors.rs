//! Filter `CORS` of HTTPRoutes.

use std::time::Duration;

use http::HeaderValue;
use serde::Deserialize;

use super::super::object::Fault;
use super::route::at_most;
use super::route_filter::header_name;
use crate::mesh::route::{Cors, Credentials, OriginPattern};

/// The most that a list may hold, as the API has it.
const CORS_MAX: usize = 64;

/// How long a preflight may be remembered unless something else is said, in seconds.
const CORS_MAX_AGE: i64 = 5;

/// `HTTPCORSFilter`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct CorsManifest {
    #[serde(default)]
    allow_origins: Vec<String>,
    allow_credentials: Option<bool>,
    #[serde(default)]
    allow_methods: Vec<String>,
    #[serde(default)]
    allow_headers: Vec<String>,
    #[serde(default)]
    expose_headers: Vec<String>,
    max_age: Option<i64>,
}

/// Checks it.
pub(super) fn cors(field: &str, given: CorsManifest) -> Result<Cors, Fault> {
    let origins = format!("{field}.allowOrigins");
    at_most(&origins, &given.allow_origins, CORS_MAX)?;
    check_wildcard(&origins, &given.allow_origins)?;
    let parse = |(index, text): (usize, &String)| {
        text.parse::<OriginPattern>()
            .map_err(|error| Fault::new(format!("{origins}[{index}]"), error.to_string()))
    };
    let max_age = given.max_age.unwrap_or(CORS_MAX_AGE);
    let max_age = u64::try_from(max_age)
        .ok()
        .filter(|seconds| *seconds > 0)
        .ok_or_else(|| {
            let reason = format!("{max_age} is not a number of seconds: at least 1");
            Fault::new(format!("{field}.maxAge"), reason)
        })?;
    let tokens = |leaf: &str, given: &[String]| tokens(&format!("{field}.{leaf}"), given);
    Ok(Cors {
        origins: given
            .allow_origins
            .iter()
            .enumerate()
            .map(parse)
            .collect::<Result<_, _>>()?,
        credentials: match given.allow_credentials {
            Some(true) => Credentials::Allowed,
            Some(false) | None => Credentials::Unsaid,
        },
        methods: tokens("allowMethods", &given.allow_methods)?,
        headers: tokens("allowHeaders", &given.allow_headers)?,
        expose: tokens("exposeHeaders", &given.expose_headers)?,
        max_age: Duration::from_secs(max_age),
    })
}

/// Names of methods or headers as one header value; none if there are none.
fn tokens(field: &str, given: &[String]) -> Result<Option<HeaderValue>, Fault> {
    at_most(field, given, CORS_MAX)?;
    check_wildcard(field, given)?;
    if given.is_empty() {
        return Ok(None);
    }
    for (index, token) in given.iter().enumerate() {
        header_name(&format!("{field}[{index}]"), token)?;
    }
    HeaderValue::from_str(&given.join(", "))
        .map(Some)
        .map_err(|error| Fault::new(field, error.to_string()))
}

fn check_wildcard(field: &str, given: &[String]) -> Result<(), Fault> {
    if given.len() > 1 && given.iter().any(|one| one == "*") {
        return Err(Fault::new(field, "\"*\" leaves nothing for others to add"));
    }
    Ok(())
}
