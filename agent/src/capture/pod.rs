//! A pod that is in the mesh, as the proxy sees it: whose connections they are, and how to open
//! connections in its network.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use socket2::Socket;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::accept::Role;
use super::backlog::{Backlog, Backlogs};
use super::counters::{Counters, Event};
use super::kernel::{Intent, Kernel, KernelError};
use super::netns::{Netns, NetnsError, NetnsWorker};
use super::ports::{Choice, SourcePorts};
use super::share::{Full, PodShare, Slot};
use super::sockets::{self, PodAddresses, unmapped};
use super::stock::{Stock, Taken};
use crate::mesh::Workload;

/// After so long, a delivery that nobody answered tries another port: its tuple may be that of a
/// real connection, which the app's answer then goes to.
const UNANSWERED: Duration = Duration::from_millis(200);
/// So many deliveries are given up like that; the next waits for as long as the caller likes,
/// since an app with a full queue does not answer either.
const UNANSWERED_TRIES: u32 = 3;
/// So many source ports are tried in all.
const PORT_TRIES: u32 = 64;
/// So many of them are preferred ones.
const PREFERRED_TRIES: u32 = 16;

/// What to connect to, and as whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dial {
    /// From the pod's address, over the network.
    Direct(SocketAddr),
    /// The same, and the destination pod's kernel side lets it through to the app: for connections
    /// that the agent has authorized, on its own node.
    Admitted {
        /// Address and port of the pod.
        destination: SocketAddr,
        /// Cookie of the pod's network namespace: it must be the one that lets the connection through. Its
        /// address may have gone to another pod, of which nobody told the agent yet.
        netns_cookie: u64,
    },
    /// To the pod's own app over lo, as if from the client.
    Deliver {
        /// The client as the app shall see it. The port is a hint only: the app sees another.
        source: SocketAddr,
        /// Address and port of the pod.
        destination: SocketAddr,
    },
}

/// Why a connection could not be opened.
#[derive(Debug, Error)]
pub enum DialError {
    /// The destination refused it (RST).
    #[error("{0} refused the connection")]
    Refused(SocketAddr),
    /// There is no way to the destination, or the pod has no address of its family.
    #[error("{destination} cannot be reached")]
    Unreachable {
        /// Where to.
        destination: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// The address is another pod's by now, or nobody's of the mesh: no byte was sent there.
    #[error("{0} does not belong to the pod any more that it was known for")]
    Misdirected(SocketAddr),
    /// All source ports that were tried are in use.
    #[error("no source port is free for {0}")]
    NoSourcePort(SocketAddr),
    /// The pod is not in the mesh any more.
    #[error("the pod is gone")]
    Gone,
    /// The pod's network namespace cannot be used.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The kernel side refused the socket's registration.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Anything else, at connect or before.
    #[error("cannot connect to {destination}")]
    Io {
        /// Where to.
        destination: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A pod that is in the mesh.
pub struct EnrolledPod {
    workload: ArcSwap<Workload>,
    cookie: u64,
    addresses: PodAddresses,
    /// Taken away when the pod is gone: what is open keeps the namespace alive.
    netns: ArcSwapOption<Netns>,
    kernel: Arc<Kernel>,
    worker: NetnsWorker,
    stock: Arc<Stock>,
    ports: SourcePorts,
    live: TaskTracker,
    share: Arc<PodShare>,
    refused: [AtomicU64; Full::ALL.len()],
    backlogs: Backlogs,
    leaving: CancellationToken,
    gone: CancellationToken,
    cut: CancellationToken,
    counters: Arc<Counters>,
    captured: AtomicU64,
}

/// Counts as one live connection of its pod until dropped.
#[derive(Debug)]
pub struct Tracked(#[allow(dead_code)] TaskTrackerToken);

impl fmt::Debug for EnrolledPod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EnrolledPod")
            .field("name", &self.workload.load().name)
            .field("netns_cookie", &self.cookie)
            .field("live", &self.live.len())
            .finish_non_exhaustive()
    }
}

impl From<DialError> for io::Error {
    /// Keeps the kind, and the whole error as its source.
    fn from(error: DialError) -> Self {
        let kind = match &error {
            DialError::Refused(_) => io::ErrorKind::ConnectionRefused,
            DialError::Unreachable { .. } | DialError::Misdirected(_) => {
                io::ErrorKind::HostUnreachable
            }
            DialError::NoSourcePort(_) => io::ErrorKind::AddrNotAvailable,
            DialError::Gone => io::ErrorKind::NotConnected,
            DialError::Netns(_) | DialError::Kernel(_) => io::ErrorKind::Other,
            DialError::Io { source, .. } => source.kind(),
        };
        Self::new(kind, error)
    }
}

/// What a pod is made of.
pub(super) struct PodParts {
    pub workload: Arc<Workload>,
    pub addresses: PodAddresses,
    pub netns: Arc<Netns>,
    pub kernel: Arc<Kernel>,
    pub worker: NetnsWorker,
    pub share: Arc<PodShare>,
    pub ports: SourcePorts,
    pub counters: Arc<Counters>,
}

impl EnrolledPod {
    /// The pod as the model knows it now.
    #[must_use]
    pub fn workload(&self) -> Arc<Workload> {
        self.workload.load_full()
    }

    /// Cookie of its network namespace.
    #[must_use]
    pub fn netns_cookie(&self) -> u64 {
        self.cookie
    }

    /// Its addresses that are enrolled.
    #[must_use]
    pub fn addresses(&self) -> PodAddresses {
        self.addresses
    }

    /// Cancelled when the pod begins to leave the mesh: connections may end as they like, and those
    /// that would never do so shall.
    #[must_use]
    pub fn leaving(&self) -> &CancellationToken {
        &self.leaving
    }

    /// Cancelled when the pod's connections must end now, with RST.
    #[must_use]
    pub fn gone(&self) -> &CancellationToken {
        &self.gone
    }

    /// Counts a live connection, which a drain waits for.
    #[must_use]
    pub fn track(&self) -> Tracked {
        Tracked(self.live.token())
    }

    /// As [`EnrolledPod::track`], for a connection that came inside a tunnel: not if there is no
    /// room for it.
    pub fn admit(&self) -> Result<(Tracked, Slot), Full> {
        Ok((self.track(), self.slot()?))
    }

    /// A place for one more connection; that there is none is counted.
    pub fn slot(&self) -> Result<Slot, Full> {
        self.share.take().inspect_err(|full| {
            self.refused[*full as usize].fetch_add(1, Ordering::Relaxed);
            self.counters.count(match full {
                Full::Pod => Event::PodFull,
                Full::Node => Event::NodeFull,
                Full::Memory => Event::MemoryShort,
            });
        })
    }

    /// How many connections found no place, for each reason.
    #[must_use]
    pub fn refused(&self) -> [(Full, u64); Full::ALL.len()] {
        Full::ALL.map(|full| (full, self.refused[full as usize].load(Ordering::Relaxed)))
    }

    /// The queues of its listeners.
    #[must_use]
    pub fn backlogs(&self) -> Vec<Backlog> {
        self.backlogs.read()
    }

    /// How many connections are live.
    #[must_use]
    pub fn live(&self) -> usize {
        self.live.len()
    }

    /// Opens a connection in the pod's network. It ends with RST until
    /// [`close_in_order`](crate::relay::close_in_order). How long that may take is the caller's
    /// business.
    pub async fn connect(&self, dial: Dial) -> Result<TcpStream, DialError> {
        tokio::select! {
            biased;
            () = self.gone.cancelled() => Err(DialError::Gone),
            result = self.dial(dial) => result,
        }
    }

    async fn dial(&self, dial: Dial) -> Result<TcpStream, DialError> {
        match dial {
            Dial::Direct(destination) => self.direct(unmapped(destination), Intent::Own).await,
            Dial::Admitted {
                destination,
                netns_cookie,
            } => {
                let destination = unmapped(destination);
                let stream = self.direct(destination, Intent::Admitted).await?;
                self.check_arrival(&stream, destination, netns_cookie)?;
                Ok(stream)
            }
            Dial::Deliver {
                source,
                destination,
            } => {
                self.deliver(source.ip().to_canonical(), unmapped(destination))
                    .await
            }
        }
    }

    async fn direct(
        &self,
        destination: SocketAddr,
        intent: Intent,
    ) -> Result<TcpStream, DialError> {
        let own = self.own(destination)?;
        let socket = self.socket(destination).await?;
        let failed = |error| dial_error(destination, error);
        sockets::bind_own(&socket, own, destination).map_err(failed)?;
        self.start(&socket, destination, intent)?;
        established(socket).await.map_err(failed)
    }

    /// The handshake is done, but with whom? The kernel side of the right pod noted that it let the SYN
    /// through; one that is not in the mesh notes nothing.
    fn check_arrival(
        &self,
        stream: &TcpStream,
        destination: SocketAddr,
        wanted: u64,
    ) -> Result<(), DialError> {
        // The own address leads nowhere else, and what a pod says to itself needs no admission.
        if self.addresses.contains(destination.ip()) {
            return Ok(());
        }
        let failed = |error| dial_error(destination, error);
        let source = unmapped(stream.local_addr().map_err(failed)?);
        if self.kernel.arrived_in(source, destination)? == Some(wanted) {
            return Ok(());
        }
        // The note ends with the connection, which the app may have reset already.
        match stream.take_error().map_err(failed)? {
            Some(error) => Err(failed(error)),
            None => Err(DialError::Misdirected(destination)),
        }
    }

    async fn deliver(
        &self,
        client: IpAddr,
        destination: SocketAddr,
    ) -> Result<TcpStream, DialError> {
        self.own(destination)?;
        if client.is_ipv4() != destination.is_ipv4() {
            return Err(DialError::Unreachable {
                destination,
                source: io::Error::from_raw_os_error(libc::EAFNOSUPPORT),
            });
        }
        let mut unanswered = 0;
        for tries in 0..PORT_TRIES {
            let choice = if tries < PREFERRED_TRIES {
                Choice::Preferred
            } else {
                Choice::Spare
            };
            let Some(port) = self.ports.choose(choice, client, destination) else {
                break;
            };
            let socket = self.socket(destination).await?;
            let source = SocketAddr::new(client, port);
            let started = sockets::bind_as_client(&socket, source, self.addresses)
                .map_err(|error| dial_error(destination, error))
                .and_then(|()| self.start(&socket, destination, Intent::Admitted));
            match started {
                Ok(()) => {}
                Err(DialError::NoSourcePort(_)) => {
                    self.counters.count(Event::DeliveryPortInUse);
                    continue;
                }
                Err(error) => return Err(error),
            }
            let answer = established(socket);
            let answer = if unanswered < UNANSWERED_TRIES {
                match timeout(UNANSWERED, answer).await {
                    Ok(answer) => answer,
                    Err(_) => {
                        unanswered += 1;
                        self.counters.count(Event::DeliveryUnanswered);
                        continue;
                    }
                }
            } else {
                answer.await
            };
            return answer.map_err(|error| dial_error(destination, error));
        }
        self.counters.count(Event::DeliveryWithoutPort);
        Err(DialError::NoSourcePort(destination))
    }

    /// The pod's address of the destination's family.
    fn own(&self, destination: SocketAddr) -> Result<IpAddr, DialError> {
        self.addresses
            .of(sockets::family(destination.ip()))
            .ok_or_else(|| DialError::Unreachable {
                destination,
                source: io::Error::from_raw_os_error(libc::EAFNOSUPPORT),
            })
    }

    async fn socket(&self, destination: SocketAddr) -> Result<Socket, DialError> {
        let family = sockets::family(destination.ip());
        let Taken { socket, batch } = self.stock.take(family, Instant::now());
        let netns = self.netns.load_full().ok_or(DialError::Gone)?;
        let made = match (socket, batch) {
            (Some(socket), None) => return Ok(socket),
            (Some(socket), Some(batch)) => {
                self.worker.submit(&netns, move || batch.make());
                return Ok(socket);
            }
            (None, Some(batch)) => {
                let make = move || batch.make_with_first();
                self.worker.run(&netns, make).await?
            }
            (None, None) => {
                // When it is this one's turn, what others asked for is there.
                let stock = self.stock.clone();
                let make = move || match stock.left(family) {
                    Some(socket) => Ok(socket),
                    None => sockets::new_socket(family),
                };
                self.worker.run(&netns, make).await?
            }
        };
        made.map_err(|error| dial_error(destination, error))
    }

    /// Sends the SYN. By the time connect(2) returns, the hooks have run: the kernel side need not
    /// know the socket any longer.
    fn start(
        &self,
        socket: &Socket,
        destination: SocketAddr,
        intent: Intent,
    ) -> Result<(), DialError> {
        let failed = |error| dial_error(destination, error);
        let _registration = self
            .kernel
            .register(socket.cookie().map_err(failed)?, intent)?;
        match socket.connect(&destination.into()) {
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(()),
            other => other.map_err(failed),
        }
    }
}

/// For the rest of capture.
impl EnrolledPod {
    pub(super) fn new(parts: PodParts) -> Self {
        Self {
            cookie: parts.netns.cookie(),
            workload: ArcSwap::new(parts.workload),
            addresses: parts.addresses,
            netns: ArcSwapOption::new(Some(parts.netns)),
            kernel: parts.kernel,
            worker: parts.worker,
            ports: parts.ports,
            live: TaskTracker::new(),
            stock: Stock::new(parts.share.clone(), parts.counters.clone()),
            share: parts.share,
            refused: Default::default(),
            backlogs: Backlogs::default(),
            gone: CancellationToken::new(),
            leaving: CancellationToken::new(),
            cut: CancellationToken::new(),
            counters: parts.counters,
            captured: AtomicU64::new(0),
        }
    }

    pub(super) fn set_workload(&self, workload: Arc<Workload>) {
        self.workload.store(workload);
    }

    /// Notes that a connection of the pod's programs came out.
    pub(super) fn captured(&self) {
        self.captured.fetch_add(1, Ordering::Relaxed);
    }

    /// How many did.
    pub(super) fn captured_count(&self) -> u64 {
        self.captured.load(Ordering::Relaxed)
    }

    pub(super) fn ports(&self) -> &SourcePorts {
        &self.ports
    }

    /// Has a listener of the pod's in [`EnrolledPod::backlogs`], as long as it is open.
    pub(super) fn watch_backlog(&self, role: Role, listener: &Arc<TcpListener>) {
        self.backlogs.watch(role, listener);
    }

    /// Cancelled when whatever still handles a connection of the pod is dropped.
    pub(super) fn cut(&self) -> &CancellationToken {
        &self.cut
    }

    /// Returns once no connection is live.
    pub(super) async fn idle(&self) {
        self.live.close();
        self.live.wait().await;
    }

    /// Closes sockets that nobody needs. To be called now and then.
    pub(super) fn tend(&self) {
        self.stock.tend();
    }

    /// Lets go of the namespace.
    pub(super) fn release(&self) {
        self.gone.cancel();
        self.cut.cancel();
        self.netns.store(None);
        self.stock.close();
    }
}

async fn established(socket: Socket) -> io::Result<TcpStream> {
    let stream = TcpStream::from_std(socket.into())?;
    stream.writable().await?;
    match stream.take_error()? {
        Some(error) => Err(error),
        None => Ok(stream),
    }
}

fn dial_error(destination: SocketAddr, source: io::Error) -> DialError {
    match source.raw_os_error() {
        Some(libc::ECONNREFUSED) => DialError::Refused(destination),
        Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ENETDOWN) => DialError::Unreachable {
            destination,
            source,
        },
        Some(libc::EADDRINUSE | libc::EADDRNOTAVAIL) => DialError::NoSourcePort(destination),
        _ => DialError::Io {
            destination,
            source,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_errno_has_its_meaning() {
        let to: SocketAddr = "10.0.0.1:80".parse().unwrap();
        let error = |errno| dial_error(to, io::Error::from_raw_os_error(errno));
        assert!(matches!(error(libc::ECONNREFUSED), DialError::Refused(_)));
        assert!(matches!(
            error(libc::EHOSTUNREACH),
            DialError::Unreachable { .. }
        ));
        for errno in [libc::EADDRINUSE, libc::EADDRNOTAVAIL] {
            assert!(matches!(error(errno), DialError::NoSourcePort(_)));
        }
        assert!(matches!(error(libc::ETIMEDOUT), DialError::Io { .. }));
    }
}
