//! TLS as HBONE wants it: TLS 1.3, AES-GCM, `h2`, both sides with a certificate of the mesh, no
//! resumption (it would skip verification).

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig,
    SignatureScheme,
};
use thiserror::Error;

use super::peer::member_identity;
use crate::mesh::TrustDomain;

/// The protocol of HBONE and gRPC in ALPN.
pub(super) const ALPN_H2: &[u8] = b"h2";
/// Most trust anchors that are taken from one file: two are enough to rotate a root.
const MAX_ROOTS: usize = 32;

/// AWS-LC with the two cipher suites that HBONE uses, the cheaper one first: bulk costs a fiftieth less, and
/// 128 bits are what P-256 certificates are worth. Never the process's default provider: more than one may be
/// compiled in.
#[must_use]
pub fn crypto_provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
            aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
        ],
        ..aws_lc_rs::default_provider()
    })
}

/// Why a text is no set of trust anchors.
#[derive(Debug, Error)]
pub enum RootsError {
    /// The file cannot be read.
    #[error("cannot read {path}: {error}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        error: std::io::Error,
    },
    /// Broken PEM.
    #[error("not PEM: {0}")]
    Pem(String),
    /// No certificate in it.
    #[error("no certificate in it")]
    Empty,
    /// More than 32 certificates.
    #[error("more than {MAX_ROOTS} certificates in it")]
    TooMany,
    /// A certificate in it cannot be a trust anchor.
    #[error("certificate {number} cannot be a trust anchor: {error}")]
    Anchor {
        /// Its position, from 1.
        number: usize,
        /// What is wrong with it.
        error: rustls::Error,
    },
}

/// Trust anchors. Several at once, so that a root can be rotated: first trusted, then used.
#[derive(Clone)]
pub struct Roots {
    certificates: Arc<[CertificateDer<'static>]>,
    store: Arc<RootCertStore>,
}

impl Roots {
    /// From one or more PEM certificates.
    pub fn from_pem(pem: &[u8]) -> Result<Self, RootsError> {
        let certificates = CertificateDer::pem_slice_iter(pem)
            .take(MAX_ROOTS + 1)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| RootsError::Pem(error.to_string()))?;
        if certificates.is_empty() {
            return Err(RootsError::Empty);
        }
        if certificates.len() > MAX_ROOTS {
            return Err(RootsError::TooMany);
        }
        let mut store = RootCertStore::empty();
        for (index, certificate) in certificates.iter().enumerate() {
            store
                .add(certificate.clone())
                .map_err(|error| RootsError::Anchor {
                    number: index + 1,
                    error,
                })?;
        }
        Ok(Self {
            certificates: certificates.into(),
            store: Arc::new(store),
        })
    }

    /// The anchors as rustls takes them.
    #[must_use]
    pub fn store(&self) -> &Arc<RootCertStore> {
        &self.store
    }

    /// Whether this certificate is one of them.
    #[must_use]
    pub fn contains(&self, certificate: &CertificateDer<'_>) -> bool {
        self.certificates.iter().any(|root| root == certificate)
    }
}

impl PartialEq for Roots {
    fn eq(&self, other: &Self) -> bool {
        self.certificates == other.certificates
    }
}

impl Eq for Roots {}

impl fmt::Debug for Roots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Roots({})", self.certificates.len())
    }
}

/// The verifiers of both sides, and the two configurations that use them.
pub(super) struct MeshTls {
    server: Arc<MeshClientVerifier>,
    client: Arc<MeshServerVerifier>,
    provider: Arc<CryptoProvider>,
}

impl MeshTls {
    /// Trusts peers of `trust_domain` whose chains end at `roots`.
    pub(super) fn new(trust_domain: TrustDomain, roots: &Roots) -> Result<Self, rustls::Error> {
        let provider = crypto_provider();
        let chain =
            WebPkiClientVerifier::builder_with_provider(roots.store.clone(), provider.clone())
                .build()
                .map_err(|error| rustls::Error::General(error.to_string()))?;
        Ok(Self {
            server: Arc::new(MeshClientVerifier {
                chain,
                trust_domain: trust_domain.clone(),
            }),
            client: Arc::new(MeshServerVerifier {
                roots: roots.store.clone(),
                trust_domain,
                provider: provider.clone(),
            }),
            provider,
        })
    }

    /// Whether a peer would accept this chain, in both roles.
    pub(super) fn accepts(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        self.client.verify(leaf, intermediates, now)?;
        self.server.verify_client_cert(leaf, intermediates, now)?;
        Ok(())
    }

    /// For connections that arrive.
    pub(super) fn server_config(
        &self,
        key: Arc<CertifiedKey>,
    ) -> Result<ServerConfig, rustls::Error> {
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(self.server.clone())
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
        // A client that offers protocols must offer h2; one that offers none is served.
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        // For tunnels, which open and seal records themselves.
        config.enable_secret_extraction = true;
        Ok(config)
    }

    /// For connections to peers.
    pub(super) fn client_config(
        &self,
        key: Arc<CertifiedKey>,
    ) -> Result<ClientConfig, rustls::Error> {
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(self.client.clone())
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        config.enable_sni = false;
        config.enable_early_data = false;
        config.resumption = Resumption::disabled();
        // As for connections that arrive.
        config.enable_secret_extraction = true;
        Ok(config)
    }
}

fn no_tls12() -> rustls::Error {
    rustls::Error::General("TLS 1.2 is never offered".to_owned())
}

/// Verifies clients: chain, client authentication usage, and an identity of the mesh.
#[derive(Debug)]
struct MeshClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    trust_domain: TrustDomain,
}

impl ClientCertVerifier for MeshClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn client_auth_mandatory(&self) -> bool {
        true
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self
            .chain
            .verify_client_cert(end_entity, intermediates, now)?;
        member_identity(end_entity, &self.trust_domain)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// Verifies servers: chain, server authentication usage, and an identity of the mesh. Not the
/// name: connections go to addresses, and which identities may answer there is known to the
/// tunnel, which compares it after the handshake and before the first byte.
#[derive(Debug)]
struct MeshServerVerifier {
    roots: Arc<RootCertStore>,
    trust_domain: TrustDomain,
    provider: Arc<CryptoProvider>,
}

impl MeshServerVerifier {
    fn verify(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.roots,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        member_identity(end_entity, &self.trust_domain)?;
        Ok(())
    }
}

impl ServerCertVerifier for MeshServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
