//! Where a request to an app of this node is admitted or refused.

use std::net::SocketAddr;

use http::{StatusCode, request};

use crate::mesh::SpiffeId;
use crate::telemetry::ResponseFlag;

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// From its certificate; none if it came without one.
    pub identity: Option<SpiffeId>,
    /// Where its connection comes from. It proves nothing.
    pub address: SocketAddr,
}

/// The answer to a request that is not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused {
    /// Its status.
    pub status: StatusCode,
    /// Why.
    pub flag: ResponseFlag,
}

/// Decides about each request, after the connection itself was authorized and the head has passed
/// the guards: its target, host and lengths mean the same to everybody behind it.
pub trait RequestGate: Send + Sync {
    /// Called before the app is asked; it must not block.
    fn admit(&self, head: &request::Parts, caller: &Caller) -> Result<(), Refused>;
}

/// Admits every request.
#[derive(Debug, Clone, Copy, Default)]
pub struct Open;

impl RequestGate for Open {
    fn admit(&self, _: &request::Parts, _: &Caller) -> Result<(), Refused> {
        Ok(())
    }
}
