//! What is kept by key for as long as somebody else holds it.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

/// Values that go with the last who holds them. Each says so itself when it is dropped: see [`Living::forget`].
#[derive(Debug)]
pub(super) struct Living<K, V>(Mutex<HashMap<K, Weak<V>>>);

impl<K, V> Default for Living<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash, V> Living<K, V> {
    /// The value that lives, or a new one.
    pub fn get_or(&self, key: K, make: impl FnOnce() -> V) -> Arc<V> {
        let mut all = self.0.lock();
        if let Some(value) = all.get(&key).and_then(Weak::upgrade) {
            return value;
        }
        let value = Arc::new(make());
        all.insert(key, Arc::downgrade(&value));
        value
    }

    /// To be called when a value is dropped. Another may have come in its place by then, and stays.
    pub fn forget(&self, key: &K) {
        let mut all = self.0.lock();
        if all.get(key).is_some_and(|value| value.strong_count() == 0) {
            all.remove(key);
        }
    }

    /// How many live.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.0.lock().len()
    }
}
