//! Tunnels end to end: real TLS and HTTP/2, over memory and over loopback.

mod keeping;
mod reading;
mod room;
mod serving;
mod streams;

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use parking_lot::Mutex;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
};
use rustls::pki_types::PrivateKeyDer;
use tokio::io::DuplexStream;
use tokio_util::sync::CancellationToken;

use super::server::Side;
use super::*;
use crate::identity::{Roots, WorkloadCertificate};
use crate::mesh::SpiffeId;

pub(super) const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";
pub(super) const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/server";
const POD: &str = "10.0.0.1:15008";
const APP: &str = "10.0.0.1:8080";
const FAR: Duration = Duration::from_secs(20);

/// A CA of its own.
pub(super) struct Mesh {
    authority: CertifiedIssuer<'static, KeyPair>,
    roots: Roots,
}

impl Mesh {
    pub(super) fn new() -> Self {
        let mut params = CertificateParams::default();
        // Not the name of what it signs, or OpenSSL takes that for its own issuer.
        params.distinguished_name.push(DnType::CommonName, "a root");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let roots = Roots::from_pem(authority.pem().as_bytes()).unwrap();
        Self { authority, roots }
    }

    pub(super) fn certificate(&self, id: &str) -> Arc<WorkloadCertificate> {
        self.certificate_until(id, Duration::from_secs(3600))
    }

    fn certificate_until(&self, id: &str, lifetime: Duration) -> Arc<WorkloadCertificate> {
        let (certificate, key) = self.issue(id, lifetime);
        let der = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&der).unwrap();
        let id = id.parse().unwrap();
        let chain = vec![certificate.der().clone()];
        let now = SystemTime::now();
        Arc::new(WorkloadCertificate::new(&id, chain, key, &self.roots, now).unwrap())
    }

    /// Its root, PEM.
    pub(super) fn root_pem(&self) -> String {
        self.authority.pem()
    }

    /// A certificate and its key.
    pub(super) fn issue(&self, id: &str, lifetime: Duration) -> (Certificate, KeyPair) {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        params.not_before = SystemTime::now().into();
        params.not_after = (SystemTime::now() + lifetime).into();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.authority).unwrap();
        (certificate, key)
    }
}

type Handling = Pin<Box<dyn Future<Output = ()> + Send>>;

struct Service<F>(F);

impl<F, H> TunnelService for Service<F>
where
    F: Fn(Incoming) -> H + Send + Sync + 'static,
    H: Future<Output = ()> + Send + 'static,
{
    fn connect(&self, incoming: Incoming) -> Handling {
        Box::pin((self.0)(incoming))
    }
}

fn service<F, H>(handler: F) -> Arc<dyn TunnelService>
where
    F: Fn(Incoming) -> H + Send + Sync + 'static,
    H: Future<Output = ()> + Send + 'static,
{
    Arc::new(Service(handler))
}

fn echo() -> Arc<dyn TunnelService> {
    service(|incoming| async {
        let (mut send, mut receive) = incoming.accept(None).unwrap();
        while let Some(data) = receive.data().await {
            let Ok(data) = data else { return };
            let length = data.len();
            if send.send(data).await.is_err() {
                return;
            }
            receive.release(length);
        }
        send.finish().unwrap();
    })
}

/// Takes each connection, and keeps both halves for the test.
#[derive(Clone, Default)]
struct Held(Arc<Mutex<Vec<(TunnelSend, TunnelReceive)>>>);

impl Held {
    fn service(&self) -> Arc<dyn TunnelService> {
        let held = self.clone();
        service(move |incoming| {
            held.0.lock().push(incoming.accept(None).unwrap());
            std::future::ready(())
        })
    }

    async fn take(&self) -> (TunnelSend, TunnelReceive) {
        eventually(|| !self.0.lock().is_empty()).await;
        self.0.lock().remove(0)
    }
}

/// A pod with a server of HBONE.
struct Pod {
    certificate: Mutex<Arc<WorkloadCertificate>>,
    service: Mutex<Arc<dyn TunnelService>>,
    drain: Mutex<CancellationToken>,
    bounds: Limits,
    dials: AtomicUsize,
    serving: Mutex<Vec<tokio::task::JoinHandle<Result<(), TunnelError>>>>,
    /// Bytes that the transport takes before its reader reads.
    pipe: usize,
}

impl Pod {
    fn new(mesh: &Mesh, service: Arc<dyn TunnelService>) -> Arc<Self> {
        Arc::new(Self {
            certificate: Mutex::new(mesh.certificate(SERVER)),
            service: Mutex::new(service),
            drain: Mutex::default(),
            bounds: Limits::default(),
            dials: AtomicUsize::new(0),
            serving: Mutex::default(),
            pipe: 256 * 1024,
        })
    }

    fn dial(&self) -> DuplexStream {
        self.dials.fetch_add(1, Ordering::SeqCst);
        let (near, far) = tokio::io::duplex(self.pipe);
        let side = Side {
            local: POD.parse().unwrap(),
            peer_address: "10.0.0.2:4711".parse().unwrap(),
            service: self.service.lock().clone(),
            bounds: self.bounds.clone(),
        };
        let certificate = self.certificate.lock().clone();
        let drain = self.drain.lock().clone();
        let serving = tokio::spawn(serve_with(far, certificate, side, drain));
        self.serving.lock().push(serving);
        near
    }

    fn dials(&self) -> usize {
        self.dials.load(Ordering::SeqCst)
    }

    /// All that it serves is gone, without a word.
    fn crash(&self) {
        for serving in self.serving.lock().drain(..) {
            serving.abort();
        }
    }
}

/// A client pod with its pool.
struct Client {
    pool: Arc<Pool>,
    certificate: Mutex<Arc<WorkloadCertificate>>,
}

impl Client {
    fn new(mesh: &Mesh) -> Self {
        Self::with(mesh, PoolOptions::default())
    }

    fn with(mesh: &Mesh, options: PoolOptions) -> Self {
        Self {
            pool: Pool::new(options),
            certificate: Mutex::new(mesh.certificate(CLIENT)),
        }
    }

    async fn open(&self, pod: &Pod) -> Result<Tunnelled, TunnelError> {
        let certificate = self.certificate.lock().clone();
        let request = ConnectRequest::new(app());
        let dial = || async { Ok(pod.dial()) };
        self.pool
            .open(&key(&[SERVER]), certificate, request, dial)
            .await
    }

    fn counter(&self, name: &str) -> u64 {
        let counters = self.pool.counters();
        counters.iter().find(|(n, _)| *n == name).unwrap().1
    }
}

fn app() -> SocketAddr {
    APP.parse().unwrap()
}

fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

fn key(destinations: &[&str]) -> TunnelKey {
    TunnelKey {
        netns_cookie: 1,
        source: id(CLIENT),
        destinations: Arc::new(destinations.iter().map(|d| id(d)).collect::<BTreeSet<_>>()),
        address: POD.parse().unwrap(),
        worker: None,
    }
}

/// Waits for a condition, with a deadline.
async fn eventually(mut condition: impl FnMut() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    within(wait).await;
}

pub(super) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(FAR, future).await.unwrap()
}

/// Reads to the end, giving room back at once.
async fn read_all(receive: &mut TunnelReceive) -> Result<Vec<u8>, StreamReset> {
    let mut all = Vec::new();
    while let Some(data) = receive.data().await {
        let data = data?;
        receive.release(data.len());
        all.extend_from_slice(&data);
    }
    Ok(all)
}

async fn ping_pong(tunnelled: &mut Tunnelled) {
    tunnelled
        .send
        .send(Bytes::from_static(b"ping"))
        .await
        .unwrap();
    let answer = within(tunnelled.receive.data()).await.unwrap().unwrap();
    assert_eq!(&answer[..], b"ping");
    tunnelled.receive.release(answer.len());
}

/// Bytes that no shift or swap leaves the same.
fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
