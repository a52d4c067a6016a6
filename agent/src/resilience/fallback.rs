//! What a client gets when nothing else is left: another backend, a fixed response, or the error.

use super::retry::Stop;
use super::validate::{Faults, Validate};

/// Why the answer of the destination is not to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Its breaker is open.
    BreakerOpen,
    /// It has no endpoint.
    NoEndpoint,
    /// The last attempt failed, and there is no other.
    Failed(Stop),
}

/// What a route falls back to. `B` names a backend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Fallback<B> {
    /// The error goes to the client.
    #[default]
    None,
    /// Another backend, which has no fallback of its own: a chain could be a ring.
    Backend(B),
    /// A fixed response.
    Fixed(FixedResponse),
}

/// A response made here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FixedResponse {
    /// HTTP status. Range 200 to 599.
    pub status: u16,
    /// The body. At most 64 KiB.
    pub body: Vec<u8>,
}

/// Whether a request has fallen back already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fallen {
    /// It is still with its own backend.
    #[default]
    NotYet,
    /// It is with a fallback.
    Already,
}

impl<B> Fallback<B> {
    /// What to do in this trouble. Never a second fallback, never after the client has seen part of
    /// an answer, and never for a request that may have been done and may not be repeated.
    pub const fn decide(&self, trouble: Trouble, fallen: Fallen) -> Option<&Self> {
        match (self, fallen, trouble) {
            (Self::None, _, _) | (_, Fallen::Already, _) => None,
            (_, _, Trouble::Failed(Stop::Done | Stop::AnswerBegun | Stop::NotRetriable)) => None,
            (Self::Backend(_), _, Trouble::Failed(Stop::NotRepeatable)) => None,
            _ => Some(self),
        }
    }
}

impl<B> Validate for Fallback<B> {
    fn check(&self, at: &str, faults: &mut Faults) {
        if let Self::Fixed(response) = self {
            faults.range(response.status, 200, 599, at, "status");
            faults.range(response.body.len(), 0, 64 << 10, at, "body");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_breaker_and_spent_retries_fall_back_once() {
        let fallback = Fallback::Backend("cart-v1");
        for trouble in [
            Trouble::BreakerOpen,
            Trouble::NoEndpoint,
            Trouble::Failed(Stop::AttemptsSpent),
            Trouble::Failed(Stop::BudgetSpent),
        ] {
            assert_eq!(fallback.decide(trouble, Fallen::NotYet), Some(&fallback));
            assert_eq!(fallback.decide(trouble, Fallen::Already), None);
        }
    }

    #[test]
    fn a_request_that_may_have_been_done_goes_to_no_other_backend_but_may_get_a_fixed_answer() {
        let trouble = Trouble::Failed(Stop::NotRepeatable);
        assert_eq!(
            Fallback::Backend("other").decide(trouble, Fallen::NotYet),
            None
        );
        let fixed: Fallback<&str> = Fallback::Fixed(FixedResponse {
            status: 503,
            body: Vec::new(),
        });
        assert!(fixed.decide(trouble, Fallen::NotYet).is_some());
    }

    #[test]
    fn a_callers_error_is_answered_as_it_is() {
        assert_eq!(
            Fallback::Backend("other").decide(Trouble::Failed(Stop::NotRetriable), Fallen::NotYet),
            None
        );
    }
}
