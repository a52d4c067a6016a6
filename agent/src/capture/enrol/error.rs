//! Why a pod is not in the mesh.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use crate::capture::forwarding::Forwards;
use crate::capture::kernel::KernelError;
use crate::capture::netns::NetnsError;
use crate::capture::network::NetworkError;
use crate::capture::probe::ProbeError;
use crate::capture::sysctl::SysctlError;

/// Why a pod is not in the mesh (yet).
#[derive(Debug, Error)]
pub enum EnrolError {
    /// It has no place here: waiting does not help by itself.
    #[error("refused: {0}")]
    Refused(String),
    /// STRICT promises what cannot be kept for what the pod forwards.
    #[error("refused: {0}: what the pod forwards for others would pass the mesh")]
    Forwards(Forwards),
    /// Its network namespace cannot be used.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// No device has an address that the pod should have.
    #[error("no device in the pod has the address {0}")]
    AddressMissing(IpAddr),
    /// The pod's processes are not below the cgroup that the programs are attached to.
    #[error("the pod's cgroup {pod} is not below {attached}: its connections would not be seen")]
    Cgroup {
        /// The pod's.
        pod: PathBuf,
        /// Where the programs are attached.
        attached: PathBuf,
    },
    /// Rules and routes.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Kernel settings.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// A listener could not be opened.
    #[error("cannot open a listener in the pod")]
    Listener(#[source] io::Error),
    /// Programs and maps.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// All is laid, but it has no effect.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// Nothing is accepted for want of descriptors or memory, so nothing can be proven.
    #[error("the agent is short of descriptors or memory")]
    Exhausted,
    /// It took longer than it may.
    #[error("not done within {0:?}")]
    Late(Duration),
}
