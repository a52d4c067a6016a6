//! The CA's key and what it signs. Pure: time is passed in, nothing is read or written.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SerialNumber,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::sign::CertifiedKey;
use thiserror::Error;
use time::OffsetDateTime;
use x509_parser::parse_x509_certificate;
use zeroize::{Zeroize, Zeroizing};

use crate::identity::request::{SigningRequest, signing_key};
use crate::mesh::TrustDomain;

/// Validity of a new root.
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How far the clocks of agents may be behind: validity starts that much earlier.
const CLOCK_SKEW: Duration = Duration::from_secs(60);

/// Why the CA cannot sign.
#[derive(Debug, Error)]
pub enum SignerError {
    /// Key or certificate of the CA cannot be made or read.
    #[error("the CA's {what}: {reason}")]
    Unusable {
        /// `key` or `certificate`.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// They do not belong together.
    #[error("the CA's certificate is for another key")]
    KeyMismatch,
    /// Not marked as a CA.
    #[error("the CA's certificate is not that of a CA")]
    NotCa,
    /// Nothing it signs would be valid.
    #[error("the CA's certificate has expired")]
    Expired,
    /// The certificate cannot be made.
    #[error("cannot sign: {0}")]
    Sign(String),
}

impl SignerError {
    fn sign(error: impl std::fmt::Display) -> Self {
        Self::Sign(error.to_string())
    }

    fn unusable(what: &'static str) -> impl FnOnce(rcgen::Error) -> Self {
        move |error| Self::Unusable {
            what,
            reason: error.to_string(),
        }
    }
}

/// A certificate that was signed.
#[derive(Debug, Clone)]
pub struct Signed {
    /// PEM: the certificate, then the root.
    pub chain: Vec<String>,
    /// Lower-case hexadecimal.
    pub serial: String,
    /// End of validity.
    pub not_after: SystemTime,
}

/// A CA: its key, in memory, and its self-signed certificate.
pub struct Signer {
    issuer: rcgen::Issuer<'static, KeyPair>,
    root_pem: String,
    root_not_after: SystemTime,
}

impl Signer {
    /// A new P-256 key in PKCS #8 PEM, wiped when dropped.
    pub fn generate_key() -> Result<Zeroizing<String>, SignerError> {
        let unusable = SignerError::unusable("key");
        let mut pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(unusable)?;
        let pem = Zeroizing::new(pair.serialize_pem());
        pair.zeroize();
        Ok(pem)
    }

    /// A new self-signed root for a key. Two of them for one key can stand in for each other: an
    /// agent that trusts one accepts what the other signed.
    pub fn generate_root(
        key_pem: &str,
        trust_domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<String, SignerError> {
        let pair = KeyPair::from_pem(key_pem).map_err(SignerError::unusable("key"))?;
        let mut params = params(now, now + ROOT_LIFETIME);
        params
            .distinguished_name
            .push(DnType::OrganizationName, trust_domain.as_str());
        params
            .distinguished_name
            .push(DnType::CommonName, "Undermesh root");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let root = params.self_signed(&pair).map_err(SignerError::sign)?;
        Ok(root.pem())
    }

    /// A CA from its key and its certificate.
    pub fn new(key_pem: &str, root_pem: &str, now: SystemTime) -> Result<Self, SignerError> {
        let pair = KeyPair::from_pem(key_pem).map_err(SignerError::unusable("key"))?;
        let unusable = |reason: String| SignerError::Unusable {
            what: "certificate",
            reason,
        };
        let der = CertificateDer::from_pem_slice(root_pem.as_bytes())
            .map_err(|error| unusable(error.to_string()))?;
        let (_, root) =
            parse_x509_certificate(&der).map_err(|error| unusable(error.to_string()))?;
        if root.public_key().raw != rcgen::PublicKeyData::subject_public_key_info(&pair) {
            return Err(SignerError::KeyMismatch);
        }
        if !root.is_ca() {
            return Err(SignerError::NotCa);
        }
        let root_not_after = root.validity().not_after.to_datetime().into();
        if root_not_after <= now {
            return Err(SignerError::Expired);
        }
        let issuer = rcgen::Issuer::from_ca_cert_der(&der, pair)
            .map_err(SignerError::unusable("certificate"))?;
        Ok(Self {
            issuer,
            root_pem: root_pem.to_owned(),
            root_not_after,
        })
    }

    /// The self-signed certificate that agents trust, PEM.
    #[must_use]
    pub fn root_pem(&self) -> &str {
        &self.root_pem
    }

    /// When nothing that it signed is valid any more.
    #[must_use]
    pub fn root_not_after(&self) -> SystemTime {
        self.root_not_after
    }

    /// Signs a workload's certificate: the request's identity and key, and nothing else of it.
    pub fn sign(
        &self,
        request: &SigningRequest,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Signed, SignerError> {
        let not_after = self.end_of(lifetime, now)?;
        let mut params = params(now, not_after);
        let uri = request.id.to_string();
        let uri = uri.try_into().map_err(SignerError::sign)?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let (serial, signed) = self.finish(params, &request.key)?;
        Ok(Signed {
            chain: vec![signed.pem(), self.root_pem.clone()],
            serial,
            not_after,
        })
    }

    /// Makes a key and a certificate for the CA's own port. It carries no identity of the mesh, so
    /// no peer accepts it; workloads' certificates carry no DNS name, so none can pose as the CA.
    pub fn sign_own(
        &self,
        names: &[String],
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<CertifiedKey, SignerError> {
        let not_after = self.end_of(lifetime, now)?;
        let mut params = params(now, not_after);
        for name in names {
            params.subject_alt_names.push(match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(name.as_str().try_into().map_err(SignerError::sign)?),
            });
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let mut pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(SignerError::sign)?;
        let key = signing_key(&pair);
        let signed = self.finish(params, &pair);
        pair.zeroize();
        let chain = vec![signed?.1.der().clone()];
        Ok(CertifiedKey::new(chain, key.map_err(SignerError::sign)?))
    }

    fn finish(
        &self,
        mut params: CertificateParams,
        key: &impl rcgen::PublicKeyData,
    ) -> Result<(String, rcgen::Certificate), SignerError> {
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let serial = random_serial()?;
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        let signed = params
            .signed_by(key, &self.issuer)
            .map_err(SignerError::sign)?;
        Ok((
            serial.iter().map(|byte| format!("{byte:02x}")).collect(),
            signed,
        ))
    }

    /// X.509 counts whole seconds: rounded up, so that nobody gets less than was promised.
    fn end_of(&self, lifetime: Duration, now: SystemTime) -> Result<SystemTime, SignerError> {
        if now >= self.root_not_after {
            return Err(SignerError::Expired);
        }
        let end = now.checked_add(lifetime).unwrap_or(self.root_not_after);
        let since = end
            .min(self.root_not_after)
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_err(SignerError::sign)?;
        let whole = Duration::from_secs(since.as_secs() + u64::from(since.subsec_nanos() > 0));
        Ok((SystemTime::UNIX_EPOCH + whole).min(self.root_not_after))
    }
}

fn params(now: SystemTime, not_after: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = OffsetDateTime::from(now - CLOCK_SKEW);
    params.not_after = OffsetDateTime::from(not_after);
    params
}

/// 128 random bits after a leading 1, so that the encoding has one length and is never negative
/// (RFC 5280 allows 20 bytes).
fn random_serial() -> Result<[u8; 17], SignerError> {
    let mut serial = [0; 17];
    aws_lc_rs::rand::fill(&mut serial[1..]).map_err(SignerError::sign)?;
    serial[0] = 1;
    Ok(serial)
}

/// What rustls takes for a port that serves with a [`CertifiedKey`] which is renewed.
pub(super) type OwnKey = Arc<arc_swap::ArcSwap<CertifiedKey>>;

#[cfg(test)]
mod tests {
    use rustls::client::verify_server_name;
    use rustls::pki_types::ServerName;
    use rustls::server::ParsedCertificate;

    use super::*;
    use crate::identity::Roots;
    use crate::identity::certificate::unix_time;
    use crate::identity::request::NewRequest;
    use crate::identity::tls::MeshTls;

    const HOUR: Duration = Duration::from_secs(3600);

    fn signer(now: SystemTime) -> Signer {
        let key = Signer::generate_key().unwrap();
        let root = Signer::generate_root(&key, &TrustDomain::default(), now).unwrap();
        Signer::new(&key, &root, now).unwrap()
    }

    fn request() -> SigningRequest {
        let id = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
        SigningRequest::from_pem(&NewRequest::new(&id).unwrap().pem).unwrap()
    }

    #[test]
    fn nothing_outlives_the_root_and_an_ended_root_signs_nothing() {
        let start = SystemTime::now();
        let signer = signer(start);
        let late = signer.root_not_after() - Duration::from_secs(60);
        for lifetime in [HOUR, Duration::MAX] {
            let signed = signer.sign(&request(), lifetime, late).unwrap();
            assert_eq!(signed.not_after, signer.root_not_after());
        }
        let ended = signer.root_not_after();
        assert!(matches!(
            signer.sign(&request(), HOUR, ended),
            Err(SignerError::Expired)
        ));
        let names = ["ca".to_owned()];
        assert!(signer.sign_own(&names, HOUR, ended).is_err());
    }

    #[test]
    fn serials_are_128_random_bits() {
        let now = SystemTime::now();
        let signer = signer(now);
        let serial = || signer.sign(&request(), HOUR, now).unwrap().serial;
        let (one, two) = (serial(), serial());
        assert_eq!(one.len(), 34);
        assert_ne!(one, two);
    }

    #[test]
    fn the_certificate_of_the_own_port_makes_no_peer_and_a_workload_cannot_pose_as_the_ca() {
        let now = SystemTime::now();
        let signer = signer(now);
        let own = signer.sign_own(&["ca.undermesh".to_owned()], HOUR, now);
        let own = own.unwrap();
        let roots = Roots::from_pem(signer.root_pem().as_bytes()).unwrap();
        let tls = MeshTls::new(TrustDomain::default(), &roots).unwrap();
        assert!(tls.accepts(&own.cert[0], &[], unix_time(now)).is_err());

        let name = ServerName::try_from("ca.undermesh").unwrap();
        let named = |der: &CertificateDer<'_>| {
            verify_server_name(&ParsedCertificate::try_from(der).unwrap(), &name)
        };
        assert!(named(&own.cert[0]).is_ok());
        let signed = signer.sign(&request(), HOUR, now).unwrap();
        let workload = CertificateDer::from_pem_slice(signed.chain[0].as_bytes()).unwrap();
        assert!(named(&workload).is_err());
        assert!(tls.accepts(&workload, &[], unix_time(now)).is_ok());
    }

    #[test]
    fn a_certificate_that_is_no_ca_is_refused_as_root() {
        let now = SystemTime::now();
        let key = Signer::generate_key().unwrap();
        let pair = KeyPair::from_pem(&key).unwrap();
        let leaf = params(now, now + HOUR).self_signed(&pair).unwrap().pem();
        assert!(matches!(
            Signer::new(&key, &leaf, now),
            Err(SignerError::NotCa)
        ));
    }
}
