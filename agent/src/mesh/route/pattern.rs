//! Regular expressions of routes.

use std::fmt;

use regex::bytes::{Regex, RegexBuilder};
use thiserror::Error;

/// The most memory that a compiled expression may take, in bytes; what is larger is refused. The
/// time of a match is linear in the text whatever the expression.
pub const PATTERN_SIZE_MAX: usize = 64 << 10;

/// The most memory that the automaton built while matching may take, in bytes; beyond, matching
/// goes on with a slower one.
const AUTOMATON_SIZE_MAX: usize = 256 << 10;

/// How deep an expression may nest.
const NESTING_MAX: u32 = 64;

/// A regular expression that a text matches as a whole, as in Envoy. Syntax of the crate `regex`
/// (close to RE2: no look-around, no back-references), over bytes: classes such as `\d` are ASCII.
#[derive(Clone)]
pub struct Pattern {
    text: Box<str>,
    regex: Regex,
}

/// Why a text is no [`Pattern`].
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{text:?} is not a regular expression: {reason}")]
pub struct PatternError {
    /// The text.
    pub text: String,
    /// What is wrong.
    pub reason: String,
}

/// Whether upper and lower case differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Case {
    Sensitive,
    Insensitive,
}

impl Pattern {
    /// Compiles it.
    pub fn new(text: &str) -> Result<Self, PatternError> {
        Self::with_case(text, Case::Sensitive)
    }

    pub(super) fn with_case(text: &str, case: Case) -> Result<Self, PatternError> {
        let failed = |error: regex::Error| PatternError {
            text: text.to_owned(),
            reason: describe(&error),
        };
        let compile = |text: &str| {
            RegexBuilder::new(text)
                .unicode(false)
                .case_insensitive(case == Case::Insensitive)
                .size_limit(PATTERN_SIZE_MAX)
                .dfa_size_limit(AUTOMATON_SIZE_MAX)
                .nest_limit(NESTING_MAX)
                .build()
        };
        // By itself first: `a)|(b` is wrong, but not within the group that anchors it.
        compile(text).map_err(failed)?;
        let regex = compile(&format!(r"\A(?:{text})\z")).map_err(failed)?;
        Ok(Self {
            text: text.into(),
            regex,
        })
    }

    /// What was compiled.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether the whole text matches.
    #[must_use]
    pub fn matches(&self, text: &[u8]) -> bool {
        self.regex.is_match(text)
    }
}

/// The last line of the crate's message says what is wrong, those before it point at the place.
fn describe(error: &regex::Error) -> String {
    match error {
        regex::Error::CompiledTooBig(limit) => {
            format!("compiled it is larger than {limit} bytes")
        }
        other => {
            let message = other.to_string();
            let last = message.lines().last().unwrap_or_default().trim();
            last.strip_prefix("error: ").unwrap_or(last).to_owned()
        }
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Pattern {}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "~{:?}", self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_matches_the_whole_text() {
        let pattern = Pattern::new("/v[0-9]+|/latest").unwrap();
        assert!(pattern.matches(b"/v1"));
        assert!(pattern.matches(b"/latest"));
        for text in ["/v", "/v1/x", "x/v1", "/latest ", "/v1\n"] {
            assert!(!pattern.matches(text.as_bytes()), "{text:?}");
        }
    }

    #[test]
    fn a_pattern_cannot_leave_the_group_that_anchors_it() {
        for text in ["a)|(b", "a)", "(a", "(?x)a # )"] {
            assert!(Pattern::new(text).is_err(), "{text:?} passed");
        }
    }

    #[test]
    fn a_pattern_that_is_wrong_or_too_large_says_why() {
        let reason = |text: &str| Pattern::new(text).unwrap_err().reason;
        assert_eq!(reason("a("), "unclosed group");
        assert_eq!(
            reason("a{1000}{1000}"),
            format!("compiled it is larger than {PATTERN_SIZE_MAX} bytes")
        );
        assert_eq!(
            reason("(?=a)"),
            "look-around, including look-ahead and look-behind, is not supported"
        );
        let deep = format!("{}{}", "(".repeat(100), ")".repeat(100));
        assert_eq!(
            reason(&deep),
            "exceed the maximum number of nested parentheses/brackets (64)"
        );
    }

    #[test]
    fn classes_are_ascii_and_bytes_need_not_be_text() {
        let digits = Pattern::new(r"\d+").unwrap();
        assert!(digits.matches(b"123"));
        assert!(!digits.matches("١٢٣".as_bytes()));
        assert!(Pattern::new("a.b").unwrap().matches(b"a\xffb"));
    }
}
