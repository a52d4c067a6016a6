//! One attempt to reach one endpoint.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::timeout;

use super::path::{NoPath, Path, path};
use super::target::{Target, pod_of};
use super::{Load, Outbound};
use crate::capture::{Capture, Dial, DialError, EnrolledPod};
use crate::mesh::{Endpoint, Snapshot, SpiffeId, authorize};
use crate::telemetry::{Connection, FailureReason, Party, Security, error_chain};
use crate::tunnel::{self, ConnectRequest, TunnelError, TunnelKey, Tunnelled};

/// How long a connection waits for its identity's first certificate, as right after enrolment.
const FIRST_CERTIFICATE: Duration = Duration::from_secs(5);

/// The connection that looks for an endpoint.
pub(super) struct Origin<'a> {
    pub(super) peer: SocketAddr,
    pub(super) target: &'a Target,
    pub(super) connection: &'a Connection,
}

/// An endpoint that answered.
pub(super) struct Connected {
    pub(super) upstream: Upstream,
    pub(super) load: Load,
}

/// What leads to the endpoint.
pub(super) enum Upstream {
    Socket(TcpStream),
    Tunnel(Tunnelled),
}

/// Why an endpoint could not be reached.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) reason: FailureReason,
    pub(super) detail: String,
    elsewhere: bool,
}

impl Failure {
    pub(super) fn new(reason: FailureReason, detail: impl Into<String>) -> Self {
        Self {
            reason,
            detail: detail.into(),
            elsewhere: false,
        }
    }

    /// A failure of this endpoint, not of the connection: another may do better.
    fn of_endpoint(reason: FailureReason, detail: impl Into<String>) -> Self {
        Self {
            elsewhere: true,
            ..Self::new(reason, detail)
        }
    }

    pub(super) fn may_go_elsewhere(&self) -> bool {
        self.elsewhere
    }
}

impl Outbound {
    pub(super) async fn connect_to(
        &self,
        pod: &Arc<EnrolledPod>,
        capture: &Capture,
        snapshot: &Snapshot,
        origin: &Origin<'_>,
        endpoint: &Endpoint,
    ) -> Result<Upstream, Failure> {
        let client = pod.workload();
        let destination = pod_of(snapshot, endpoint);
        let enrolled = destination.and_then(|workload| capture.enrolled(&workload.uid));
        let config = snapshot.config();
        let way = path(
            &client,
            destination.map(AsRef::as_ref),
            enrolled.is_some(),
            config,
        );
        let way = way.map_err(|none| no_path(none, endpoint.address))?;
        origin.connection.update(|info| {
            info.destination = match destination {
                Some(workload) => Party::of(workload, endpoint.address),
                None => Party::unknown(endpoint.address),
            };
            info.security = match way {
                Path::SameNode => Security::SameNode,
                Path::Tunnel(_) => Security::MutualTls,
                Path::Plaintext => Security::Plaintext,
            };
        });
        let limit = config.connect_timeout;
        match way {
            Path::SameNode => {
                let mode = destination
                    .and_then(|workload| workload.mode())
                    .unwrap_or_default();
                authorize(mode, Some(&client.identity))
                    .map_err(|denied| Failure::new(FailureReason::Denied, denied.to_string()))?;
                dial(pod, Dial::Admitted(endpoint.address), limit)
                    .await
                    .map(Upstream::Socket)
            }
            Path::Plaintext => dial(pod, Dial::Direct(endpoint.address), limit)
                .await
                .map(Upstream::Socket),
            Path::Tunnel(identity) => self
                .tunnel(pod, identity, endpoint.address, origin, limit)
                .await
                .map(Upstream::Tunnel),
        }
    }

    async fn tunnel(
        &self,
        pod: &Arc<EnrolledPod>,
        identity: SpiffeId,
        endpoint: SocketAddr,
        origin: &Origin<'_>,
        limit: Duration,
    ) -> Result<Tunnelled, Failure> {
        self.close_tunnels_with(pod);
        let client = pod.workload();
        let certificate = self
            .certificates
            .ready(&client.identity, FIRST_CERTIFICATE)
            .await
            .map_err(|error| Failure::new(FailureReason::NoCertificate, error.to_string()))?;
        let key = TunnelKey {
            netns_cookie: pod.netns_cookie(),
            source: client.identity.clone(),
            destinations: Arc::new(BTreeSet::from([identity])),
            address: SocketAddr::new(endpoint.ip(), tunnel::HBONE_PORT),
        };
        let request = ConnectRequest {
            authority: endpoint,
            forwarded: Some((
                origin.peer,
                origin.target.service.as_ref().map(ToString::to_string),
            )),
            baggage: None,
            traceparent: None,
        };
        let dial = || async {
            match timeout(limit, pod.connect(Dial::Direct(key.address))).await {
                Ok(connected) => connected.map_err(std::io::Error::from),
                Err(_) => Err(std::io::ErrorKind::TimedOut.into()),
            }
        };
        self.pool
            .open(&key, certificate, request, dial)
            .await
            .map_err(|error| tunnel_failure(&error))
    }
}

async fn dial(pod: &EnrolledPod, dial: Dial, limit: Duration) -> Result<TcpStream, Failure> {
    match timeout(limit, pod.connect(dial)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(dial_failure(&error)),
        Err(_) => Err(Failure::of_endpoint(
            FailureReason::ConnectTimeout,
            format!("no answer within {limit:?}"),
        )),
    }
}

fn dial_failure(error: &DialError) -> Failure {
    let reason = match error {
        DialError::Refused(_) => FailureReason::ConnectRefused,
        DialError::Unreachable { .. } => FailureReason::Unreachable,
        DialError::NoSourcePort(_) => FailureReason::NoSourcePort,
        DialError::Gone => return Failure::new(FailureReason::PodGone, error.to_string()),
        DialError::Netns(_) | DialError::Kernel(_) | DialError::Io { .. } => {
            FailureReason::Internal
        }
    };
    Failure::of_endpoint(reason, error_chain(error))
}

fn no_path(none: NoPath, endpoint: SocketAddr) -> Failure {
    match none {
        NoPath::PlaintextRefused => Failure::of_endpoint(
            FailureReason::PlaintextRefused,
            format!("{endpoint} has no mesh identity and the client is STRICT"),
        ),
        NoPath::NotEnrolled => Failure::of_endpoint(
            FailureReason::NotEnrolled,
            format!("the pod at {endpoint} is not enrolled yet"),
        ),
    }
}

fn tunnel_failure(error: &TunnelError) -> Failure {
    let reason = match error {
        TunnelError::Dial { source, .. } => match source.kind() {
            std::io::ErrorKind::ConnectionRefused => FailureReason::ConnectRefused,
            std::io::ErrorKind::TimedOut => FailureReason::ConnectTimeout,
            _ => FailureReason::Unreachable,
        },
        TunnelError::Timeout { .. } => FailureReason::ConnectTimeout,
        TunnelError::Tls { .. } | TunnelError::Protocol { .. } => FailureReason::Tls,
        TunnelError::PeerCertificate { .. } | TunnelError::PeerIdentity { .. } => {
            FailureReason::PeerIdentity
        }
        // The destination's policy has spoken: another endpoint would be a way around it.
        TunnelError::Refused { status: 401 } => {
            return Failure::new(FailureReason::Denied, error.to_string());
        }
        TunnelError::Refused { .. } => FailureReason::TunnelRefused,
        TunnelError::Broken { .. } | TunnelError::Silent { .. } => FailureReason::TunnelLost,
        TunnelError::Saturated { .. } => {
            return Failure::new(FailureReason::Overload, error.to_string());
        }
        TunnelError::SourceGone => return Failure::new(FailureReason::PodGone, error.to_string()),
        TunnelError::Flood { .. } => FailureReason::Overload,
    };
    Failure::of_endpoint(reason, error_chain(error))
}
