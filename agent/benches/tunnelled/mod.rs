//! A connection inside a tunnel, from one end of it to the other and back: HTTP/2 over mutual TLS over loopback.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    SanType,
};
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::PrivateKeyDer;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use undermesh::identity::{Roots, WorkloadCertificate};
use undermesh::tunnel::{
    ConnectRequest, Incoming, Limits, Pool, PoolOptions, Side, TunnelKey, TunnelService, Tunnelled,
    serve_with,
};

const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/server";

/// A connection of which everything comes back. Its tunnel lives as long as the runtime that it was made on.
pub struct Echoed(Tunnelled);

impl Echoed {
    /// Makes both ends of a tunnel, and a connection inside it.
    pub async fn start() -> Result<Self> {
        let authority = Authority::new()?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let server = authority.issue(SERVER)?;
        tokio::spawn(async move {
            let (stream, peer_address) = listener.accept().await?;
            let side = Side {
                local: address,
                peer_address,
                service: Arc::new(Echo),
                bounds: Limits::default(),
            };
            serve_with(stream, server, side, CancellationToken::new()).await?;
            anyhow::Ok(())
        });
        let key = TunnelKey {
            netns_cookie: 1,
            source: CLIENT.parse()?,
            destinations: Arc::new(BTreeSet::from([SERVER.parse()?])),
            address,
            worker: None,
        };
        let request = ConnectRequest::new(SocketAddr::new(address.ip(), 8080));
        let pool = Pool::new(PoolOptions::default());
        let certificate = authority.issue(CLIENT)?;
        let dial = || TcpStream::connect(address);
        let tunnelled = pool.open(&key, certificate, request, dial).await?;
        Ok(Self(tunnelled))
    }

    /// Sends it, and waits until all of it has come back.
    pub async fn there_and_back(&mut self, frame: Bytes) -> Result<()> {
        let mut left = frame.len();
        self.0.send.send(frame).await?;
        while left > 0 {
            let data = self.0.receive.data().await.context("it ended")??;
            self.0.receive.release(data.len());
            ensure!(data.len() <= left, "more came back than was sent");
            left -= data.len();
        }
        Ok(())
    }
}

struct Echo;

impl TunnelService for Echo {
    fn connect(&self, incoming: Incoming) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async {
            let Ok((mut send, mut receive)) = incoming.accept(None) else {
                return;
            };
            while let Some(Ok(data)) = receive.data().await {
                let length = data.len();
                if send.send(data).await.is_err() {
                    return;
                }
                receive.release(length);
            }
        })
    }
}

/// A CA of its own.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    roots: Roots,
}

impl Authority {
    fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let roots = Roots::from_pem(issuer.pem().as_bytes())?;
        Ok(Self { issuer, roots })
    }

    fn issue(&self, id: &str) -> Result<Arc<WorkloadCertificate>> {
        let now = SystemTime::now();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        params.not_before = now.into();
        params.not_after = (now + Duration::from_secs(3600)).into();
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let key = any_supported_type(&PrivateKeyDer::Pkcs8(key.serialize_der().into()))?;
        let chain = vec![certificate.der().clone()];
        let issued = WorkloadCertificate::new(&id.parse()?, chain, key, &self.roots, now)?;
        Ok(Arc::new(issued))
    }
}
