//! Bodies on their way downstream.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::HeaderMap;
use hyper::body::{Body, Frame, SizeHint};
use thiserror::Error;

use super::client::UpstreamBody;

/// Why a body did not come to its end. Passed on as a reset, never as an end; an HTTP/2 error code
/// in its sources goes with it.
#[derive(Debug, Error)]
pub enum BodyError {
    /// The client broke off its request's body, or went away.
    #[error("the client broke off the request's body")]
    Downstream(#[source] hyper::Error),
    /// The upstream connection broke, or ended before the body did.
    #[error("the upstream broke off the answer's body")]
    Upstream(#[source] hyper::Error),
    /// The upstream reset the stream (HTTP/2).
    #[error("the upstream reset the stream")]
    Reset(#[source] h2::Error),
    /// Another attempt took the request's body over.
    #[error("a later attempt sends this body")]
    Superseded,
    /// A body that is sent again is not all there any more.
    #[error("a part of the body is not kept any more")]
    NotKept,
    /// The mesh ended it: a timeout, a limit. The word is the reason.
    #[error("ended by the mesh: {0}")]
    Ended(&'static str),
}

/// How an answer's body ended, as far as the upstream and the client go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyEnd {
    /// All of it was handed to the client's connection.
    Complete,
    /// It broke off upstream, or the mesh ended it.
    Broken,
    /// The client did not take all of it.
    Abandoned,
}

/// Watches an answer's body go by: for outcomes, metrics and filters.
pub trait BodyWatch: Send {
    /// So many bytes go to the client now.
    fn data(&mut self, bytes: usize) {
        let _ = bytes;
    }

    /// The trailers, which may still be changed.
    fn trailers(&mut self, trailers: &mut HeaderMap) {
        let _ = trailers;
    }

    /// Called exactly once, also if the body is dropped.
    fn end(&mut self, end: BodyEnd);
}

/// The body of an answer to a client.
#[derive(Default)]
pub enum ProxyBody {
    /// None.
    #[default]
    Empty,
    /// Our own words.
    Fixed(Bytes),
    /// The upstream's.
    Upstream(Box<UpstreamBody>),
    /// The upstream's, or our own, with somebody who watches it.
    Watched(Box<Watched>),
    /// Anything else.
    Other(Pin<Box<dyn Body<Data = Bytes, Error = BodyError> + Send>>),
}

/// A body and its watch.
pub struct Watched {
    body: ProxyBody,
    watch: Box<dyn BodyWatch>,
    ended: bool,
}

impl ProxyBody {
    /// A body of these bytes.
    #[must_use]
    pub fn fixed(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        if bytes.is_empty() {
            Self::Empty
        } else {
            Self::Fixed(bytes)
        }
    }

    /// Somebody hears of all that goes by, and of the end. A body that is at its end already tells
    /// of it at once.
    #[must_use]
    pub fn watched(self, mut watch: Box<dyn BodyWatch>) -> Self {
        if self.is_end_stream() {
            watch.end(BodyEnd::Complete);
            return self;
        }
        Self::Watched(Box::new(Watched {
            body: self,
            watch,
            ended: false,
        }))
    }
}

impl From<UpstreamBody> for ProxyBody {
    fn from(body: UpstreamBody) -> Self {
        if body.is_end_stream() {
            Self::Empty
        } else {
            Self::Upstream(Box::new(body))
        }
    }
}

impl Watched {
    fn end(&mut self, end: BodyEnd) {
        if !std::mem::replace(&mut self.ended, true) {
            self.watch.end(end);
        }
    }

    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut next = std::task::ready!(Pin::new(&mut self.body).poll_frame(cx));
        match &mut next {
            None => self.end(BodyEnd::Complete),
            Some(Err(_)) => self.end(BodyEnd::Broken),
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.watch.data(data.len());
                } else if let Some(trailers) = frame.trailers_mut() {
                    self.watch.trailers(trailers);
                }
                // The one who polls does not come back for an end that it can see.
                if self.body.is_end_stream() {
                    self.end(BodyEnd::Complete);
                }
            }
        }
        Poll::Ready(next)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.end(BodyEnd::Abandoned);
    }
}

impl Body for ProxyBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        match this {
            Self::Empty => Poll::Ready(None),
            Self::Fixed(bytes) => {
                let bytes = std::mem::take(bytes);
                *this = Self::Empty;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Self::Upstream(body) => Pin::new(&mut **body).poll_frame(cx),
            Self::Watched(watched) => watched.poll_frame(cx),
            Self::Other(body) => body.as_mut().poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Fixed(_) => false,
            Self::Upstream(body) => body.is_end_stream(),
            Self::Watched(watched) => watched.body.is_end_stream(),
            Self::Other(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Fixed(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Upstream(body) => body.size_hint(),
            Self::Watched(watched) => watched.body.size_hint(),
            Self::Other(body) => body.size_hint(),
        }
    }
}
