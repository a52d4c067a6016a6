//! Who may connect to a pod.

use thiserror::Error;

use super::{Mode, SpiffeId};

/// Why a connection is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Denied {
    /// The destination is STRICT and the peer showed no identity.
    #[error("plaintext: the destination is STRICT and the peer has no mesh identity")]
    Plaintext,
}

/// Decides, before a byte reaches the app, whether `peer` may connect to a pod of this mode. `peer`
/// comes from a verified certificate or from the netns that the connection was accepted in, never
/// from an address.
pub fn authorize(mode: Mode, peer: Option<&SpiffeId>) -> Result<(), Denied> {
    match (mode, peer) {
        (Mode::Strict, None) => Err(Denied::Plaintext),
        (Mode::Strict | Mode::Permissive, _) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_strict_pod_refuses_a_peer_without_identity() {
        let peer: SpiffeId = "spiffe://cluster.local/ns/default/sa/client"
            .parse()
            .unwrap();
        assert_eq!(authorize(Mode::Strict, None), Err(Denied::Plaintext));
        assert_eq!(authorize(Mode::Strict, Some(&peer)), Ok(()));
        assert_eq!(authorize(Mode::Permissive, None), Ok(()));
        assert_eq!(authorize(Mode::Permissive, Some(&peer)), Ok(()));
    }
}
