//! One request to one upstream connection.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::{Body, Frame, SizeHint};
use thiserror::Error;

use super::body::BodyError;
use super::h1::{H1, H1Body};
use super::h2::{H2Body, H2Place};
use super::places::Crowded;
use super::replay::ReplayBody;
use super::upstreams::Upstreams;
use crate::resilience::{Failure, Outcome, Unsent};

/// Why a request provably never reached an application: it may be sent again, whatever it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NeverSent {
    /// REFUSED_STREAM (RFC 9113 §8.7).
    StreamRefused,
    /// GOAWAY with a last stream id below this one's.
    GoingAway,
    /// The connection had ended before a byte of the request was written.
    ClosedBeforeSent,
}

/// How sending a request failed.
#[derive(Debug, Error)]
pub enum SendError {
    /// It never left, or was provably not looked at.
    #[error("never sent: {0:?}")]
    NeverSent(NeverSent),
    /// There was no connection for it, and no more may be made.
    #[error("shed")]
    Crowded(#[from] Crowded),
    /// The connection or stream broke before an answer.
    #[error("the connection broke before an answer")]
    Reset(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The answer was not understood.
    #[error("the answer is malformed")]
    Malformed(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The client broke off the request's body, or another attempt took it over: nobody's failure.
    #[error("the request's body ended early")]
    BodyEnded(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl SendError {
    /// What it is for retries, ejection and breakers.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::NeverSent(NeverSent::StreamRefused) => Outcome::Unsent(Unsent::StreamRefused),
            Self::NeverSent(NeverSent::GoingAway | NeverSent::ClosedBeforeSent) => {
                Outcome::Unsent(Unsent::GoingAway)
            }
            Self::Crowded(_) => Outcome::Shed,
            Self::Reset(_) => Outcome::Failure(Failure::Reset),
            Self::Malformed(_) => Outcome::Failure(Failure::Malformed),
            Self::BodyEnded(_) => Outcome::Cancelled,
        }
    }
}

/// A request that was not answered.
pub struct Unanswered {
    /// Why.
    pub error: SendError,
    /// The request, if it never left and its connection [gives it back](Lease::gives_back).
    pub unsent: Option<Box<Request<ReplayBody>>>,
}

impl From<SendError> for Unanswered {
    fn from(error: SendError) -> Self {
        Self {
            error,
            unsent: None,
        }
    }
}

/// A place on an upstream connection for one request. Dropped unused, a HTTP/1 connection is reset.
pub struct Lease(pub(super) Kind);

pub(super) enum Kind {
    H1 {
        connection: Box<H1>,
        home: Arc<Upstreams>,
    },
    H2(H2Place),
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match &self.0 {
            Kind::H1 { .. } => "Lease(H1)",
            Kind::H2(_) => "Lease(H2)",
        })
    }
}

impl Lease {
    /// Whether others were served on this connection before: it may be just about to be closed.
    #[must_use]
    pub fn is_reused(&self) -> bool {
        match &self.0 {
            Kind::H1 { connection, .. } => connection.is_reused(),
            Kind::H2(place) => place.is_reused(),
        }
    }

    /// Sends a request, and waits for the head of its answer. Dropped before, it cancels: the
    /// connection (HTTP/1) or the stream (HTTP/2) is reset.
    ///
    /// A 101 answer carries the switched connection for [`super::serve_http`] in its extensions.
    pub async fn send(
        self,
        request: Request<ReplayBody>,
    ) -> Result<Response<UpstreamBody>, SendError> {
        let sent = self.send_or_return(request).await;
        sent.map_err(|unanswered| unanswered.error)
    }

    /// Whether a request that never left comes back ([`Lease::send_or_return`]). HTTP/2 keeps it.
    #[must_use]
    pub fn gives_back(&self) -> bool {
        matches!(self.0, Kind::H1 { .. })
    }

    /// [`Lease::send`], for who would send the request again if it never left.
    pub async fn send_or_return(
        self,
        request: Request<ReplayBody>,
    ) -> Result<Response<UpstreamBody>, Unanswered> {
        match self.0 {
            Kind::H1 { connection, home } => connection.send(home, request).await,
            Kind::H2(place) => Ok(place.send(request).await?),
        }
    }
}

/// The body of an upstream's answer. The connection serves the next request once it has ended;
/// dropped earlier, the connection or stream is reset.
pub struct UpstreamBody(pub(super) UpstreamBodyKind);

pub(super) enum UpstreamBodyKind {
    H1(H1Body),
    H2(H2Body),
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.get_mut().0 {
            UpstreamBodyKind::H1(body) => body.poll_frame(cx),
            UpstreamBodyKind::H2(body) => body.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            UpstreamBodyKind::H1(body) => body.is_end_stream(),
            UpstreamBodyKind::H2(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            UpstreamBodyKind::H1(body) => body.size_hint(),
            UpstreamBodyKind::H2(body) => body.size_hint(),
        }
    }
}
