//! Destinations whose connections the kernel hands to the agent.

use std::collections::BTreeSet;
use std::net::IpAddr;

use imbl::ordmap::DiffItem;

/// A destination whose connections the kernel hands to the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CaptureTarget {
    /// Service address or pod address.
    pub address: IpAddr,
    /// The port, or none for every port.
    pub port: Option<u16>,
}

/// What makes the targets of one snapshot those of another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TargetChanges {
    /// To be captured from now on.
    pub added: BTreeSet<CaptureTarget>,
    /// No longer to be captured.
    pub removed: BTreeSet<CaptureTarget>,
}

impl TargetChanges {
    /// Whether nothing changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.removed.is_empty()
    }
}

/// Targets, each with the number of objects that want it: two Services may share an address, and a
/// dual-stack pod has two.
#[derive(Debug, Clone, Default)]
pub(super) struct Targets(imbl::OrdMap<CaptureTarget, usize>);

impl Targets {
    pub(super) fn add(&mut self, target: CaptureTarget) {
        *self.0.entry(target).or_insert(0) += 1;
    }

    pub(super) fn remove(&mut self, target: CaptureTarget) {
        match self.0.get_mut(&target) {
            Some(count) if *count > 1 => *count -= 1,
            Some(_) => {
                self.0.remove(&target);
            }
            None => {}
        }
    }

    pub(super) fn contains(&self, target: &CaptureTarget) -> bool {
        self.0.contains_key(target)
    }

    pub(super) fn to_set(&self) -> BTreeSet<CaptureTarget> {
        self.0.keys().copied().collect()
    }

    /// What to add to and remove from `older` to get `self`. Costs the size of the difference:
    /// structure that both share is skipped.
    pub(super) fn changes_since(&self, older: &Self) -> TargetChanges {
        let mut changes = TargetChanges::default();
        for item in older.0.diff(&self.0) {
            match item {
                DiffItem::Add(target, _) => {
                    changes.added.insert(*target);
                }
                DiffItem::Remove(target, _) => {
                    changes.removed.insert(*target);
                }
                DiffItem::Update { .. } => {}
            }
        }
        changes
    }
}
