//! `RequestHeaderModifier` and `ResponseHeaderModifier`.

use http::{HeaderMap, HeaderName, HeaderValue};

/// Changes headers (`HTTPHeaderFilter`): first it sets, then it adds, then it removes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeaderModifier {
    /// `set`: in place of all values that were there.
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// `add`: beside the values that were there.
    pub add: Vec<(HeaderName, HeaderValue)>,
    /// `remove`.
    pub remove: Vec<HeaderName>,
}

impl HeaderModifier {
    pub(super) fn apply(&self, headers: &mut HeaderMap) {
        for (name, value) in &self.set {
            headers.insert(name, value.clone());
        }
        for (name, value) in &self.add {
            headers.append(name, value.clone());
        }
        for name in &self.remove {
            headers.remove(name);
        }
    }
}
