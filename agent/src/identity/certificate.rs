//! A certificate that a workload of this node uses, ready for TLS.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::sign::{CertifiedKey, SigningKey};
use rustls::{ClientConfig, ServerConfig};
use thiserror::Error;
use x509_parser::parse_x509_certificate;
use x509_parser::time::ASN1Time;

use super::peer::{PeerError, peer_identity};
use super::tls::{MeshTls, Roots};
use crate::mesh::SpiffeId;

/// Most certificates that a chain may hold, root included.
pub(super) const MAX_CHAIN: usize = 8;

/// Why what a CA returned is not used.
#[derive(Debug, Error)]
pub enum CertificateFault {
    /// No certificate at all.
    #[error("the chain is empty")]
    Empty,
    /// More than eight.
    #[error("the chain has {0} certificates, at most {MAX_CHAIN} are taken")]
    ChainTooLong(usize),
    /// It does not tell one identity.
    #[error(transparent)]
    Identity(#[from] PeerError),
    /// It is for somebody else.
    #[error("asked for {asked}, got a certificate for {got}")]
    OtherIdentity {
        /// What the request said.
        asked: SpiffeId,
        /// What the certificate says.
        got: SpiffeId,
    },
    /// It certifies another key than the one that was made for it.
    #[error("the certificate is for another key")]
    OtherKey,
    /// Peers would refuse it: chain, validity, usage.
    #[error("peers would refuse the certificate: {0}")]
    Untrusted(rustls::Error),
    /// rustls could not be configured.
    #[error("TLS cannot be configured: {0}")]
    Tls(rustls::Error),
    /// A validity outside of what the clock can express.
    #[error("the validity is not a time")]
    Validity,
}

/// A certificate of one identity with its TLS configurations, which are built once and shared by
/// every connection.
pub struct WorkloadCertificate {
    /// Whose it is.
    pub id: SpiffeId,
    /// Serial number, in lower-case hexadecimal.
    pub serial: String,
    /// Start of validity.
    pub not_before: SystemTime,
    /// End of validity: not used after this moment.
    pub not_after: SystemTime,
    /// For connections that arrive on 15008: client certificate required, of the same trust
    /// domain; ALPN `h2` or none.
    pub server: Arc<ServerConfig>,
    /// For tunnels to peers: chain and trust domain are checked, the identity is not. Compare
    /// [`peer_identity`] with the expected ones after the handshake. No SNI is sent.
    pub client: Arc<ClientConfig>,
    key: Arc<CertifiedKey>,
    roots: Roots,
}

impl WorkloadCertificate {
    /// Takes a chain (own certificate first; a root in it is dropped) that a CA issued for `id`
    /// and `key`. Fails unless every peer that trusts `roots` would accept it at `now`.
    pub fn new(
        id: &SpiffeId,
        chain: Vec<CertificateDer<'static>>,
        key: Arc<dyn SigningKey>,
        roots: &Roots,
        now: SystemTime,
    ) -> Result<Self, CertificateFault> {
        if chain.is_empty() {
            return Err(CertificateFault::Empty);
        }
        if chain.len() > MAX_CHAIN {
            return Err(CertificateFault::ChainTooLong(chain.len()));
        }
        let got = peer_identity(&chain)?;
        if got != *id {
            return Err(CertificateFault::OtherIdentity {
                asked: id.clone(),
                got,
            });
        }
        let chain = chain
            .into_iter()
            .filter(|certificate| !roots.contains(certificate))
            .collect();
        let key = CertifiedKey::new(chain, key);
        key.keys_match().map_err(|_| CertificateFault::OtherKey)?;
        Self::build(id, Arc::new(key), roots, now)
    }

    /// The same certificate, trusting other roots.
    pub fn with_roots(&self, roots: &Roots, now: SystemTime) -> Result<Self, CertificateFault> {
        Self::build(&self.id, self.key.clone(), roots, now)
    }

    /// The chain that is presented: own certificate first, without the root.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.key.cert
    }

    /// The roots that peers are verified with.
    #[must_use]
    pub fn roots(&self) -> &Roots {
        &self.roots
    }

    fn build(
        id: &SpiffeId,
        key: Arc<CertifiedKey>,
        roots: &Roots,
        now: SystemTime,
    ) -> Result<Self, CertificateFault> {
        let tls = MeshTls::new(id.trust_domain().clone(), roots).map_err(CertificateFault::Tls)?;
        let [leaf, intermediates @ ..] = &key.cert[..] else {
            return Err(CertificateFault::Empty);
        };
        tls.accepts(leaf, intermediates, unix_time(now))
            .map_err(CertificateFault::Untrusted)?;
        let (_, parsed) = parse_x509_certificate(leaf)
            .map_err(|error| PeerError::Malformed(error.to_string()))?;
        let validity = parsed.validity();
        let serial = parsed.raw_serial().iter();
        Ok(Self {
            id: id.clone(),
            serial: serial.map(|byte| format!("{byte:02x}")).collect(),
            not_before: system_time(validity.not_before)?,
            not_after: system_time(validity.not_after)?,
            server: Arc::new(
                tls.server_config(key.clone())
                    .map_err(CertificateFault::Tls)?,
            ),
            client: Arc::new(
                tls.client_config(key.clone())
                    .map_err(CertificateFault::Tls)?,
            ),
            key,
            roots: roots.clone(),
        })
    }
}

impl std::fmt::Debug for WorkloadCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkloadCertificate")
            .field("id", &format_args!("{}", self.id))
            .field("serial", &self.serial)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

fn system_time(time: ASN1Time) -> Result<SystemTime, CertificateFault> {
    let seconds = u64::try_from(time.timestamp()).map_err(|_| CertificateFault::Validity)?;
    UNIX_EPOCH
        .checked_add(Duration::from_secs(seconds))
        .ok_or(CertificateFault::Validity)
}

/// A time before 1970 counts as 1970: nothing is valid then.
pub(super) fn unix_time(now: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::io;

    use rustls::client::Resumption;
    use rustls::pki_types::ServerName;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio_rustls::{TlsAcceptor, TlsConnector};

    use super::*;
    use crate::identity::request::NewRequest;
    use crate::identity::testing::TestAuthority;
    use crate::identity::tls::crypto_provider;
    use crate::mesh::TrustDomain;

    type Client = tokio_rustls::client::TlsStream<DuplexStream>;
    type Server = tokio_rustls::server::TlsStream<DuplexStream>;

    const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
    const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

    /// Both sides of a handshake, and a byte each way (a server's refusal of the client's
    /// certificate reaches a TLS 1.3 client only after its own handshake).
    async fn handshake(
        client: Arc<ClientConfig>,
        server: Arc<ServerConfig>,
    ) -> (io::Result<Client>, io::Result<Server>) {
        let (near, far) = duplex(16 * 1024);
        let name = ServerName::try_from("192.0.2.1").unwrap();
        tokio::join!(
            async {
                let mut stream = TlsConnector::from(client).connect(name, near).await?;
                stream.write_all(b"?").await?;
                stream.read_u8().await?;
                Ok(stream)
            },
            async {
                let mut stream = TlsAcceptor::from(server).accept(far).await?;
                stream.read_u8().await?;
                stream.write_all(b"!").await?;
                Ok(stream)
            }
        )
    }

    fn peer_error<T>(result: io::Result<T>) -> PeerError {
        let error = result.err().expect("must be refused");
        let tls = error.get_ref().and_then(|e| e.downcast_ref()).unwrap();
        PeerError::of(tls).cloned().unwrap()
    }

    #[tokio::test]
    async fn two_certificates_of_one_mesh_shake_hands_and_each_side_knows_the_other() {
        let ca = TestAuthority::new("cluster.local");
        let (web, cart) = (ca.issue(WEB), ca.issue(CART));
        let (client, server) = handshake(web.client.clone(), cart.server.clone()).await;
        let (client, server) = (client.unwrap(), server.unwrap());
        let (_, client) = client.get_ref();
        let (_, server) = server.get_ref();
        assert_eq!(
            peer_identity(client.peer_certificates().unwrap()).unwrap(),
            cart.id
        );
        assert_eq!(
            peer_identity(server.peer_certificates().unwrap()).unwrap(),
            web.id
        );
        assert_eq!(server.alpn_protocol(), Some(&b"h2"[..]));
        assert_eq!(server.server_name(), None, "no SNI is sent");
        assert_eq!(
            server.protocol_version(),
            Some(rustls::ProtocolVersion::TLSv1_3)
        );
        let suite = server.negotiated_cipher_suite().unwrap().suite();
        assert_eq!(suite, rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    }

    #[tokio::test]
    async fn no_session_is_resumed() {
        let ca = TestAuthority::new("cluster.local");
        let (web, cart) = (ca.issue(WEB), ca.issue(CART));
        let mut eager = (*web.client).clone();
        eager.resumption = Resumption::in_memory_sessions(16);
        let eager = Arc::new(eager);
        for _ in 0..3 {
            let (client, _server) = handshake(eager.clone(), cart.server.clone()).await;
            let client = client.unwrap();
            assert_eq!(
                client.get_ref().1.handshake_kind(),
                Some(rustls::HandshakeKind::Full)
            );
        }
    }

    #[tokio::test]
    async fn a_peer_of_another_trust_domain_is_refused_by_both_sides_even_under_one_root() {
        let ca = TestAuthority::new("cluster.local");
        let ours = ca.issue(WEB);
        let theirs = ca.issue("spiffe://other.example/ns/shop/sa/web");
        let mut careless = (*theirs.client).clone();
        careless
            .dangerous()
            .set_certificate_verifier(Arc::new(Anything));
        let (_, server) = handshake(Arc::new(careless), ours.server.clone()).await;
        assert!(matches!(peer_error(server), PeerError::TrustDomain { .. }));
        let (client, _) = handshake(ours.client.clone(), theirs.server.clone()).await;
        assert!(matches!(peer_error(client), PeerError::TrustDomain { .. }));
    }

    #[tokio::test]
    async fn a_peer_of_another_root_is_refused_by_both_sides() {
        let (one, two) = (
            TestAuthority::new("cluster.local"),
            TestAuthority::new("cluster.local"),
        );
        let (web, stranger) = (one.issue(WEB), two.issue(WEB));
        for (client, server) in [(&web, &stranger), (&stranger, &web)] {
            let (client, server) = handshake(client.client.clone(), server.server.clone()).await;
            assert!(client.is_err() && server.is_err());
        }
    }

    #[tokio::test]
    async fn with_both_roots_trusted_a_root_can_be_rotated() {
        let (old, new) = (
            TestAuthority::new("cluster.local"),
            TestAuthority::new("cluster.local"),
        );
        let both = format!("{}{}", old.root_pem(), new.root_pem());
        let both = Roots::from_pem(both.as_bytes()).unwrap();
        let now = SystemTime::now();
        let web = old.issue(WEB).with_roots(&both, now).unwrap();
        let cart = new.issue(CART).with_roots(&both, now).unwrap();
        let (client, server) = handshake(web.client.clone(), cart.server.clone()).await;
        assert!(client.is_ok() && server.is_ok());
        assert!(matches!(
            web.with_roots(&new.roots(), now),
            Err(CertificateFault::Untrusted(_))
        ));
    }

    #[tokio::test]
    async fn a_client_without_a_certificate_is_refused() {
        let ca = TestAuthority::new("cluster.local");
        let anonymous = ClientConfig::builder_with_provider(crypto_provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anything))
            .with_no_client_auth();
        let (client, server) = handshake(Arc::new(anonymous), ca.issue(CART).server.clone()).await;
        assert!(client.is_err());
        assert!(
            server
                .unwrap_err()
                .to_string()
                .contains("peer sent no certificates")
        );
    }

    #[tokio::test]
    async fn http_1_is_refused_and_no_protocol_at_all_is_served() {
        let ca = TestAuthority::new("cluster.local");
        let (web, cart) = (ca.issue(WEB), ca.issue(CART));
        let offering = |protocols: &[&[u8]]| {
            let mut config = (*web.client).clone();
            config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
            Arc::new(config)
        };
        let (client, server) = handshake(offering(&[b"http/1.1"]), cart.server.clone()).await;
        assert!(client.is_err() && server.is_err());
        let (client, server) = handshake(offering(&[]), cart.server.clone()).await;
        assert!(client.is_ok() && server.is_ok());
        let both: &[&[u8]] = &[b"http/1.1", b"h2"];
        let (client, _server) = handshake(offering(both), cart.server.clone()).await;
        assert_eq!(
            client.unwrap().get_ref().1.alpn_protocol(),
            Some(&b"h2"[..])
        );
    }

    #[tokio::test]
    async fn tls_1_2_and_chacha_are_not_spoken() {
        let ca = TestAuthority::new("cluster.local");
        let cart = ca.issue(CART);
        for (version, suite) in [
            (
                &rustls::version::TLS12,
                rustls::crypto::aws_lc_rs::cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
            ),
            (
                &rustls::version::TLS13,
                rustls::crypto::aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
            ),
        ] {
            let provider = rustls::crypto::CryptoProvider {
                cipher_suites: vec![suite],
                ..rustls::crypto::aws_lc_rs::default_provider()
            };
            let config = ClientConfig::builder_with_provider(Arc::new(provider))
                .with_protocol_versions(&[version])
                .unwrap()
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Anything))
                .with_no_client_auth();
            let (client, server) = handshake(Arc::new(config), cart.server.clone()).await;
            assert!(client.is_err() && server.is_err());
        }
    }

    #[test]
    fn an_expired_certificate_is_accepted_by_nobody() {
        let ca = TestAuthority::new("cluster.local");
        let now = SystemTime::now();
        let id: SpiffeId = WEB.parse().unwrap();
        let web = ca.issue_at(&id, Duration::from_secs(5), now);
        assert!(
            web.with_roots(&ca.roots(), now + Duration::from_secs(4))
                .is_ok()
        );
        assert!(matches!(
            web.with_roots(&ca.roots(), now + Duration::from_secs(7)),
            Err(CertificateFault::Untrusted(_))
        ));
    }

    #[test]
    fn what_a_ca_returns_must_be_for_the_key_and_the_identity_that_were_asked_for() {
        let ca = TestAuthority::new("cluster.local");
        let now = SystemTime::now();
        let hour = Duration::from_secs(3600);
        let (web, cart): (SpiffeId, SpiffeId) = (WEB.parse().unwrap(), CART.parse().unwrap());
        let (asked, other) = (
            NewRequest::new(&web).unwrap(),
            NewRequest::new(&web).unwrap(),
        );
        let chain = ca.sign(&asked.pem, hour, now);
        let take = |id: &SpiffeId, chain: &[CertificateDer<'static>], key: &NewRequest| {
            WorkloadCertificate::new(id, chain.to_vec(), key.key.clone(), &ca.roots(), now)
        };
        let taken = take(&web, &chain, &asked).unwrap();
        assert_eq!(taken.chain().len(), 1, "the root is not sent to peers");
        assert!(matches!(
            take(&web, &chain, &other),
            Err(CertificateFault::OtherKey)
        ));
        assert!(matches!(
            take(&cart, &chain, &asked),
            Err(CertificateFault::OtherIdentity { .. })
        ));
        assert!(matches!(
            take(&web, &[], &asked),
            Err(CertificateFault::Empty)
        ));
        assert!(matches!(
            take(&web, &vec![chain[0].clone(); MAX_CHAIN + 1], &asked),
            Err(CertificateFault::ChainTooLong(9))
        ));
        let stranger = TestAuthority::new("cluster.local").sign(&asked.pem, hour, now);
        assert!(matches!(
            take(&web, &stranger, &asked),
            Err(CertificateFault::Untrusted(_))
        ));
    }

    #[test]
    fn the_debug_form_tells_no_key() {
        let text = format!("{:?}", TestAuthority::new("cluster.local").issue(WEB));
        assert!(text.contains(WEB) && !text.contains("key"), "{text}");
    }

    #[test]
    fn serial_and_validity_are_those_of_the_certificate() {
        let ca = TestAuthority::new(TrustDomain::default().as_str());
        let now = SystemTime::now();
        let web = ca.issue_at(&WEB.parse().unwrap(), Duration::from_secs(60), now);
        assert_eq!(web.serial.len(), 34);
        let life = web.not_after.duration_since(now).unwrap();
        assert!((60.0..61.0).contains(&life.as_secs_f64()), "{life:?}");
        assert!(web.not_before < now);
    }

    /// A client that does not care who answers.
    #[derive(Debug)]
    struct Anything;

    impl rustls::client::danger::ServerCertVerifier for Anything {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
            Ok(rustls::client::danger::ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            crypto_provider()
                .signature_verification_algorithms
                .supported_schemes()
        }
    }
}
