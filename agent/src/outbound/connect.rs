//! How one pod reaches one endpoint.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::timeout;

use super::destinations::EndpointId;
use super::path::{NoPath, Path, path};
use super::target::pod_of;
use crate::capture::{Capture, Dial, DialError, EnrolledPod};
use crate::identity::Certificates;
use crate::mesh::{ObjectName, Snapshot, SpiffeId, Workload, authorize};
use crate::resilience::{Outcome, Unsent};
use crate::telemetry::{FailureReason, Party, Security, error_chain};
use crate::tunnel::{self, ConnectRequest, Pool, TunnelError, TunnelKey, Tunnelled};
use crate::workers::WorkerId;

/// How long a connection waits for its identity's first certificate, as right after enrolment.
const FIRST_CERTIFICATE: Duration = Duration::from_secs(5);

/// Opens connections in the names of this node's pods.
pub(super) struct Dialer {
    certificates: Arc<Certificates>,
    tunnels: Arc<Pool>,
}

/// How an endpoint is reached, as decided before anything is dialled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Way {
    /// Where to.
    pub(super) endpoint: SocketAddr,
    /// By what.
    pub(super) path: Path,
    /// Who is there, where the mesh knows it.
    pub(super) workload: Option<Arc<Workload>>,
}

impl Way {
    /// The endpoint, for telemetry.
    pub(super) fn party(&self) -> Party {
        match &self.workload {
            Some(workload) => Party::of(workload, self.endpoint),
            None => Party::unknown(self.endpoint),
        }
    }

    /// Whether it stays so for as long as the snapshot does. Plaintext may not: the pod may be
    /// enrolled on this node at any moment.
    pub(super) fn is_lasting(&self) -> bool {
        self.path != Path::Plaintext
    }

    pub(super) fn security(&self) -> Security {
        match self.path {
            Path::SameNode => Security::SameNode,
            Path::Tunnel(_) => Security::MutualTls,
            Path::Plaintext => Security::Plaintext,
        }
    }
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
    pub(super) fn of_endpoint(reason: FailureReason, detail: impl Into<String>) -> Self {
        Self {
            elsewhere: true,
            ..Self::new(reason, detail)
        }
    }

    pub(super) fn may_go_elsewhere(&self) -> bool {
        self.elsewhere
    }

    /// What it says about the endpoint and its destination: nothing, where this side could not or
    /// would not do it.
    pub(super) fn outcome(&self) -> Outcome {
        match self.reason {
            FailureReason::ConnectTimeout => Outcome::Unsent(Unsent::ConnectTimeout),
            FailureReason::ConnectRefused
            | FailureReason::Unreachable
            | FailureReason::Tls
            | FailureReason::PeerIdentity
            | FailureReason::TunnelRefused
            | FailureReason::TunnelLost => Outcome::Unsent(Unsent::ConnectFailed),
            FailureReason::PodGone => Outcome::Cancelled,
            _ => Outcome::Shed,
        }
    }
}

impl Dialer {
    pub(super) fn new(certificates: Arc<Certificates>, tunnels: Arc<Pool>) -> Self {
        Self {
            certificates,
            tunnels,
        }
    }

    /// The way from a pod to an endpoint, if there is one and it is allowed.
    pub(super) fn way(
        &self,
        pod: &EnrolledPod,
        capture: &Capture,
        snapshot: &Snapshot,
        endpoint: &EndpointId,
    ) -> Result<Way, Failure> {
        let client = pod.workload();
        let destination = pod_of(snapshot, endpoint);
        let enrolled = destination.and_then(|workload| capture.enrolled(&workload.uid));
        let path = path(
            &client,
            destination.map(AsRef::as_ref),
            enrolled.is_some(),
            snapshot.config(),
        );
        let path = path.map_err(|none| no_path(none, endpoint.address))?;
        if path == Path::SameNode {
            let mode = destination
                .and_then(|workload| workload.mode())
                .unwrap_or_default();
            authorize(mode, Some(&client.identity))
                .map_err(|denied| Failure::new(FailureReason::Denied, denied.to_string()))?;
        }
        Ok(Way {
            endpoint: endpoint.address,
            path,
            workload: destination.cloned(),
        })
    }

    /// Opens a connection. `peer` and `service` say on whose behalf; `limit` is that of a TCP
    /// connect: where there is a tunnel, of ours to the peer and of the peer's to its app.
    pub(super) async fn open(
        &self,
        pod: &Arc<EnrolledPod>,
        capture: &Capture,
        way: &Way,
        peer: SocketAddr,
        service: Option<&ObjectName>,
        limit: Duration,
    ) -> Result<Upstream, Failure> {
        match &way.path {
            Path::SameNode => {
                // The way is by what is enrolled here; a pod that left meanwhile has no namespace.
                let there = way.workload.as_ref();
                let there = there.and_then(|workload| capture.enrolled(&workload.uid));
                let admitted = Dial::Admitted {
                    destination: way.endpoint,
                    netns_cookie: there.map_or(0, |destination| destination.netns_cookie()),
                };
                dial(pod, admitted, limit).await.map(Upstream::Socket)
            }
            Path::Plaintext => dial(pod, Dial::Direct(way.endpoint), limit)
                .await
                .map(Upstream::Socket),
            Path::Tunnel(identity) => {
                let request = ConnectRequest {
                    forwarded: Some((peer, service.map(ToString::to_string))),
                    answer_within: Some(limit),
                    ..ConnectRequest::new(way.endpoint)
                };
                self.tunnel(pod, identity.clone(), request, limit)
                    .await
                    .map(Upstream::Tunnel)
            }
        }
    }

    async fn tunnel(
        &self,
        pod: &Arc<EnrolledPod>,
        identity: SpiffeId,
        request: ConnectRequest,
        limit: Duration,
    ) -> Result<Tunnelled, Failure> {
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
            address: SocketAddr::new(request.authority.ip(), tunnel::HBONE_PORT),
            worker: WorkerId::current(),
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
        self.tunnels
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
    use crate::resilience::Verdict;
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
    fn only_what_an_endpoint_did_is_charged_to_it() {
        let charged = [
            FailureReason::ConnectRefused,
            FailureReason::ConnectTimeout,
            FailureReason::Unreachable,
            FailureReason::Tls,
            FailureReason::PeerIdentity,
            FailureReason::TunnelRefused,
            FailureReason::TunnelLost,
        ];
        for reason in FailureReason::ALL {
            let outcome = Failure::new(reason, "").outcome();
            let expected = charged.contains(&reason).then_some(Verdict::Bad);
            assert_eq!(outcome.of_endpoint(), expected, "{reason}");
            assert_eq!(outcome.of_destination(), expected, "{reason}");
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
