//! From the mesh, or from outside it, to a pod of this node: identify, authorize, deliver.

mod deliver;
mod gate;
mod http;
mod plaintext;
mod recognize;
mod talk;
mod tunnelled;

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::identity::Certificates;
use crate::mesh::SharedSnapshot;
use crate::telemetry::Telemetry;

pub use gate::{Caller, Open, Refused, RequestGate};
pub use http::HttpService;

/// Takes connections that arrive for pods of this node to the apps in them.
pub struct Inbound {
    pub(crate) snapshot: SharedSnapshot,
    pub(crate) certificates: Arc<Certificates>,
    pub(crate) telemetry: Arc<Telemetry>,
    /// Cancelled when the agent stops: tunnels then announce it and take no new streams.
    pub(crate) drain: CancellationToken,
    /// What serves clients that speak HTTP.
    pub(crate) http: HttpService,
}
