//! Settings that say what is wrong with them: which field, and why.

use std::fmt;
use std::time::Duration;

/// One setting that is out of its range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct Invalid {
    /// The path of the field, as `breaker.failureRatio`.
    pub field: String,
    /// What is wrong with it, with the value and the range.
    pub reason: String,
}

/// Settings that can check themselves.
pub trait Validate {
    /// Adds what is wrong to `faults`, each with its path below `at`.
    fn check(&self, at: &str, faults: &mut Faults);

    /// All faults of these settings.
    ///
    /// # Errors
    /// Every field that is out of range, not just the first.
    fn validate(&self) -> Result<(), Vec<Invalid>> {
        let mut faults = Faults::default();
        self.check("", &mut faults);
        if faults.0.is_empty() {
            Ok(())
        } else {
            Err(faults.0)
        }
    }
}

/// The faults found so far.
#[derive(Debug, Default)]
pub struct Faults(Vec<Invalid>);

impl Faults {
    /// What was found, in the order of finding it.
    #[must_use]
    pub fn into_vec(self) -> Vec<Invalid> {
        self.0
    }

    /// Notes a fault unless `fine`.
    pub fn require(&mut self, fine: bool, at: &str, field: &str, reason: impl fmt::Display) {
        if !fine {
            self.0.push(Invalid {
                field: join(at, field),
                reason: reason.to_string(),
            });
        }
    }

    /// A share must be a number from 0 to 1.
    pub fn share(&mut self, value: f64, at: &str, field: &str) {
        self.require(
            (0.0..=1.0).contains(&value),
            at,
            field,
            format_args!("must be from 0 to 1, is {value}"),
        );
    }

    /// A number must lie between two others, both included.
    pub fn range<N: PartialOrd + fmt::Display>(
        &mut self,
        value: N,
        low: N,
        high: N,
        at: &str,
        field: &str,
    ) {
        self.require(
            value >= low && value <= high,
            at,
            field,
            format_args!("must be from {low} to {high}, is {value}"),
        );
    }

    /// A duration must lie between two others, both included.
    pub fn duration(
        &mut self,
        value: Duration,
        low: Duration,
        high: Duration,
        at: &str,
        field: &str,
    ) {
        self.require(
            value >= low && value <= high,
            at,
            field,
            format_args!("must be from {low:?} to {high:?}, is {value:?}"),
        );
    }
}

/// `a.b`, or `b` at the top.
pub(super) fn join(at: &str, field: &str) -> String {
    if at.is_empty() {
        field.to_owned()
    } else {
        format!("{at}.{field}")
    }
}
