//! The network as the requests of one pod see it.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::capture::{Capture, EnrolledPod};
use crate::http::HttpIo;
use crate::mesh::{ObjectName, Snapshot};
use crate::outbound::Outbound;
use crate::outbound::connect::{Failure, Upstream, Way};
use crate::outbound::destinations::EndpointId;
use crate::tunnel::TunnelIo;

/// What requests need of the network: all else in this folder does without kernel and sockets, and
/// is tested so.
pub(in crate::outbound) trait Network: Send + Sync + 'static {
    /// The way to an endpoint, if there is one and it is allowed.
    fn way(&self, snapshot: &Snapshot, endpoint: &EndpointId) -> Result<Way, Failure>;

    /// A request is about to be answered from there.
    fn reached(&self, way: &Way) {
        let _ = way;
    }

    /// Opens a connection, within this time.
    fn open(
        &self,
        way: &Way,
        service: Option<&ObjectName>,
        limit: Duration,
    ) -> impl Future<Output = Result<HttpIo, Failure>> + Send;
}

/// The network of an enrolled pod.
pub(in crate::outbound) struct PodNetwork {
    pub(in crate::outbound) outbound: Arc<Outbound>,
    pub(in crate::outbound) pod: Arc<EnrolledPod>,
    pub(in crate::outbound) capture: Arc<Capture>,
    /// The client, as servers are told of it.
    pub(in crate::outbound) peer: SocketAddr,
    /// Hears of the first endpoint that was reached.
    pub(in crate::outbound) reached: Mutex<Option<oneshot::Sender<Way>>>,
}

impl Network for PodNetwork {
    fn way(&self, snapshot: &Snapshot, endpoint: &EndpointId) -> Result<Way, Failure> {
        let dialer = &self.outbound.dialer;
        dialer.way(&self.pod, &self.capture, snapshot, endpoint)
    }

    fn reached(&self, way: &Way) {
        if let Some(first) = self.reached.lock().take() {
            // Nobody listens once the connection is over.
            let _ = first.send(way.clone());
        }
    }

    async fn open(
        &self,
        way: &Way,
        service: Option<&ObjectName>,
        limit: Duration,
    ) -> Result<HttpIo, Failure> {
        let dialer = &self.outbound.dialer;
        let upstream = dialer
            .open(&self.pod, &self.capture, way, self.peer, service, limit)
            .await?;
        Ok(match upstream {
            Upstream::Socket(stream) => stream.into(),
            Upstream::Tunnel(tunnel) => TunnelIo::new(tunnel.send, tunnel.receive).into(),
        })
    }
}
