//! Who is at the other end: the SPIFFE id in a certificate.

use rustls::pki_types::CertificateDer;
use thiserror::Error;
use x509_parser::extensions::GeneralName;
use x509_parser::parse_x509_certificate;

use crate::mesh::{SpiffeId, SpiffeIdError, TrustDomain};

/// Longest URI that is looked at, in bytes (SPIFFE-ID standard, section 2.3).
const MAX_URI: usize = 2048;

/// Why a certificate does not tell an identity of this mesh.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PeerError {
    /// The peer sent no certificate.
    #[error("the peer sent no certificate")]
    NoCertificate,
    /// Not an X.509 certificate, or one with a malformed or repeated extension.
    #[error("the certificate is malformed: {0}")]
    Malformed(String),
    /// No URI in its subject alternative names.
    #[error("the certificate carries no URI SAN")]
    NoIdentity,
    /// More than one URI: which one is meant would be a guess.
    #[error("the certificate carries {0} URI SANs, expected one")]
    SeveralIdentities(usize),
    /// Longer than SPIFFE allows.
    #[error("the URI SAN is {0} bytes long, at most 2048 are allowed")]
    TooLong(usize),
    /// A byte that is not printable ASCII, such as NUL, which other parsers may stop at.
    #[error("the URI SAN {0:?} holds bytes that are not printable ASCII")]
    NotPrintable(String),
    /// The URI is not a workload's SPIFFE id.
    #[error(transparent)]
    NotSpiffe(#[from] SpiffeIdError),
    /// A well-formed id of another trust domain.
    #[error("{id} is not in the trust domain {expected}")]
    TrustDomain {
        /// The identity that the peer has.
        id: SpiffeId,
        /// The trust domain of this mesh.
        expected: TrustDomain,
    },
}

impl PeerError {
    /// The reason inside a failed handshake, if it was refused for its identity.
    #[must_use]
    pub fn of(error: &rustls::Error) -> Option<&Self> {
        match error {
            rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other)) => {
                other.0.downcast_ref()
            }
            _ => None,
        }
    }
}

impl From<PeerError> for rustls::Error {
    fn from(error: PeerError) -> Self {
        let other = rustls::OtherError(std::sync::Arc::new(error));
        Self::InvalidCertificate(rustls::CertificateError::Other(other))
    }
}

/// The identity of a peer from the chain that it presented, its own certificate first. Chain and
/// validity must have been verified by TLS; the trust domain is verified there too.
pub fn peer_identity(certificates: &[CertificateDer<'_>]) -> Result<SpiffeId, PeerError> {
    let certificate = certificates.first().ok_or(PeerError::NoCertificate)?;
    let malformed = |reason: String| PeerError::Malformed(reason);
    let (rest, certificate) =
        parse_x509_certificate(certificate).map_err(|error| malformed(error.to_string()))?;
    if !rest.is_empty() {
        return Err(malformed("bytes after its end".to_owned()));
    }
    let names = certificate
        .subject_alternative_name()
        .map_err(|error| malformed(error.to_string()))?
        .ok_or(PeerError::NoIdentity)?;
    only_identity(&names.value.general_names)
}

/// As [`peer_identity`], and the identity must be in `trust_domain`.
pub(super) fn member_identity(
    certificate: &CertificateDer<'_>,
    trust_domain: &TrustDomain,
) -> Result<SpiffeId, PeerError> {
    let id = peer_identity(std::slice::from_ref(certificate))?;
    if id.trust_domain() != trust_domain {
        return Err(PeerError::TrustDomain {
            id,
            expected: trust_domain.clone(),
        });
    }
    Ok(id)
}

/// The identity among subject alternative names: exactly one URI, and that one a SPIFFE id. Other
/// kinds of names are allowed by SPIFFE and mean nothing here.
pub(super) fn only_identity(names: &[GeneralName<'_>]) -> Result<SpiffeId, PeerError> {
    let mut uris = Vec::new();
    for name in names {
        match name {
            GeneralName::URI(uri) => uris.push(*uri),
            GeneralName::Invalid(tag, _) => {
                return Err(PeerError::Malformed(format!(
                    "an alternative name (tag {}) cannot be decoded",
                    tag.0
                )));
            }
            _ => {}
        }
    }
    let [uri] = uris[..] else {
        return Err(match uris.len() {
            0 => PeerError::NoIdentity,
            several => PeerError::SeveralIdentities(several),
        });
    };
    if uri.len() > MAX_URI {
        return Err(PeerError::TooLong(uri.len()));
    }
    if !uri.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(PeerError::NotPrintable(uri.to_owned()));
    }
    Ok(uri.parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(names: &[&str]) -> Result<SpiffeId, PeerError> {
        let names: Vec<_> = names.iter().map(|uri| GeneralName::URI(uri)).collect();
        only_identity(&names)
    }

    #[test]
    fn one_spiffe_uri_is_the_identity() {
        let id = identity(&["spiffe://cluster.local/ns/shop/sa/web"]).unwrap();
        assert_eq!(id.to_string(), "spiffe://cluster.local/ns/shop/sa/web");
    }

    #[test]
    fn names_of_other_kinds_mean_nothing() {
        let names = [
            GeneralName::DNSName("web.shop"),
            GeneralName::URI("spiffe://cluster.local/ns/shop/sa/web"),
            GeneralName::IPAddress(&[10, 0, 0, 1]),
        ];
        assert!(only_identity(&names).is_ok());
        assert_eq!(only_identity(&names[..1]), Err(PeerError::NoIdentity));
    }

    #[test]
    fn two_uris_are_refused_even_if_one_is_right() {
        assert_eq!(
            identity(&["spiffe://cluster.local/ns/shop/sa/web", "https://x"]),
            Err(PeerError::SeveralIdentities(2))
        );
    }

    #[test]
    fn a_nul_byte_is_refused_wherever_it_stands() {
        for uri in [
            "spiffe://cluster.local/ns/shop/sa/web\0",
            "spiffe://cluster.local/ns/shop/sa/web\0.evil",
            "\0spiffe://cluster.local/ns/shop/sa/web",
            "spiffe://cluster.local\0/ns/shop/sa/web",
        ] {
            assert!(matches!(identity(&[uri]), Err(PeerError::NotPrintable(_))));
        }
    }

    #[test]
    fn other_schemes_and_forms_are_refused() {
        for uri in [
            "https://cluster.local/ns/shop/sa/web",
            "SPIFFE://cluster.local/ns/shop/sa/web",
            "spiffe://cluster.local/ns/shop/sa/web/",
            "spiffe://cluster.local/ns/shop/sa/web?x",
            "spiffe://cluster.local/ns/shop/sa/web#x",
            "spiffe://cluster.local/ns/shop/sa/%77eb",
            "spiffe://cluster.local:443/ns/shop/sa/web",
            "spiffe://user@cluster.local/ns/shop/sa/web",
            "spiffe://cluster.local/ns//sa/web",
            "spiffe://cluster.local/ns/../sa/web",
            "spiffe://cluster.local/ns/*/sa/web",
            "",
        ] {
            assert!(
                matches!(identity(&[uri]), Err(PeerError::NotSpiffe(_))),
                "{uri}"
            );
        }
    }

    #[test]
    fn an_undecodable_name_is_refused_beside_a_right_one() {
        let names = [
            GeneralName::URI("spiffe://cluster.local/ns/shop/sa/web"),
            GeneralName::Invalid(x509_parser::asn1_rs::Tag(6), b"\xff"),
        ];
        assert!(matches!(
            only_identity(&names),
            Err(PeerError::Malformed(_))
        ));
    }

    #[test]
    fn an_overlong_uri_is_refused() {
        let uri = format!("spiffe://{}/ns/a/sa/b", "a".repeat(3000));
        assert_eq!(identity(&[&uri]), Err(PeerError::TooLong(uri.len())));
    }

    #[test]
    fn no_certificate_and_garbage_have_reasons_of_their_own() {
        assert_eq!(peer_identity(&[]), Err(PeerError::NoCertificate));
        let garbage = CertificateDer::from(vec![0x30, 0x03, 1, 2, 3]);
        assert!(matches!(
            peer_identity(&[garbage]),
            Err(PeerError::Malformed(_))
        ));
    }

    proptest::proptest! {
        #[test]
        fn no_uri_panics_and_what_passes_reads_back_the_same(uri in "\\PC{0,80}|spiffe://[a-z.\\x00/]{0,40}") {
            if let Ok(id) = identity(&[&uri]) {
                proptest::prop_assert_eq!(id.to_string(), uri);
            }
        }
    }
}
