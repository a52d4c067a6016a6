//! `istio.v1.auth.IstioCertificateService`, the protocol between agent and CA: one unary call.
//! Messages and service are those of `security/v1alpha1/ca.proto` of istio/api; they are written
//! out here, so that no build needs `protoc`.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::Uri;
use http::uri::PathAndQuery;
use tonic::body::Body;
use tonic::client::GrpcService;
use tonic::codegen::{Body as HttpBody, BoxFuture, StdError};
use tonic::server::{NamedService, UnaryService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;
use tower_service::Service;

/// Full name of the service.
const SERVICE: &str = "istio.v1.auth.IstioCertificateService";
/// Path of its only method.
const CREATE_CERTIFICATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
/// Largest message either way, in bytes.
const MAX_MESSAGE: usize = 64 * 1024;
/// Key in the request's metadata by which a node's agent tells istiod for whom it asks.
pub(super) const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";

/// `IstioCertificateRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct CertificateRequest {
    /// PKCS #10, PEM.
    #[prost(string, tag = "1")]
    pub(super) csr: String,
    /// Validity that is asked for, in seconds; 0 leaves it to the CA.
    #[prost(int64, tag = "3")]
    pub(super) validity_duration: i64,
    /// Opaque to the protocol.
    #[prost(message, optional, tag = "4")]
    pub(super) metadata: Option<prost_types::Struct>,
}

/// `IstioCertificateResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct CertificateResponse {
    /// PEM certificates, the issued one first, the root last.
    #[prost(string, repeated, tag = "1")]
    pub(super) cert_chain: Vec<String>,
}

/// The call, over one HTTP/2 connection to `origin`.
pub(super) async fn create_certificate<T>(
    connection: T,
    origin: Uri,
    request: Request<CertificateRequest>,
) -> Result<CertificateResponse, Status>
where
    T: GrpcService<Body>,
    T::ResponseBody: HttpBody + Send + 'static,
    <T::ResponseBody as HttpBody>::Error: Into<StdError>,
{
    let mut client = tonic::client::Grpc::with_origin(connection, origin)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    client
        .ready()
        .await
        .map_err(|error| Status::unavailable(error.into().to_string()))?;
    let codec = ProstCodec::<CertificateRequest, CertificateResponse>::default();
    let path = PathAndQuery::from_static(CREATE_CERTIFICATE);
    Ok(client.unary(request, path, codec).await?.into_inner())
}

/// What a CA does when it is called.
pub(super) trait CreateCertificate: Send + Sync + 'static {
    /// Answers one request.
    fn create_certificate(
        &self,
        request: Request<CertificateRequest>,
    ) -> Result<CertificateResponse, Status>;
}

/// The service, as a tonic server mounts it.
pub(super) struct CertificateServer<T>(Arc<T>);

impl<T> CertificateServer<T> {
    pub(super) fn new(authority: Arc<T>) -> Self {
        Self(authority)
    }
}

impl<T> Clone for CertificateServer<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> NamedService for CertificateServer<T> {
    const NAME: &'static str = SERVICE;
}

impl<T: CreateCertificate> UnaryService<CertificateRequest> for CertificateServer<T> {
    type Response = CertificateResponse;
    type Future = std::future::Ready<Result<Response<CertificateResponse>, Status>>;

    fn call(&mut self, request: Request<CertificateRequest>) -> Self::Future {
        std::future::ready(self.0.create_certificate(request).map(Response::new))
    }
}

impl<T: CreateCertificate> Service<http::Request<Body>> for CertificateServer<T> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if request.uri().path() != CREATE_CERTIFICATE {
            let unknown = Status::unimplemented("only CreateCertificate is served").into_http();
            return Box::pin(std::future::ready(Ok(unknown)));
        }
        let service = self.clone();
        let answer: Pin<Box<dyn Future<Output = _> + Send>> = Box::pin(async move {
            let codec = ProstCodec::<CertificateResponse, CertificateRequest>::default();
            let mut grpc = tonic::server::Grpc::new(codec)
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(MAX_MESSAGE);
            Ok(grpc.unary(service, request).await)
        });
        answer
    }
}
