//! A peer's certificate: whatever it holds, at most one identity comes out, and nothing breaks.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rustls_pki_types::CertificateDer;
use undermesh::identity::peer_identity;
use undermesh::mesh::SpiffeId;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(id) = peer_identity(&[CertificateDer::from(bytes)]) {
        assert_eq!(id.to_string().parse::<SpiffeId>().ok(), Some(id));
    }
});
