//! `undermesh ca`: a CA for meshes without Kubernetes, speaking Istio's protocol.

mod authenticator;
mod listener;
mod signer;
mod state;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use futures_util::future::BoxFuture;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::Server;
use tonic::{Request, Status};

pub use authenticator::{AuthenticatorError, NodeFault};
pub use signer::{Signed, Signer, SignerError};
pub use state::StateError;

use self::authenticator::{Authenticator, Node, Reload};
use self::listener::Peer;
use self::signer::OwnKey;
use super::protocol::{
    CertificateRequest, CertificateResponse, CertificateServer, CreateCertificate,
};
use super::request::SigningRequest;
use crate::mesh::TrustDomain;

/// How often the authenticator's file is looked at.
const RELOAD: Duration = Duration::from_secs(1);
/// Validity of the certificate of the CA's own port, renewed at half of it.
const OWN_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// Age at which a connection is asked to go (GOAWAY): agents use one per request.
const CONNECTION_AGE: Duration = Duration::from_secs(60);
/// Time that it then has.
const CONNECTION_GRACE: Duration = Duration::from_secs(5);
/// Time that requests under way have when the CA stops.
const STOP_GRACE: Duration = Duration::from_secs(2);
/// Requests at once on one connection.
const STREAMS: u32 = 16;
/// Largest header list of a request, in bytes; a token is in it.
const HEADER_LIST: u32 = 32 * 1024;
/// Shortest certificate that can be asked for.
const SHORTEST: Duration = Duration::from_secs(1);
/// Left of the root's validity when a warning is due.
const ROOT_WARNING: Duration = Duration::from_secs(90 * 24 * 3600);

/// Settings of the CA.
#[derive(Debug, Clone)]
pub struct AuthorityOptions {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Its directory: `ca-key.pem` and `root.pem`, made on first start.
    pub state_dir: PathBuf,
    /// The domain whose identities it certifies.
    pub trust_domain: TrustDomain,
    /// YAML: which node may ask for which identities. Reloaded when it changes.
    pub authenticator_file: PathBuf,
    /// Validity of workloads' certificates; a request may ask for less. Default 24 h.
    pub certificate_lifetime: Duration,
    /// DNS names and IP addresses of the CA's own certificate. `localhost` and the address that
    /// it listens on are added.
    pub server_names: Vec<String>,
}

/// Why the CA cannot run.
#[derive(Debug, Error)]
pub enum AuthorityError {
    /// Key or root.
    #[error("the CA's state: {0}")]
    State(#[from] StateError),
    /// The authenticator's file, at start.
    #[error("the authenticator: {0}")]
    Authenticator(#[from] AuthenticatorError),
    /// Its own certificate.
    #[error("the CA's own certificate: {0}")]
    Own(#[from] SignerError),
    /// Less than one second.
    #[error("certificates must live at least {SHORTEST:?}, not {0:?}")]
    Lifetime(Duration),
    /// rustls could not be configured.
    #[error("TLS cannot be configured: {0}")]
    Tls(#[from] rustls::Error),
    /// The port.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// What the system said.
        error: std::io::Error,
    },
    /// The gRPC server.
    #[error("the gRPC server ended: {0}")]
    Serve(#[from] tonic::transport::Error),
}

/// Runs a CA until `stop`. Boxed, so that it is compiled here and not once more with the program.
pub fn serve(
    options: AuthorityOptions,
    stop: CancellationToken,
) -> BoxFuture<'static, Result<(), AuthorityError>> {
    Box::pin(async move { Authority::open(options).await?.run(stop).await })
}

/// A CA that listens; [`Self::run`] makes it answer.
pub struct Authority {
    listener: TcpListener,
    address: SocketAddr,
    service: Arc<Certifier>,
    own_key: OwnKey,
    own_names: Vec<String>,
}

impl Authority {
    /// Loads or makes the state, loads the authenticator, listens.
    pub async fn open(options: AuthorityOptions) -> Result<Self, AuthorityError> {
        let lifetime = options.certificate_lifetime;
        if lifetime < SHORTEST {
            return Err(AuthorityError::Lifetime(lifetime));
        }
        let now = SystemTime::now();
        let signer = state::open(&options.state_dir, &options.trust_domain, now)?;
        if signer.root_not_after() < now + ROOT_WARNING {
            let end = time::OffsetDateTime::from(signer.root_not_after());
            tracing::warn!(%end, "the CA's root ends in less than 90 days");
        }
        let authenticator =
            Authenticator::open(&options.authenticator_file, &options.trust_domain)?;
        let own_names = own_names(&options);
        let own = signer.sign_own(&own_names, OWN_LIFETIME, now)?;
        let listen = |error| AuthorityError::Listen {
            address: options.listen,
            error,
        };
        let listener = TcpListener::bind(options.listen).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        tracing::info!(%address, trust_domain = %options.trust_domain, "the CA listens");
        Ok(Self {
            listener,
            address,
            service: Arc::new(Certifier {
                signer,
                authenticator,
                lifetime,
                trust_domain: options.trust_domain,
            }),
            own_key: Arc::new(ArcSwap::from_pointee(own)),
            own_names,
        })
    }

    /// Where it listens: the port that was given, or the one that the system chose.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The root that agents must trust, PEM.
    #[must_use]
    pub fn root_pem(&self) -> &str {
        self.service.signer.root_pem()
    }

    /// Answers until `stop`; what is under way then has two seconds.
    pub async fn run(self, stop: CancellationToken) -> Result<(), AuthorityError> {
        let tls = listener::tls_config(self.own_key.clone())?;
        let (sender, accepted) = mpsc::channel(16);
        let _acceptor = AbortOnDropHandle::new(tokio::spawn(listener::accept(
            self.listener,
            tls,
            sender,
            stop.clone(),
        )));
        let _keeper = AbortOnDropHandle::new(tokio::spawn(keep_fresh(
            self.service.clone(),
            self.own_key,
            self.own_names,
        )));
        let server = Server::builder()
            .max_concurrent_streams(STREAMS)
            .http2_max_header_list_size(HEADER_LIST)
            .max_connection_age(CONNECTION_AGE)
            .max_connection_age_grace(CONNECTION_GRACE)
            .http2_keepalive_interval(Some(Duration::from_secs(10)))
            .http2_keepalive_timeout(Some(Duration::from_secs(10)))
            .timeout(Duration::from_secs(10))
            .add_service(CertificateServer::new(self.service))
            .serve_with_incoming_shutdown(ReceiverStream::new(accepted), stop.cancelled());
        let too_long = async {
            stop.cancelled().await;
            tokio::time::sleep(STOP_GRACE).await;
        };
        tokio::select! {
            ended = server => Ok(ended?),
            () = too_long => Ok(()),
        }
    }
}

fn own_names(options: &AuthorityOptions) -> Vec<String> {
    let mut names = options.server_names.clone();
    names.push("localhost".to_owned());
    if !options.listen.ip().is_unspecified() {
        names.push(options.listen.ip().to_string());
    }
    names.sort();
    names.dedup();
    names
}

/// Keeps the CA's own certificate and the authenticator's file fresh.
async fn keep_fresh(service: Arc<Certifier>, own_key: OwnKey, own_names: Vec<String>) {
    let mut reload = interval(RELOAD);
    reload.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut renewed = SystemTime::now();
    loop {
        reload.tick().await;
        let looking = service.clone();
        let looked = tokio::task::spawn_blocking(move || looking.authenticator.reload()).await;
        match looked {
            Ok(Ok(Reload::Changed)) => tracing::info!("the authenticator's file has changed"),
            Ok(Ok(Reload::Unchanged)) => {}
            Ok(Err(error)) => {
                tracing::error!(%error, "authenticator refused, the last good one stays");
            }
            Err(error) => tracing::error!(%error, "the authenticator's file was not looked at"),
        }
        let now = SystemTime::now();
        // An age that cannot be told means that the clock was set back: renew then too.
        if now
            .duration_since(renewed)
            .is_ok_and(|age| age < OWN_LIFETIME / 2)
        {
            continue;
        }
        match service.signer.sign_own(&own_names, OWN_LIFETIME, now) {
            Ok(key) => {
                own_key.store(Arc::new(key));
                renewed = now;
            }
            Err(error) => tracing::error!(%error, "the CA's own certificate is not renewed"),
        }
    }
}

/// Decides each request: who asks, for whom, and whether that is allowed.
struct Certifier {
    signer: Signer,
    authenticator: Authenticator,
    trust_domain: TrustDomain,
    lifetime: Duration,
}

impl CreateCertificate for Certifier {
    fn create_certificate(
        &self,
        request: Request<CertificateRequest>,
    ) -> Result<CertificateResponse, Status> {
        self.certify(&request, SystemTime::now())
    }
}

impl Certifier {
    fn certify(
        &self,
        request: &Request<CertificateRequest>,
        now: SystemTime,
    ) -> Result<CertificateResponse, Status> {
        let peer = request.extensions().get::<Peer>().map(|peer| peer.0);
        let node = self.authenticate(request).inspect_err(|status| {
            tracing::warn!(?peer, reason = status.message(), "certificate denied");
        })?;
        let name = &node.name;
        let message = request.get_ref();
        let wanted = SigningRequest::from_pem(&message.csr).map_err(|error| {
            tracing::warn!(?peer, node = name, %error, "certificate denied");
            Status::invalid_argument(error.to_string())
        })?;
        if wanted.id.trust_domain() != &self.trust_domain || !node.may(&wanted.id) {
            let identity = &wanted.id;
            tracing::warn!(?peer, node = name, %identity, "certificate denied: not this node's");
            return Err(Status::permission_denied(format!(
                "node {name} may not ask for {identity}"
            )));
        }
        let lifetime = self.lifetime_for(message.validity_duration);
        let signed = self.signer.sign(&wanted, lifetime, now).map_err(|error| {
            tracing::error!(node = name, %error, "certificate not signed");
            Status::internal("the CA cannot sign")
        })?;
        tracing::info!(node = name, identity = %wanted.id, serial = signed.serial, "certificate issued");
        Ok(CertificateResponse {
            cert_chain: signed.chain,
        })
    }

    fn authenticate(&self, request: &Request<CertificateRequest>) -> Result<Arc<Node>, Status> {
        let mut values = request.metadata().get_all("authorization").iter();
        let (Some(value), None) = (values.next(), values.next()) else {
            return Err(Status::unauthenticated("expected one bearer token"));
        };
        let bytes = value.as_encoded_bytes();
        let token = match bytes.split_at_checked(b"Bearer ".len()) {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case(b"Bearer ") => token,
            _ => return Err(Status::unauthenticated("expected one bearer token")),
        };
        self.authenticator
            .authenticate(token)
            .ok_or_else(|| Status::unauthenticated("unknown token"))
    }

    /// What was asked for in seconds, between one second and what this CA gives at most.
    fn lifetime_for(&self, asked: i64) -> Duration {
        match u64::try_from(asked) {
            Ok(seconds) if seconds > 0 => Duration::from_secs(seconds).min(self.lifetime),
            _ => self.lifetime,
        }
    }
}

#[cfg(test)]
mod tests;
