//! The agent's side of the CA protocol.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use http::Uri;
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost_types::value::Kind;
use rustls::ClientConfig;
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::version::TLS13;
use std::sync::Arc;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::body::Body;
use tonic::metadata::MetadataValue;
use tonic::{Request, Status};
use zeroize::Zeroizing;

use super::certificate::{CertificateFault, MAX_CHAIN, WorkloadCertificate};
use super::protocol::{CertificateRequest, IMPERSONATED_IDENTITY, create_certificate};
use super::request::{CsrError, NewRequest};
use super::store::{IssueError, Issuer, Issuing};
use super::tls::{ALPN_H2, Roots, RootsError, crypto_provider};
use crate::mesh::SpiffeId;

/// Largest file of roots or token that is read, in bytes.
const MAX_FILE: u64 = 256 * 1024;
/// Longest message of a CA that is repeated in logs and status, in characters.
const MAX_MESSAGE: usize = 300;

/// How the CA is reached.
#[derive(Debug, Clone)]
pub struct AuthorityClientOptions {
    /// `HOST:PORT`. A name is resolved anew for each request.
    pub address: String,
    /// The name that the CA's certificate must carry. Default: the host of `address`.
    pub server_name: Option<String>,
    /// PEM roots, both of the CA's own certificate and of the workloads'. Read for each request.
    pub root_file: PathBuf,
    /// The bearer token of this node. Read for each request, so that it may be rotated.
    pub token_file: PathBuf,
    /// Validity that is asked for; none leaves it to the CA.
    pub lifetime: Option<Duration>,
    /// Limit of a whole request, from the first file to the last certificate. Default 10 s.
    pub timeout: Duration,
}

impl AuthorityClientOptions {
    /// The defaults for a CA at this address.
    #[must_use]
    pub fn new(address: &str, root_file: &Path, token_file: &Path) -> Self {
        Self {
            address: address.to_owned(),
            server_name: None,
            root_file: root_file.to_owned(),
            token_file: token_file.to_owned(),
            lifetime: None,
            timeout: Duration::from_secs(10),
        }
    }
}

/// Why a request to the CA failed.
#[derive(Debug, Error)]
pub enum ClientError {
    /// `address` is not `HOST:PORT`.
    #[error("{0:?} is not HOST:PORT")]
    Address(String),
    /// The server name is neither a DNS name nor an IP address.
    #[error("{0:?} is not a server name")]
    ServerName(String),
    /// The file of roots is unusable.
    #[error("the CA's roots: {0}")]
    Roots(#[from] RootsError),
    /// The token file is unusable.
    #[error("the token file {path}: {reason}")]
    Token {
        /// The file.
        path: String,
        /// What is wrong with it; never its content.
        reason: String,
    },
    /// No key or no request could be made.
    #[error(transparent)]
    Request(#[from] CsrError),
    /// TCP.
    #[error("cannot connect to the CA at {address}: {error}")]
    Connect {
        /// As configured.
        address: String,
        /// What the system said.
        error: std::io::Error,
    },
    /// TLS: most often a root or a server name that does not fit.
    #[error("TLS with the CA at {address} failed: {error}")]
    Tls {
        /// As configured.
        address: String,
        /// What rustls said.
        error: std::io::Error,
    },
    /// rustls could not be configured.
    #[error("TLS cannot be configured: {0}")]
    Configure(#[from] rustls::Error),
    /// HTTP/2.
    #[error("HTTP/2 with the CA failed: {0}")]
    Http(#[from] hyper::Error),
    /// The CA's answer is a refusal.
    #[error("the CA refused: {code:?}: {message:?}")]
    Refused {
        /// gRPC code.
        code: tonic::Code,
        /// Its message, shortened.
        message: String,
    },
    /// The CA's answer is not PEM.
    #[error("the CA's answer is not PEM: {0}")]
    Answer(String),
    /// The CA's answer is not what was asked for.
    #[error("the CA's answer: {0}")]
    Fault(#[from] CertificateFault),
    /// The limit of the whole request.
    #[error("no answer from the CA at {address} within {limit:?}")]
    Timeout {
        /// As configured.
        address: String,
        /// The limit.
        limit: Duration,
    },
}

impl From<Status> for ClientError {
    fn from(status: Status) -> Self {
        Self::Refused {
            code: status.code(),
            message: status.message().chars().take(MAX_MESSAGE).collect(),
        }
    }
}

/// Asks a CA for certificates, one connection per request: they are rare, and so neither a dead
/// connection nor an old root is ever reused.
#[derive(Debug)]
pub struct AuthorityClient {
    options: AuthorityClientOptions,
    server_name: ServerName<'static>,
    origin: Uri,
}

impl AuthorityClient {
    /// Checks the options; reads no file yet.
    pub fn new(options: AuthorityClientOptions) -> Result<Self, ClientError> {
        let address = || ClientError::Address(options.address.clone());
        let origin = Uri::builder()
            .scheme("https")
            .authority(options.address.as_str())
            .path_and_query("/")
            .build()
            .map_err(|_| address())?;
        let host = match (origin.host(), origin.port_u16()) {
            (Some(host), Some(_)) if !host.is_empty() => host,
            _ => return Err(address()),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = options.server_name.as_deref().unwrap_or(host);
        let server_name = ServerName::try_from(name.to_owned())
            .map_err(|_| ClientError::ServerName(name.to_owned()))?;
        Ok(Self {
            server_name,
            origin,
            options,
        })
    }

    /// A certificate for a new key, verified: it is for that key and `id`, peers that trust the
    /// roots would accept it now.
    pub async fn request(&self, id: &SpiffeId) -> Result<WorkloadCertificate, ClientError> {
        let limit = self.options.timeout;
        timeout(limit, self.exchange(id)).await.unwrap_or_else(|_| {
            Err(ClientError::Timeout {
                address: self.options.address.clone(),
                limit,
            })
        })
    }

    /// The roots in the file now.
    pub async fn read_roots(&self) -> Result<Roots, ClientError> {
        let path = &self.options.root_file;
        let pem = read(path).await.map_err(|error| RootsError::Read {
            path: path.display().to_string(),
            error,
        })?;
        Ok(Roots::from_pem(&pem)?)
    }

    async fn exchange(&self, id: &SpiffeId) -> Result<WorkloadCertificate, ClientError> {
        let roots = self.read_roots().await?;
        let token = self.token().await?;
        let new = NewRequest::new(id)?;
        let mut request = Request::new(self.message(id, new.pem));
        request.metadata_mut().insert("authorization", token);

        let (connection, _driver) = self.open(&roots).await?;
        let answer = create_certificate(connection, self.origin.clone(), request).await?;

        let chain = read_chain(&answer.cert_chain)?;
        let now = SystemTime::now();
        Ok(WorkloadCertificate::new(id, chain, new.key, &roots, now)?)
    }

    /// A connection to the CA, and the task that drives it.
    pub(super) async fn open(
        &self,
        roots: &Roots,
    ) -> Result<(Connection, AbortOnDropHandle<hyper::Result<()>>), ClientError> {
        let stream = self.connect(roots).await?;
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .handshake(TokioIo::new(stream))
            .await?;
        let driver = AbortOnDropHandle::new(tokio::spawn(connection));
        Ok((Connection(sender), driver))
    }

    fn message(&self, id: &SpiffeId, csr: String) -> CertificateRequest {
        let identity = prost_types::Value {
            kind: Some(Kind::StringValue(id.to_string())),
        };
        let lifetime = self
            .options
            .lifetime
            .map_or(0, |lifetime| lifetime.as_secs());
        CertificateRequest {
            csr,
            validity_duration: i64::try_from(lifetime).unwrap_or(i64::MAX),
            metadata: Some(prost_types::Struct {
                fields: BTreeMap::from([(IMPERSONATED_IDENTITY.to_owned(), identity)]),
            }),
        }
    }

    async fn token(&self) -> Result<MetadataValue<tonic::metadata::Ascii>, ClientError> {
        let fault = |reason: String| ClientError::Token {
            path: self.options.token_file.display().to_string(),
            reason,
        };
        let bytes = read(&self.options.token_file)
            .await
            .map_err(|error| fault(error.to_string()))?;
        let text = Zeroizing::new(
            String::from_utf8(bytes.to_vec()).map_err(|_| fault("not UTF-8".to_owned()))?,
        );
        if text.trim().is_empty() {
            return Err(fault("empty".to_owned()));
        }
        let bearer = Zeroizing::new(format!("Bearer {}", text.trim()));
        let mut value = MetadataValue::try_from(bearer.as_str())
            .map_err(|_| fault("not one line of ASCII".to_owned()))?;
        value.set_sensitive(true);
        Ok(value)
    }

    async fn connect(&self, roots: &Roots) -> Result<TlsStream<TcpStream>, ClientError> {
        let mut config = ClientConfig::builder_with_provider(crypto_provider())
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(roots.store().clone())
            .with_no_client_auth();
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        config.resumption = Resumption::disabled();
        let address = self.options.address.as_str();
        let stream = TcpStream::connect(address)
            .await
            .map_err(|error| ClientError::Connect {
                address: address.to_owned(),
                error,
            })?;
        TlsConnector::from(Arc::new(config))
            .connect(self.server_name.clone(), stream)
            .await
            .map_err(|error| ClientError::Tls {
                address: address.to_owned(),
                error,
            })
    }
}

impl Issuer for AuthorityClient {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> Issuing<'a, WorkloadCertificate> {
        Box::pin(async move { self.request(id).await.map_err(IssueError::new) })
    }

    fn roots(&self) -> Issuing<'_, Roots> {
        Box::pin(async move { self.read_roots().await.map_err(IssueError::new) })
    }
}

/// A whole file, unless it is far larger than it can sensibly be. Wiped when dropped.
async fn read(path: &Path) -> std::io::Result<Zeroizing<Vec<u8>>> {
    use tokio::io::AsyncReadExt as _;
    let mut content = Zeroizing::new(Vec::new());
    let file = tokio::fs::File::open(path).await?;
    file.take(MAX_FILE + 1).read_to_end(&mut content).await?;
    if content.len() as u64 > MAX_FILE {
        return Err(std::io::Error::other(format!(
            "larger than {MAX_FILE} bytes"
        )));
    }
    Ok(content)
}

/// Each entry may hold several certificates: CAs differ.
fn read_chain(entries: &[String]) -> Result<Vec<CertificateDer<'static>>, ClientError> {
    entries
        .iter()
        .flat_map(|pem| CertificateDer::pem_slice_iter(pem.as_bytes()))
        .take(MAX_CHAIN + 1)
        .collect::<Result<_, _>>()
        .map_err(|error| ClientError::Answer(error.to_string()))
}

/// One HTTP/2 connection as a gRPC client takes it.
pub(super) struct Connection(SendRequest<Body>);

impl tower_service::Service<http::Request<Body>> for Connection {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = tonic::codegen::BoxFuture<Self::Response, hyper::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name_for(address: &str) -> Result<String, ClientError> {
        let options = AuthorityClientOptions::new(address, Path::new("/r"), Path::new("/t"));
        Ok(AuthorityClient::new(options)?
            .server_name
            .to_str()
            .into_owned())
    }

    #[test]
    fn the_host_of_the_address_is_the_name_that_is_expected() {
        assert_eq!(name_for("ca.mesh:15012").unwrap(), "ca.mesh");
        assert_eq!(name_for("10.0.0.1:15012").unwrap(), "10.0.0.1");
        assert_eq!(name_for("[fd00::1]:15012").unwrap(), "fd00::1");
    }

    #[test]
    fn an_address_without_host_or_port_is_refused_at_start() {
        for address in ["ca.mesh", ":15012", "", "ca mesh:1", "ca.mesh:x", "[]:1"] {
            assert!(name_for(address).is_err(), "{address}");
        }
    }

    #[test]
    fn a_token_never_shows_in_the_debug_form_of_a_request() {
        let mut value = MetadataValue::from_static("Bearer secret");
        value.set_sensitive(true);
        let mut request = Request::new(());
        request.metadata_mut().insert("authorization", value);
        assert!(!format!("{request:?}").contains("secret"));
    }
}
