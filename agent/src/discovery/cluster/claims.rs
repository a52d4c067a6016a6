//! What only one object can have.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use super::super::object::{Fault, ObjectKey};
use crate::mesh::WorkloadUid;

/// What only one object can have.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Claim {
    /// The settings of the mesh are one object.
    MeshConfig,
    /// A pod's UID.
    Uid(WorkloadUid),
    /// A pod's address.
    Address(IpAddr),
    /// A Service's address and port.
    Vip(IpAddr, u16),
}

/// Who has what, and who waits for it.
#[derive(Debug, Default)]
pub(super) struct Claims {
    holders: HashMap<Claim, ObjectKey>,
    waiting: HashMap<Claim, BTreeSet<ObjectKey>>,
}

impl Claims {
    /// The first of these that another has.
    pub(super) fn conflict(
        &self,
        key: &ObjectKey,
        wanted: &[(Claim, String)],
    ) -> Option<(Claim, Fault)> {
        wanted.iter().find_map(|(claim, field)| {
            let holder = self.holders.get(claim).filter(|holder| *holder != key)?;
            let reason = match claim {
                Claim::MeshConfig => format!("{holder} is in force: there is one for the mesh"),
                Claim::Uid(uid) => format!("{uid} is the UID of {holder}"),
                Claim::Address(address) => format!("{address} is the address of {holder}"),
                Claim::Vip(address, port) => {
                    format!("port {port} of {address} belongs to {holder}")
                }
            };
            Some((claim.clone(), Fault::new(field.clone(), reason)))
        })
    }

    pub(super) fn hold(&mut self, key: &ObjectKey, claims: Vec<(Claim, String)>) {
        for (claim, _) in claims {
            self.holders.insert(claim, key.clone());
        }
    }

    pub(super) fn release(&mut self, key: &ObjectKey, claim: &Claim) {
        if self.holders.get(claim) == Some(key) {
            self.holders.remove(claim);
        }
    }

    pub(super) fn wait(&mut self, claim: Claim, key: ObjectKey) {
        self.waiting.entry(claim).or_default().insert(key);
    }

    pub(super) fn stop_waiting(&mut self, claim: &Claim, key: &ObjectKey) {
        if let Some(waiting) = self.waiting.get_mut(claim) {
            waiting.remove(key);
            if waiting.is_empty() {
                self.waiting.remove(claim);
            }
        }
    }

    /// Who may have this claim now, if nobody has it.
    pub(super) fn next_for(&self, claim: &Claim) -> Vec<ObjectKey> {
        if self.holders.contains_key(claim) {
            return Vec::new();
        }
        let waiting = self.waiting.get(claim).into_iter().flatten();
        waiting.cloned().collect()
    }
}
