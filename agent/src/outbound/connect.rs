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
                // The way is by what is enrolled here; a pod that left meanwhile has no namespace.
                let admitted = Dial::Admitted {
                    destination: endpoint.address,
                    netns_cookie: enrolled.map_or(0, |destination| destination.netns_cookie()),
                };
                dial(pod, admitted, limit).await.map(Upstream::Socket)
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
                Err(_) => Err(std::io::Error::new(
                    std::io::ErrorKind::TimedOut,
                    format!("no answer within {limit:?} (does a NetworkPolicy block this port?)"),
                )),
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
        DialError::Misdirected(_) => FailureReason::PeerIdentity,
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

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::tunnel::Stage;

    fn peer() -> SocketAddr {
        "10.0.0.2:15008".parse().unwrap()
    }

    fn failed(source: io::Error) -> Failure {
        tunnel_failure(&TunnelError::Dial {
            address: peer(),
            source: Arc::new(source),
        })
    }

    #[test]
    fn a_destination_that_denied_is_not_gone_around() {
        let denied = tunnel_failure(&TunnelError::Refused { status: 401 });
        assert_eq!(denied.reason, FailureReason::Denied);
        assert!(!denied.may_go_elsewhere());
        let unavailable = tunnel_failure(&TunnelError::Refused { status: 503 });
        assert_eq!(unavailable.reason, FailureReason::TunnelRefused);
        assert!(unavailable.may_go_elsewhere());
    }

    #[test]
    fn what_an_endpoint_did_is_tried_elsewhere_under_its_own_reason() {
        for (failure, reason) in [
            (
                failed(io::ErrorKind::ConnectionRefused.into()),
                FailureReason::ConnectRefused,
            ),
            (
                failed(io::ErrorKind::TimedOut.into()),
                FailureReason::ConnectTimeout,
            ),
            (
                failed(io::ErrorKind::HostUnreachable.into()),
                FailureReason::Unreachable,
            ),
            (
                tunnel_failure(&TunnelError::Timeout {
                    address: peer(),
                    stage: Stage::Handshake,
                    after: Duration::from_secs(5),
                }),
                FailureReason::ConnectTimeout,
            ),
            (
                tunnel_failure(&TunnelError::Protocol { address: peer() }),
                FailureReason::Tls,
            ),
            (
                dial_failure(&DialError::Refused(peer())),
                FailureReason::ConnectRefused,
            ),
            (
                dial_failure(&DialError::Misdirected(peer())),
                FailureReason::PeerIdentity,
            ),
            (
                dial_failure(&DialError::NoSourcePort(peer())),
                FailureReason::NoSourcePort,
            ),
            (
                no_path(NoPath::PlaintextRefused, peer()),
                FailureReason::PlaintextRefused,
            ),
            (
                no_path(NoPath::NotEnrolled, peer()),
                FailureReason::NotEnrolled,
            ),
        ] {
            assert_eq!(failure.reason, reason, "{}", failure.detail);
            assert!(failure.may_go_elsewhere(), "{}", failure.detail);
        }
    }

    #[test]
    fn a_client_that_is_gone_or_has_no_room_is_no_fault_of_an_endpoint() {
        for (failure, reason) in [
            (dial_failure(&DialError::Gone), FailureReason::PodGone),
            (
                tunnel_failure(&TunnelError::SourceGone),
                FailureReason::PodGone,
            ),
            (
                tunnel_failure(&TunnelError::Saturated {
                    address: peer(),
                    bound: 32,
                }),
                FailureReason::Overload,
            ),
        ] {
            assert_eq!(failure.reason, reason, "{}", failure.detail);
            assert!(!failure.may_go_elsewhere(), "{}", failure.detail);
        }
    }

    #[test]
    fn a_refused_dial_is_told_once() {
        let refused = failed(DialError::Refused(peer()).into());
        assert_eq!(
            refused.detail,
            "cannot connect to 10.0.0.2:15008: 10.0.0.2:15008 refused the connection"
        );
    }
}
