//! JSON or a readable table.

use axum::response::{IntoResponse, Response};
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, StatusCode};
use serde_json::Value;

use super::Column;
use super::table;

/// What the client wants to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Json,
    Text,
}

impl Format {
    /// By the `Accept` header (RFC 9110, section 12.5.1): text only if `text/plain` is asked for by
    /// name and nothing that JSON matches is preferred.
    pub fn of(headers: &HeaderMap) -> Self {
        let mut best = (Self::Json, 0.0);
        for accept in headers.get_all(ACCEPT) {
            for item in accept.to_str().unwrap_or_default().split(',') {
                let mut parts = item.split(';').map(str::trim);
                let format = match parts.next().map(str::to_ascii_lowercase).as_deref() {
                    Some("text/plain") => Self::Text,
                    Some("application/json" | "application/*" | "*/*") => Self::Json,
                    _ => continue,
                };
                let quality = parts
                    .find_map(|part| part.strip_prefix("q=")?.parse().ok())
                    .unwrap_or(1.0_f32);
                if quality > best.1 {
                    best = (format, quality);
                }
            }
        }
        best.0
    }

    /// The value in this format.
    pub fn respond(self, status: StatusCode, value: &Value, columns: &[Column]) -> Response {
        let (kind, mut body) = match self {
            Self::Json => (
                "application/json",
                serde_json::to_string_pretty(value).unwrap_or_default(),
            ),
            Self::Text => ("text/plain; charset=utf-8", table::render(value, columns)),
        };
        if !body.ends_with('\n') {
            body.push('\n');
        }
        let kind = [(CONTENT_TYPE, HeaderValue::from_static(kind))];
        (status, kind, body).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(accept: &str) -> Format {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, accept.parse().unwrap());
        Format::of(&headers)
    }

    #[test]
    fn json_is_the_default() {
        assert_eq!(Format::of(&HeaderMap::new()), Format::Json);
        for accept in [
            "*/*",
            "application/json",
            "text/html,*/*;q=0.8",
            "garbage;;,",
        ] {
            assert_eq!(wanted(accept), Format::Json, "{accept}");
        }
    }

    #[test]
    fn text_is_given_to_who_prefers_it() {
        for accept in [
            "text/plain",
            "TEXT/PLAIN; charset=utf-8",
            "text/plain, */*;q=0.1",
            "application/json;q=0.5, text/plain",
        ] {
            assert_eq!(wanted(accept), Format::Text, "{accept}");
        }
        for accept in ["text/plain;q=0.5, application/json", "text/plain;q=0"] {
            assert_eq!(wanted(accept), Format::Json, "{accept}");
        }
    }
}
