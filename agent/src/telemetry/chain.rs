//! Errors as a log shows them.

use std::error::Error;

/// The error and what caused it, on one line: `cannot connect to 10.0.0.1:80: timed out`. A cause
/// that the text ends with already, as that of a transparent error, is not told twice.
#[must_use]
pub fn error_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let reason = error.to_string();
        if !text.ends_with(&reason) {
            text.push_str(": ");
            text.push_str(&reason);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use thiserror::Error;

    use super::*;

    #[derive(Debug, Error)]
    enum Fault {
        #[error("cannot add a rule")]
        Rule(#[source] io::Error),
        #[error("cannot add a route: {0}")]
        Route(#[source] io::Error),
        #[error(transparent)]
        Other(Box<Fault>),
    }

    #[test]
    fn each_cause_is_told_once() {
        let denied = || io::Error::from_raw_os_error(1);
        let told = "Operation not permitted (os error 1)";
        let rule = Fault::Other(Box::new(Fault::Rule(denied())));
        assert_eq!(error_chain(&rule), format!("cannot add a rule: {told}"));
        let route = Fault::Route(denied());
        assert_eq!(error_chain(&route), format!("cannot add a route: {told}"));
    }
}
