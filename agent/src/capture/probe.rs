//! Proof by effect: a connection like any other of the pod's, to a destination that nobody has,
//! which must come out at the agent with that destination.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;
use socket2::SockRef;
use thiserror::Error;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::kernel::Family;
use super::netns::{Netns, NetnsError, NetnsWorker};
use super::sockets::{self, PodAddresses};
use crate::mesh::CaptureTarget;

/// From the ranges for documentation (RFC 5737 and RFC 3849): no Service and no pod has them.
const V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
const PORT: u16 = 15_009;

/// Over lo it takes microseconds; a busy machine gets more than it can need.
const LIMIT: Duration = Duration::from_secs(2);

/// Why a probe is no proof.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The connection could not be started.
    #[error("probe to {target}: cannot connect")]
    Connect {
        /// Where to.
        target: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// It got another address than the pod's.
    #[error("probe to {target}: went out from {found}, not from the pod's address")]
    Source {
        /// Where to.
        target: SocketAddr,
        /// Where from.
        found: IpAddr,
    },
    /// It did not come out at the agent.
    #[error("probe to {target}: did not come out at the agent within {limit:?}")]
    Lost {
        /// Where to.
        target: SocketAddr,
        /// How long was waited.
        limit: Duration,
    },
}

/// What a probe saw: a connection of the pod's, accepted by the agent with its true destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Proof {
    /// Where the pod connected from.
    pub source: SocketAddr,
    /// Where to, as both ends say.
    pub destination: SocketAddr,
}

/// Where a pod's accept loops and its probe meet. There is room for one probe, known by its source
/// port: a pod that connects to the probe's destination itself cannot get in its way.
#[derive(Default)]
pub(super) struct ProbeDesk(Mutex<Option<Expected>>);

struct Expected {
    port: u16,
    seen: oneshot::Sender<Proof>,
}

impl ProbeDesk {
    /// Takes a connection that came out with the probe's destination. Returns whether it was the
    /// one expected.
    pub(super) fn came_out(&self, source: SocketAddr, destination: SocketAddr) -> bool {
        let Some(expected) = self
            .0
            .lock()
            .take_if(|expected| expected.port == source.port())
        else {
            return false;
        };
        let proof = Proof {
            source,
            destination,
        };
        expected.seen.send(proof).is_ok()
    }

    fn expect(&self, port: u16) -> oneshot::Receiver<Proof> {
        let (seen, receiver) = oneshot::channel();
        *self.0.lock() = Some(Expected { port, seen });
        receiver
    }
}

/// The probe's destinations: captured in every enrolled pod.
pub(super) fn targets() -> [CaptureTarget; 2] {
    [V4.into(), V6.into()].map(|address| CaptureTarget {
        address,
        port: Some(PORT),
    })
}

/// Whether an original destination is a probe's.
pub(super) fn is_target(destination: SocketAddr) -> bool {
    [target(Family::V4), target(Family::V6)].contains(&destination)
}

fn target(family: Family) -> SocketAddr {
    match family {
        Family::V4 => (V4, PORT).into(),
        Family::V6 => (V6, PORT).into(),
    }
}

/// Connects as the pod's programs do: no address, no mark, not registered.
pub(super) async fn prove(
    netns: &Netns,
    worker: &NetnsWorker,
    family: Family,
    own: PodAddresses,
    desk: &ProbeDesk,
) -> Result<Proof, ProbeError> {
    let target = target(family);
    let failed = |source| ProbeError::Connect { target, source };
    let socket = worker
        .run(netns, move || sockets::new_socket(family))
        .await?
        .map_err(failed)?;
    sockets::prepare(&SockRef::from(&socket)).map_err(failed)?;
    // The port is fixed before connect(2), the address is left to the route.
    let any: IpAddr = match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    socket
        .bind(&SocketAddr::new(any, 0).into())
        .map_err(failed)?;
    let local = || {
        socket
            .local_addr()?
            .as_socket()
            .ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
    };
    let seen = desk.expect(local().map_err(failed)?.port());
    match socket.connect(&target.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(failed(error)),
        _ => {}
    }
    let source = local().map_err(failed)?;
    if !own.contains(source.ip()) {
        return Err(ProbeError::Source {
            target,
            found: source.ip(),
        });
    }
    match timeout(LIMIT, seen).await {
        Ok(Ok(proof)) if proof.source == source && proof.destination == target => Ok(proof),
        _ => Err(ProbeError::Lost {
            target,
            limit: LIMIT,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stranger_at_the_probes_destination_is_not_taken_for_the_probe() {
        let desk = ProbeDesk::default();
        let (probe, stranger) = (([10, 0, 0, 5], 1).into(), ([10, 0, 0, 5], 2).into());
        assert!(!desk.came_out(probe, target(Family::V4)));
        let mut seen = desk.expect(1);
        assert!(!desk.came_out(stranger, target(Family::V4)));
        assert!(desk.came_out(probe, target(Family::V4)));
        assert_eq!(seen.try_recv().unwrap().source, probe);
        assert!(!desk.came_out(probe, target(Family::V4)));
    }
}
