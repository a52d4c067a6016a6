//! Certificate signing requests: made by the agent, read by the CA.

use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, SanType, SubjectPublicKeyInfo};
use rustls::crypto::aws_lc_rs::sign::any_ecdsa_type;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::SigningKey;
use std::sync::Arc;
use thiserror::Error;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::cri_attributes::ParsedCriAttribute;
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::FromDer;
use zeroize::{Zeroize, Zeroizing};

use super::peer::{PeerError, only_identity};
use crate::mesh::SpiffeId;

/// Largest request that is read, in bytes of PEM. One with a P-256 key has about 500.
const MAX_CSR: usize = 16 * 1024;

/// Why a request is refused.
#[derive(Debug, Error)]
pub enum CsrError {
    /// Longer than 16 KiB.
    #[error("the request has {0} bytes, at most {MAX_CSR} are read")]
    TooLarge(usize),
    /// Not a PEM block `CERTIFICATE REQUEST`, or not PKCS #10 inside.
    #[error("the request is malformed: {0}")]
    Malformed(String),
    /// Whoever made it does not hold its key.
    #[error("the request is not signed by its own key")]
    Signature,
    /// Neither P-256 nor P-384.
    #[error("the key of the request is not ECDSA P-256 or P-384")]
    Key,
    /// It does not ask for exactly one identity.
    #[error(transparent)]
    Identity(#[from] PeerError),
    /// The library failed to make one.
    #[error("cannot make a request: {0}")]
    Make(String),
}

/// A new key of this process with the request that goes to the CA.
pub(super) struct NewRequest {
    /// PKCS #10, PEM.
    pub(super) pem: String,
    /// The key: its only form from here on.
    pub(super) key: Arc<dyn SigningKey>,
}

impl NewRequest {
    /// Makes a P-256 key and a request for `id`. The key's serialised form is wiped.
    pub(super) fn new(id: &SpiffeId) -> Result<Self, CsrError> {
        let make = |error: rcgen::Error| CsrError::Make(error.to_string());
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let uri = id.to_string().try_into().map_err(make)?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        let mut pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(make)?;
        let csr = params.serialize_request(&pair).and_then(|csr| csr.pem());
        let key = signing_key(&pair);
        pair.zeroize();
        Ok(Self {
            pem: csr.map_err(make)?,
            key: key.map_err(|error| CsrError::Make(error.to_string()))?,
        })
    }
}

/// The key as rustls signs with it. The copy that is needed in between is wiped.
pub(super) fn signing_key(pair: &KeyPair) -> Result<Arc<dyn SigningKey>, rustls::Error> {
    let der = Zeroizing::new(pair.serialize_der());
    any_ecdsa_type(&PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(
        der.as_slice(),
    )))
}

/// What a verified request asks for. Everything else in it (subject, usages, basic constraints,
/// validity) is the CA's to decide and is not even kept.
#[derive(Debug)]
pub struct SigningRequest {
    /// The identity that it asks for; whether it may is another question.
    pub id: SpiffeId,
    /// The key that shall be certified.
    pub key: SubjectPublicKeyInfo,
}

impl SigningRequest {
    /// Reads and verifies a PEM request: its own signature, an ECDSA key, exactly one URI SAN and
    /// that a SPIFFE id.
    pub fn from_pem(pem: &str) -> Result<Self, CsrError> {
        if pem.len() > MAX_CSR {
            return Err(CsrError::TooLarge(pem.len()));
        }
        let malformed = |reason: String| CsrError::Malformed(reason);
        Self::from_der(
            &CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
                .map_err(|error| malformed(error.to_string()))?,
        )
    }

    fn from_der(der: &CertificateSigningRequestDer<'_>) -> Result<Self, CsrError> {
        let malformed = |reason: String| CsrError::Malformed(reason);
        let (rest, csr) = X509CertificationRequest::from_der(der)
            .map_err(|error| malformed(error.to_string()))?;
        if !rest.is_empty() {
            return Err(malformed("bytes after its end".to_owned()));
        }
        let info = &csr.certification_request_info;
        let key =
            SubjectPublicKeyInfo::from_der(info.subject_pki.raw).map_err(|_| CsrError::Key)?;
        let algorithm = rcgen::PublicKeyData::algorithm(&key);
        if algorithm != &PKCS_ECDSA_P256_SHA256 && algorithm != &rcgen::PKCS_ECDSA_P384_SHA384 {
            return Err(CsrError::Key);
        }
        csr.verify_signature().map_err(|_| CsrError::Signature)?;

        // All attributes and all extensions are looked at: a second one must not hide a name.
        let mut names = Vec::new();
        for attribute in info.iter_attributes() {
            if let ParsedCriAttribute::ExtensionRequest(requested) = attribute.parsed_attribute() {
                for extension in &requested.extensions {
                    match extension.parsed_extension() {
                        ParsedExtension::SubjectAlternativeName(san) => {
                            names.extend(san.general_names.iter().cloned());
                        }
                        ParsedExtension::ParseError { .. } => {
                            return Err(malformed("an extension cannot be decoded".to_owned()));
                        }
                        _ => {}
                    }
                }
            }
        }
        Ok(Self {
            id: only_identity(&names)?,
            key,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> SpiffeId {
        "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()
    }

    fn request_for(uris: &[&str]) -> String {
        let pair = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = uris
            .iter()
            .map(|uri| SanType::URI((*uri).try_into().unwrap()))
            .collect();
        params.serialize_request(&pair).unwrap().pem().unwrap()
    }

    #[test]
    fn a_request_reads_back_as_what_it_asks_for() {
        let request = NewRequest::new(&id()).unwrap();
        let read = SigningRequest::from_pem(&request.pem).unwrap();
        assert_eq!(read.id, id());
        assert_eq!(
            rcgen::PublicKeyData::subject_public_key_info(&read.key),
            request.key.public_key().unwrap().as_ref()
        );
    }

    #[test]
    fn every_request_has_a_key_of_its_own() {
        let (one, two) = (
            NewRequest::new(&id()).unwrap(),
            NewRequest::new(&id()).unwrap(),
        );
        assert_ne!(one.key.public_key().unwrap(), two.key.public_key().unwrap());
    }

    #[test]
    fn a_request_for_two_identities_or_none_is_refused() {
        let two = request_for(&["spiffe://a/ns/b/sa/c", "spiffe://a/ns/b/sa/d"]);
        assert!(matches!(
            SigningRequest::from_pem(&two),
            Err(CsrError::Identity(PeerError::SeveralIdentities(2)))
        ));
        assert!(matches!(
            SigningRequest::from_pem(&request_for(&[])),
            Err(CsrError::Identity(PeerError::NoIdentity))
        ));
    }

    #[test]
    fn a_second_list_of_extensions_cannot_hide_a_name() {
        let der = |tag: u8, content: &[u8]| {
            let mut bytes = vec![tag, u8::try_from(content.len()).unwrap()];
            bytes.extend_from_slice(content);
            bytes
        };
        let names = der(0x30, &der(0x86, b"spiffe://cluster.local/ns/shop/sa/db"));
        let san = [vec![6, 3, 0x55, 0x1d, 17], der(4, &names)].concat();
        let values = der(0x31, &der(0x30, &der(0x30, &san)));
        let second = rcgen::Attribute {
            oid: &[1, 2, 840, 113_549, 1, 9, 14],
            values,
        };
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id().to_string().try_into().unwrap())];
        let pair = KeyPair::generate().unwrap();
        let csr = params.serialize_request_with_attributes(&pair, vec![second]);
        assert!(matches!(
            SigningRequest::from_der(csr.unwrap().der()),
            Err(CsrError::Identity(PeerError::SeveralIdentities(2)))
        ));
    }

    #[test]
    fn a_request_whose_signature_was_changed_is_refused() {
        let pem = NewRequest::new(&id()).unwrap().pem;
        let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).unwrap();
        let mut bytes = der.to_vec();
        // The name is in the signed part: web becomes wec.
        let at = bytes.windows(3).position(|w| w == b"web").unwrap();
        bytes[at + 2] = b'c';
        assert!(matches!(
            SigningRequest::from_der(&bytes.into()),
            Err(CsrError::Signature)
        ));
    }

    #[test]
    fn a_key_that_is_not_on_a_known_curve_is_refused() {
        let pair = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let pem = CertificateParams::default()
            .serialize_request(&pair)
            .unwrap()
            .pem()
            .unwrap();
        assert!(matches!(SigningRequest::from_pem(&pem), Err(CsrError::Key)));
    }

    #[test]
    fn text_that_is_no_request_is_refused() {
        for text in ["", "hello", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n"] {
            assert!(SigningRequest::from_pem(text).is_err());
        }
        assert!(matches!(
            SigningRequest::from_pem(&"a".repeat(MAX_CSR + 1)),
            Err(CsrError::TooLarge(_))
        ));
    }
}
