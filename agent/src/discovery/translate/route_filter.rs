//! Filters of HTTPRoutes and GRPCRoutes.

use http::uri::Authority;
use http::{HeaderName, HeaderValue, StatusCode};
use serde::Deserialize;

use super::super::object::Fault;
use super::check_port;
use super::route::{BackendManifest, BackendRef, Wildcard, at_most, check_hostname};
use super::route_cors::{CorsManifest, cors};
use crate::mesh::route::{
    BackendTarget, Filter, Filters, Fraction, HeaderModifier, Mirror, PathModifier, Redirect,
    RequestMatch, Rewrite, RouteId, Scheme,
};

/// The most that these lists may hold, as the API has it.
const FILTERS_MAX: usize = 16;
const HEADERS_MAX: usize = 16;

/// Filters, before their mirrors are looked up.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FilterFacts {
    steps: Vec<Filter>,
    mirrors: Vec<(BackendRef, Fraction)>,
}

/// `HTTPRouteFilter` and `GRPCRouteFilter`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct FilterManifest {
    #[serde(rename = "type")]
    kind: FilterKind,
    request_header_modifier: Option<HeadersManifest>,
    response_header_modifier: Option<HeadersManifest>,
    request_mirror: Option<MirrorManifest>,
    request_redirect: Option<RedirectManifest>,
    url_rewrite: Option<RewriteManifest>,
    cors: Option<CorsManifest>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
enum FilterKind {
    RequestHeaderModifier,
    ResponseHeaderModifier,
    RequestMirror,
    RequestRedirect,
    #[serde(rename = "URLRewrite")]
    UrlRewrite,
    #[serde(rename = "CORS")]
    Cors,
    ExtensionRef,
    ExternalAuth,
}

#[derive(Debug, Clone, Deserialize)]
struct HeadersManifest {
    #[serde(default)]
    set: Vec<HeaderManifest>,
    #[serde(default)]
    add: Vec<HeaderManifest>,
    #[serde(default)]
    remove: Vec<String>,
}

#[derive(Debug, Clone, Deserialize)]
struct HeaderManifest {
    name: String,
    value: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct MirrorManifest {
    backend_ref: BackendManifest,
    percent: Option<i64>,
    fraction: Option<FractionManifest>,
}

#[derive(Debug, Clone, Deserialize)]
struct FractionManifest {
    numerator: i64,
    denominator: Option<i64>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RedirectManifest {
    scheme: Option<String>,
    hostname: Option<String>,
    path: Option<PathManifest>,
    port: Option<i32>,
    status_code: Option<i64>,
}

#[derive(Debug, Clone, Deserialize)]
struct RewriteManifest {
    hostname: Option<String>,
    path: Option<PathManifest>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PathManifest {
    #[serde(rename = "type")]
    kind: PathKind,
    replace_full_path: Option<String>,
    replace_prefix_match: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
enum PathKind {
    ReplaceFullPath,
    ReplacePrefixMatch,
}

/// Headers that are of one connection or of the message itself: no filter changes them. A host is
/// changed by `URLRewrite`.
const UNTOUCHABLE: [&str; 10] = [
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
];

impl FilterFacts {
    /// Checks filters of a route, `field` being the path of their list, and `matches` those of
    /// their rule.
    pub(super) fn of(
        id: &RouteId,
        field: &str,
        given: Vec<FilterManifest>,
        matches: &[RequestMatch],
    ) -> Result<Self, Fault> {
        at_most(field, &given, FILTERS_MAX)?;
        check_combination(field, &given)?;
        let mut facts = Self::default();
        for (index, filter) in given.into_iter().enumerate() {
            facts.add(id, &format!("{field}[{index}]"), filter, matches)?;
        }
        Ok(facts)
    }

    fn add(
        &mut self,
        id: &RouteId,
        field: &str,
        given: FilterManifest,
        matches: &[RequestMatch],
    ) -> Result<(), Fault> {
        let missing = |leaf: &str| Fault::new(format!("{field}.{leaf}"), "is missing");
        let step = match given.kind {
            FilterKind::RequestHeaderModifier => {
                const LEAF: &str = "requestHeaderModifier";
                let given = given.request_header_modifier.ok_or_else(|| missing(LEAF))?;
                Filter::RequestHeaders(headers(&format!("{field}.{LEAF}"), given)?)
            }
            FilterKind::ResponseHeaderModifier => {
                const LEAF: &str = "responseHeaderModifier";
                let given = given
                    .response_header_modifier
                    .ok_or_else(|| missing(LEAF))?;
                Filter::ResponseHeaders(headers(&format!("{field}.{LEAF}"), given)?)
            }
            FilterKind::RequestRedirect => {
                const LEAF: &str = "requestRedirect";
                let given = given.request_redirect.ok_or_else(|| missing(LEAF))?;
                Filter::Redirect(redirect(&format!("{field}.{LEAF}"), given, matches)?)
            }
            FilterKind::UrlRewrite => {
                const LEAF: &str = "urlRewrite";
                let given = given.url_rewrite.ok_or_else(|| missing(LEAF))?;
                Filter::Rewrite(rewrite(&format!("{field}.{LEAF}"), given, matches)?)
            }
            FilterKind::Cors => {
                let given = given.cors.ok_or_else(|| missing("cors"))?;
                Filter::Cors(cors(&format!("{field}.cors"), given)?)
            }
            FilterKind::RequestMirror => {
                const LEAF: &str = "requestMirror";
                let given = given.request_mirror.ok_or_else(|| missing(LEAF))?;
                let field = format!("{field}.{LEAF}");
                let share = share(&field, &given)?;
                let reference = given
                    .backend_ref
                    .reference(id, &format!("{field}.backendRef"))?;
                self.mirrors.push((reference, share));
                return Ok(());
            }
            FilterKind::ExtensionRef | FilterKind::ExternalAuth => {
                return Err(Fault::new(
                    format!("{field}.type"),
                    format!("{:?} is not supported", given.kind),
                ));
            }
        };
        self.steps.push(step);
        Ok(())
    }

    /// What the mirrors refer to.
    pub(super) fn references(&self) -> impl Iterator<Item = &BackendRef> {
        self.mirrors.iter().map(|(reference, _)| reference)
    }

    /// Whether requests are answered without a backend.
    pub(super) fn answers(&self) -> bool {
        Filters::new(self.steps.clone(), Vec::new()).answers()
    }

    pub(super) fn resolve(
        &self,
        resolve: &mut impl FnMut(&BackendRef) -> BackendTarget,
    ) -> Filters {
        let mirrors = self.mirrors.iter().map(|(reference, share)| Mirror {
            target: resolve(reference),
            share: *share,
        });
        Filters::new(self.steps.clone(), mirrors.collect())
    }
}

/// Only mirrors may be there more than once, and a redirect leaves nothing to rewrite.
fn check_combination(field: &str, given: &[FilterManifest]) -> Result<(), Fault> {
    for (index, filter) in given.iter().enumerate() {
        let former = &given[..index];
        let field = format!("{field}[{index}].type");
        let kind = filter.kind;
        if kind != FilterKind::RequestMirror && former.iter().any(|other| other.kind == kind) {
            return Err(Fault::new(field, format!("there is a {kind:?} already")));
        }
        let excluded = match kind {
            FilterKind::RequestRedirect => Some(FilterKind::UrlRewrite),
            FilterKind::UrlRewrite => Some(FilterKind::RequestRedirect),
            _ => None,
        };
        if excluded.is_some_and(|excluded| former.iter().any(|other| other.kind == excluded)) {
            return Err(Fault::new(
                field,
                "RequestRedirect and URLRewrite exclude each other",
            ));
        }
    }
    Ok(())
}

fn headers(field: &str, given: HeadersManifest) -> Result<HeaderModifier, Fault> {
    let list = |leaf: &str, given: Vec<HeaderManifest>| {
        let field = format!("{field}.{leaf}");
        at_most(&field, &given, HEADERS_MAX)?;
        let mut headers: Vec<(HeaderName, HeaderValue)> = Vec::new();
        for (index, header) in given.into_iter().enumerate() {
            let name = changeable(&format!("{field}[{index}].name"), &header.name)?;
            let value = HeaderValue::from_str(&header.value).map_err(|_| {
                let reason = format!("{:?} is not a header value", header.value);
                Fault::new(format!("{field}[{index}].value"), reason)
            })?;
            // Of equal names only the first counts.
            if headers.iter().all(|(other, _)| *other != name) {
                headers.push((name, value));
            }
        }
        Ok(headers)
    };
    at_most(&format!("{field}.remove"), &given.remove, HEADERS_MAX)?;
    let remove = given.remove.iter().enumerate();
    Ok(HeaderModifier {
        set: list("set", given.set)?,
        add: list("add", given.add)?,
        remove: remove
            .map(|(index, name)| changeable(&format!("{field}.remove[{index}]"), name))
            .collect::<Result<_, _>>()?,
    })
}

/// A header that a filter may change.
fn changeable(field: &str, text: &str) -> Result<HeaderName, Fault> {
    let name = header_name(field, text)?;
    if UNTOUCHABLE.contains(&name.as_str()) {
        return Err(Fault::new(
            field,
            format!("{name} is not for filters to change"),
        ));
    }
    Ok(name)
}

/// A header's name.
pub(super) fn header_name(field: &str, text: &str) -> Result<HeaderName, Fault> {
    HeaderName::from_bytes(text.as_bytes())
        .map_err(|_| Fault::new(field, format!("{text:?} is not a header name")))
}

fn redirect(
    field: &str,
    given: RedirectManifest,
    matches: &[RequestMatch],
) -> Result<Redirect, Fault> {
    let status = given.status_code.unwrap_or(302);
    let status = u16::try_from(status)
        .ok()
        .filter(|status| [301, 302, 303, 307, 308].contains(status))
        .and_then(|status| StatusCode::from_u16(status).ok())
        .ok_or_else(|| {
            let reason = format!("{status} is none of 301, 302, 303, 307, 308");
            Fault::new(format!("{field}.statusCode"), reason)
        })?;
    let scheme = match given.scheme.as_deref() {
        None => None,
        Some("http") => Some(Scheme::Http),
        Some("https") => Some(Scheme::Https),
        Some(other) => {
            let reason = format!("{other:?} is neither http nor https");
            return Err(Fault::new(format!("{field}.scheme"), reason));
        }
    };
    Ok(Redirect {
        scheme,
        hostname: hostname(field, given.hostname)?,
        port: given
            .port
            .map(|port| check_port(format!("{field}.port"), port))
            .transpose()?,
        path: path(field, given.path, matches)?,
        status,
    })
}

fn rewrite(
    field: &str,
    given: RewriteManifest,
    matches: &[RequestMatch],
) -> Result<Rewrite, Fault> {
    Ok(Rewrite {
        hostname: hostname(field, given.hostname)?,
        path: path(field, given.path, matches)?,
    })
}

fn hostname(field: &str, given: Option<String>) -> Result<Option<Authority>, Fault> {
    let Some(text) = given else {
        return Ok(None);
    };
    let field = format!("{field}.hostname");
    check_hostname(&field, &text, Wildcard::Refused)?;
    let authority = Authority::try_from(text.as_str());
    authority
        .map(Some)
        .map_err(|error| Fault::new(field, error.to_string()))
}

fn path(
    field: &str,
    given: Option<PathManifest>,
    matches: &[RequestMatch],
) -> Result<Option<PathModifier>, Fault> {
    let Some(given) = given else {
        return Ok(None);
    };
    let (leaf, text) = match given.kind {
        PathKind::ReplaceFullPath => ("replaceFullPath", given.replace_full_path),
        PathKind::ReplacePrefixMatch => ("replacePrefixMatch", given.replace_prefix_match),
    };
    let field = format!("{field}.path.{leaf}");
    let Some(text) = text else {
        return Err(Fault::new(field, "is missing"));
    };
    if !text.is_empty() || given.kind == PathKind::ReplaceFullPath {
        check_path(&field, &text)?;
    }
    if given.kind == PathKind::ReplaceFullPath {
        return Ok(Some(PathModifier::Full(text.into())));
    }
    if matches.iter().any(|one| one.matched_prefix().is_none()) {
        return Err(Fault::new(
            field,
            "every match of the rule must be of a PathPrefix, or there is no prefix to replace",
        ));
    }
    Ok(Some(PathModifier::prefix(&text)))
}

/// A path as it stands in a request: no query, no fragment, nothing that must be encoded.
pub(super) fn check_path(field: &str, text: &str) -> Result<(), Fault> {
    let is_allowed =
        |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~!$&'()*+,;=:@%".contains(&byte);
    let fault = |reason: String| Err(Fault::new(field, reason));
    if !text.starts_with('/') {
        return fault(format!("{text:?} does not start with \"/\""));
    }
    if text.len() > PATH_MAX {
        return fault(format!("has {} characters: at most {PATH_MAX}", text.len()));
    }
    if let Some(wrong) = text
        .chars()
        .find(|c| !c.is_ascii() || !is_allowed(*c as u8))
    {
        return fault(format!("{text:?} has {wrong:?}, which no path has"));
    }
    let is_encoded = |rest: &str| {
        rest.get(..2)
            .is_some_and(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
    };
    if !text.split('%').skip(1).all(is_encoded) {
        return fault(format!(
            "{text:?} has a \"%\" without two hexadecimal digits"
        ));
    }
    Ok(())
}

/// The longest path, in characters.
pub(super) const PATH_MAX: usize = 1024;

fn share(field: &str, given: &MirrorManifest) -> Result<Fraction, Fault> {
    let (leaf, numerator, denominator) = match (given.percent, &given.fraction) {
        (None, None) => return Ok(Fraction::ALL),
        (Some(_), Some(_)) => {
            return Err(Fault::new(
                format!("{field}.fraction"),
                "percent is there already: one of them",
            ));
        }
        (Some(percent), None) => ("percent", percent, 100),
        (None, Some(fraction)) => (
            "fraction",
            fraction.numerator,
            fraction.denominator.unwrap_or(100),
        ),
    };
    let number = |number: i64| u32::try_from(number).ok();
    number(numerator)
        .zip(number(denominator))
        .and_then(|(numerator, denominator)| Fraction::new(numerator, denominator))
        .ok_or_else(|| {
            let reason = format!("{numerator} of {denominator} is not between nothing and all");
            Fault::new(format!("{field}.{leaf}"), reason)
        })
}
