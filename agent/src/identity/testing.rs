//! Certificates for tests: a CA in memory.

use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::authority::Signer;
use super::request::{NewRequest, SigningRequest};
use super::{Roots, WorkloadCertificate};
use crate::mesh::{SpiffeId, TrustDomain};

/// A CA in memory.
pub struct TestAuthority(Signer);

impl TestAuthority {
    /// A new one for this trust domain.
    pub fn new(trust_domain: &str) -> Self {
        Self::at(trust_domain, SystemTime::now())
    }

    /// A new one whose validity starts at `now`.
    pub fn at(trust_domain: &str, now: SystemTime) -> Self {
        let trust_domain: TrustDomain = trust_domain.parse().unwrap();
        let key = Signer::generate_key().unwrap();
        let root = Signer::generate_root(&key, &trust_domain, now).unwrap();
        Self(Signer::new(&key, &root, now).unwrap())
    }

    /// Its root, PEM.
    pub fn root_pem(&self) -> &str {
        self.0.root_pem()
    }

    /// Its root.
    pub fn roots(&self) -> Roots {
        Roots::from_pem(self.root_pem().as_bytes()).unwrap()
    }

    /// A certificate of an hour for `spiffe://…`.
    pub fn issue(&self, id: &str) -> WorkloadCertificate {
        let id: SpiffeId = id.parse().unwrap();
        self.issue_at(&id, Duration::from_secs(3600), SystemTime::now())
    }

    /// A certificate that starts at `now`.
    pub fn issue_at(
        &self,
        id: &SpiffeId,
        lifetime: Duration,
        now: SystemTime,
    ) -> WorkloadCertificate {
        let new = NewRequest::new(id).unwrap();
        let chain = self.sign(&new.pem, lifetime, now);
        WorkloadCertificate::new(id, chain, new.key, &self.roots(), now).unwrap()
    }

    /// The chain for a request.
    pub fn sign(
        &self,
        csr: &str,
        lifetime: Duration,
        now: SystemTime,
    ) -> Vec<CertificateDer<'static>> {
        let request = SigningRequest::from_pem(csr).unwrap();
        let signed = self.0.sign(&request, lifetime, now).unwrap();
        let pem = signed.chain.iter();
        pem.map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap())
            .collect()
    }
}
