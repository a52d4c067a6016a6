//! `RequestMirror`.

use rand::Rng;

use crate::mesh::route::BackendTarget;

/// A place where copies of requests go (`HTTPRequestMirrorFilter`); their responses are ignored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// The place. Nothing is mirrored to an invalid one.
    pub target: BackendTarget,
    /// The share of requests that are mirrored.
    pub share: Fraction,
}

impl Mirror {
    /// Whether this request is one of those.
    pub fn is_due(&self, rng: &mut (impl Rng + ?Sized)) -> bool {
        matches!(self.target, BackendTarget::Service { .. }) && self.share.draw(rng)
    }
}

/// A share of requests (`Fraction`, `percent`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fraction {
    /// At most the denominator.
    numerator: u32,
    /// Above 0.
    denominator: u32,
}

impl Fraction {
    /// All of them.
    pub const ALL: Self = Self {
        numerator: 1,
        denominator: 1,
    };

    /// None if it is not between 0 and 1.
    #[must_use]
    pub fn new(numerator: u32, denominator: u32) -> Option<Self> {
        (denominator > 0 && numerator <= denominator).then_some(Self {
            numerator,
            denominator,
        })
    }

    fn draw(self, rng: &mut (impl Rng + ?Sized)) -> bool {
        rng.random_ratio(self.numerator, self.denominator)
    }
}
