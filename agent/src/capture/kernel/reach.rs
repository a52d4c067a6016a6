//! Do the programs see the agent's own sockets? Only those of processes below the cgroup are seen,
//! and without them neither deliveries nor connections on one node are admitted.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd as _;

use socket2::{Domain, Socket, Type};
use undermesh_common::Intent;

use super::{FeatureStatus, Kernel, KernelError};
use crate::capture::sys;

/// The answer, by effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// A connection of ours was admitted.
    Seen,
    /// It was not: this process is not below the cgroup.
    Unseen,
    /// It could not be opened, for instance because lo is down.
    Unknown,
}

impl Reach {
    /// Opens a connection to itself, declared as admitted, and looks whether it is.
    pub(super) fn probe(kernel: &Kernel) -> Result<Self, KernelError> {
        let Ok((_listener, socket, address)) = sockets() else {
            return Ok(Self::Unknown);
        };
        let Ok(cookie) = sys::socket_cookie(socket.as_fd()) else {
            return Ok(Self::Unknown);
        };
        kernel.declare(socket.as_fd(), Intent::Admitted)?;
        if socket.connect(&address.into()).is_err() {
            return Ok(Self::Unknown);
        }
        let admitted = kernel.maps.admitted.entries()?;
        let seen = admitted
            .iter()
            .any(|(_, admission)| admission.socket_cookie == cookie);
        Ok(if seen { Self::Seen } else { Self::Unseen })
    }

    pub(super) fn feature(self) -> FeatureStatus {
        let (used, reason) = match self {
            Self::Seen => (true, "a connection of the agent's own was admitted at load"),
            Self::Unseen => (
                false,
                "the agent does not run below the cgroup of the programs: nothing it opens is admitted",
            ),
            Self::Unknown => (
                false,
                "the agent could not connect to itself over lo to find out",
            ),
        };
        FeatureStatus {
            name: "own_sockets_seen",
            used,
            reason,
        }
    }
}

fn sockets() -> io::Result<(TcpListener, Socket, SocketAddr)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    Ok((listener, socket, address))
}
