//! Errors as a log shows them.

use std::error::Error;

/// The error and what caused it, on one line: `cannot connect to 10.0.0.1:80: timed out`.
#[must_use]
pub fn error_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
