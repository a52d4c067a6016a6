//! Addresses that more than one object may claim.

use std::sync::Arc;

/// Who says that an address is theirs, in the order of saying so. The last one is believed, since
/// addresses are reused; when it goes, the one before it comes back.
#[derive(Debug)]
pub(super) struct Claims<T>(imbl::Vector<Arc<T>>);

impl<T> Clone for Claims<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Claims<T> {
    /// The last claimant.
    pub(super) fn last(&self) -> Option<&Arc<T>> {
        self.0.last()
    }

    /// The last claimant that this is true of.
    pub(super) fn last_with(&self, wanted: impl Fn(&T) -> bool) -> Option<&Arc<T>> {
        self.0.iter().rev().find(|claimant| wanted(claimant))
    }
}

/// The claims on every address.
#[derive(Debug)]
pub(super) struct ClaimMap<K: Clone + Eq + std::hash::Hash, T>(imbl::HashMap<K, Claims<T>>);

impl<K: Clone + Eq + std::hash::Hash, T> Clone for ClaimMap<K, T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K: Clone + Eq + std::hash::Hash, T> Default for ClaimMap<K, T> {
    fn default() -> Self {
        Self(imbl::HashMap::new())
    }
}

impl<K: Clone + Eq + std::hash::Hash, T> ClaimMap<K, T> {
    pub(super) fn get(&self, key: &K) -> Option<&Claims<T>> {
        self.0.get(key)
    }

    pub(super) fn add(&mut self, key: K, claimant: Arc<T>) {
        self.0
            .entry(key)
            .or_insert_with(|| Claims(imbl::Vector::new()))
            .0
            .push_back(claimant);
    }

    pub(super) fn remove(&mut self, key: &K, is_claimant: impl Fn(&T) -> bool) {
        let Some(claims) = self.0.get_mut(key) else {
            return;
        };
        claims.0.retain(|claimant| !is_claimant(claimant));
        if claims.0.is_empty() {
            self.0.remove(key);
        }
    }
}
