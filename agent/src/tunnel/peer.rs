//! Who is at the other end of a TLS session.

use std::net::SocketAddr;

use rustls::CommonState;

use super::error::TunnelError;
use crate::identity::peer_identity;
use crate::mesh::SpiffeId;

/// The identity that the peer has proven.
///
/// # Errors
/// It names another protocol than HTTP/2 (none at all is taken for it, as ztunnel does), or its certificate names nobody.
pub(super) fn proven(session: &CommonState, address: SocketAddr) -> Result<SpiffeId, TunnelError> {
    if session.alpn_protocol().is_some_and(|name| name != b"h2") {
        return Err(TunnelError::Protocol { address });
    }
    peer_identity(session.peer_certificates().unwrap_or_default()).map_err(|error| {
        TunnelError::PeerCertificate {
            address,
            reason: error.to_string().into(),
        }
    })
}
