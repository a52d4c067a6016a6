//! One request to the agent: to its admin endpoint, or its control socket.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, CONNECTION, CONTENT_TYPE, HOST};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use super::CliError;

/// How long connecting may take: the agent is on this node.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// How long the whole answer may take: longer than the agent gives itself.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest answer, in bytes.
const ANSWER_LIMIT: usize = 256 * 1_024 * 1_024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Json,
    Text,
}

/// What the agent said.
#[derive(Debug)]
pub(super) struct Answer {
    pub status: StatusCode,
    /// `x-total-count`: how much there is, where not everything is shown.
    pub total: Option<usize>,
    pub body: String,
}

impl Answer {
    pub fn into_error(self, path: &str) -> CliError {
        CliError::Status {
            path: path.to_owned(),
            status: self.status,
            body: self.body.trim().to_owned(),
        }
    }
}

/// Asks the admin endpoint for a path; any status is an answer.
pub(super) async fn get(admin: SocketAddr, path: &str, format: Format) -> Result<Answer, CliError> {
    let accept = match format {
        Format::Json => "application/json",
        Format::Text => "text/plain",
    };
    let request = Request::get(path)
        .header(HOST, admin.to_string())
        .header(ACCEPT, accept)
        .body(Full::default());
    let at = admin.to_string();
    ask(&at, TcpStream::connect(admin), request).await
}

/// Sends JSON to a path of the control socket; any status is an answer.
pub(super) async fn post(socket: &Path, path: &str, json: String) -> Result<Answer, CliError> {
    let request = Request::post(path)
        .header(HOST, "localhost")
        .header(CONTENT_TYPE, "application/json")
        .body(Full::from(json));
    let at = socket.display().to_string();
    ask(&at, UnixStream::connect(socket), request).await
}

async fn ask<S: AsyncRead + AsyncWrite + Unpin>(
    at: &str,
    connect: impl Future<Output = io::Result<S>>,
    request: http::Result<Request<Full<Bytes>>>,
) -> Result<Answer, CliError> {
    let timed_out = || CliError::TimedOut(at.to_owned());
    let stream = tokio::time::timeout(CONNECT_TIMEOUT, connect)
        .await
        .map_err(|_| timed_out())?
        .map_err(|source| CliError::Unreachable {
            at: at.to_owned(),
            source,
        })?;
    tokio::time::timeout(ANSWER_TIMEOUT, exchange(stream, request))
        .await
        .map_err(|_| timed_out())?
        .map_err(|source| CliError::Http {
            at: at.to_owned(),
            source,
        })
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    request: http::Result<Request<Full<Bytes>>>,
) -> Result<Answer, Box<dyn std::error::Error + Send + Sync>> {
    let mut request = request?;
    let close = http::HeaderValue::from_static("close");
    request.headers_mut().insert(CONNECTION, close);
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let exchange = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let total = response.headers().get("x-total-count");
        let total = total.and_then(|total| total.to_str().ok()?.parse().ok());
        let body = Limited::new(response.into_body(), ANSWER_LIMIT);
        let body = body.collect().await?.to_bytes();
        Ok(Answer {
            status,
            total,
            body: String::from_utf8(body.into())?,
        })
    };
    tokio::pin!(exchange);
    tokio::select! {
        answer = &mut exchange => answer,
        // The connection ends when its last byte is read, which may be before the answer is put
        // together; its error comes out at the exchange as well.
        _ = connection => exchange.await,
    }
}
