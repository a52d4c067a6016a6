//! Proof by effect: a connection like any other of the pod's, to a destination that nobody has,
//! which must come out at the agent with that destination.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use serde::Serialize;
use socket2::SockRef;
use thiserror::Error;
use tokio::sync::mpsc;
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

/// How many probe connections may wait to be looked at. A pod that connects to the probe's
/// destination itself can fill it; then the probe is tried again.
pub(super) const SEEN: usize = 64;

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

/// Connects as the pod's programs do: no address, no mark, not registered. `seen` gets the peers
/// of the connections that came out at the agent with the probe's destination.
pub(super) async fn prove(
    netns: &Netns,
    worker: &NetnsWorker,
    family: Family,
    own: PodAddresses,
    seen: &mut mpsc::Receiver<SocketAddr>,
) -> Result<Proof, ProbeError> {
    let target = target(family);
    let failed = |source| ProbeError::Connect { target, source };
    let socket = worker
        .run(netns, move || sockets::new_socket(family))
        .await?
        .map_err(failed)?;
    sockets::prepare(&SockRef::from(&socket)).map_err(failed)?;
    while seen.try_recv().is_ok() {}
    match socket.connect(&target.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(failed(error)),
        _ => {}
    }
    let source = socket
        .local_addr()
        .ok()
        .and_then(|address| address.as_socket())
        .ok_or_else(|| failed(io::ErrorKind::AddrNotAvailable.into()))?;
    if !own.contains(source.ip()) {
        return Err(ProbeError::Source {
            target,
            found: source.ip(),
        });
    }
    let came_out = async {
        while let Some(peer) = seen.recv().await {
            if peer == source {
                return true;
            }
        }
        false
    };
    match timeout(LIMIT, came_out).await {
        Ok(true) => Ok(Proof {
            source,
            destination: target,
        }),
        Ok(false) | Err(_) => Err(ProbeError::Lost {
            target,
            limit: LIMIT,
        }),
    }
}
