//! Accept loops: what comes out of a pod's listeners, checked and handed to the proxy.

use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{SocketFlags, acceptfrom_with};
use serde::Serialize;
use socket2::SockRef;
use thiserror::Error;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;

use super::HBONE_PORT;
use super::backoff::Backoff;
use super::counters::{Counters, Event};
use super::kernel::{CAPTURE_MARK, ListenerKind};
use super::pod::EnrolledPod;
use super::probe::{self, ProbeDesk};
use super::sockets::{Listener, PodAddresses, unmapped};
use super::sys;
use crate::workers::{Spread, Workers};

/// How long accept(2) rests when the process or the node has no descriptor or no memory left.
const REST: Backoff = Backoff {
    first: Duration::from_millis(5),
    most: Duration::from_secs(1),
};

/// What a captured connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The pod opened it.
    Outbound,
    /// It comes from outside the pod, to one of its ports, without a tunnel.
    Inbound,
    /// It comes from outside the pod, to [`HBONE_PORT`].
    Hbone,
}

impl Role {
    /// Value of the label `listener`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
            Self::Hbone => "hbone",
        }
    }
}

impl From<ListenerKind> for Role {
    fn from(kind: ListenerKind) -> Self {
        match kind {
            ListenerKind::Outbound => Self::Outbound,
            ListenerKind::Inbound => Self::Inbound,
            ListenerKind::Hbone => Self::Hbone,
        }
    }
}

/// A captured connection.
#[derive(Debug)]
pub struct Accepted {
    /// Whose it is: proven by the namespace that it was accepted in.
    pub pod: Arc<EnrolledPod>,
    /// What it is.
    pub role: Role,
    /// It ends with RST until [`close_in_order`](crate::relay::close_in_order).
    pub stream: tokio::net::TcpStream,
    /// The client.
    pub peer: SocketAddr,
    /// The original destination.
    pub local: SocketAddr,
}

/// What the proxy does with captured connections.
pub trait Handler: Send + Sync + 'static {
    /// Takes a connection, on the worker that is to serve it. It is dropped when the pod is gone and it has not ended
    /// of itself.
    fn handle(&self, accepted: Accepted) -> Task;

    /// Lets what accepts the connections of one of a pod's listeners run as the pod's: taking connections is work that
    /// is done for it. Called on the worker that is to accept.
    fn accepting(&self, pod: &EnrolledPod, accepting: Task) -> Task {
        let _ = pod;
        accepting
    }
}

/// What runs on a worker.
pub type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What sets a connection up. It ends with what serves it from then on, or with nothing if it has ended already.
pub type Setup = Pin<Box<dyn Future<Output = Option<Task>> + Send>>;

/// A connection in two parts: to set it up takes several times the memory that it takes to serve it, and it idles for
/// much longer than it is set up. So the first part is gone when the second begins.
pub async fn in_parts(setup: Setup) {
    let serving = setup.await;
    if let Some(serving) = serving {
        serving.await;
    }
}

/// Why a connection does not belong to the listener that it came out of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RoleFault {
    /// An outbound connection that was not marked by our hook.
    #[error("an outbound connection without mark")]
    Unmarked,
    /// An inbound connection with our mark, which nothing from outside can carry.
    #[error("an inbound connection with mark")]
    Marked,
    /// An outbound connection that is not the pod's, or an inbound one that is.
    #[error("from an address that it cannot come from")]
    Peer,
    /// To the listener itself, or to an address that is not captured here.
    #[error("to an address that does not lead here")]
    Local,
}

/// Whether a connection may come out of a listener of this kind. `mark` is that of the accepted
/// socket, which is that of its SYN.
pub fn check(
    role: Role,
    mark: u32,
    peer: SocketAddr,
    local: SocketAddr,
    own: PodAddresses,
) -> Result<(), RoleFault> {
    let marked = mark & CAPTURE_MARK != 0;
    let from_pod = own.contains(peer.ip());
    let to_pod = own.contains(local.ip());
    match role {
        Role::Outbound if !marked => Err(RoleFault::Unmarked),
        Role::Outbound if !from_pod => Err(RoleFault::Peer),
        Role::Outbound if to_pod || local.ip().is_loopback() => Err(RoleFault::Local),
        Role::Inbound | Role::Hbone if marked => Err(RoleFault::Marked),
        Role::Inbound | Role::Hbone if from_pod || peer.ip().is_loopback() => Err(RoleFault::Peer),
        Role::Inbound | Role::Hbone if !to_pod => Err(RoleFault::Local),
        Role::Hbone if local.port() != HBONE_PORT => Err(RoleFault::Local),
        Role::Outbound | Role::Inbound | Role::Hbone => Ok(()),
    }
}

/// What all accept loops of a pod share.
#[derive(Clone)]
pub(super) struct Acceptor {
    pub pod: Arc<EnrolledPod>,
    pub handler: Arc<dyn Handler>,
    pub counters: Arc<Counters>,
    /// Who serve what is accepted.
    pub workers: Arc<Workers>,
    /// Where probe connections are reported.
    pub probes: Arc<ProbeDesk>,
    /// Cancelled once the loops may accept; until then connections wait in their queues.
    pub accepting: CancellationToken,
    /// Ends the loops and closes the listeners.
    pub stop: CancellationToken,
}

impl Acceptor {
    /// Starts the loop of one listener, on one of the workers. Fails where its runtime cannot serve the
    /// socket, which is closed when the loop has ended.
    pub fn start(
        &self,
        listener: Listener,
    ) -> io::Result<(tokio::task::JoinHandle<()>, Arc<TcpListener>)> {
        let role = listener.kind.into();
        let socket = Arc::new(listener.socket);
        let spread = self.workers.spread();
        let home = spread.home().clone();
        let listener = {
            let _home = home.enter();
            sys::watch_listener(socket.clone())?
        };
        self.pod.watch_backlog(role, &socket);
        let acceptor = self.clone();
        let running = home.spawn(async move {
            let (pod, handler) = (acceptor.pod.clone(), acceptor.handler.clone());
            let accepting = async move {
                tokio::select! {
                    () = acceptor.stop.cancelled() => {}
                    () = async {
                        acceptor.accepting.cancelled().await;
                        acceptor.serve(&listener, role, &spread).await;
                    } => {}
                }
            };
            handler.accepting(&pod, Box::pin(accepting)).await;
        });
        Ok((running, socket))
    }

    async fn serve(&self, listener: &AsyncFd<Arc<TcpListener>>, role: Role, spread: &Spread) {
        let mut failures = 0_u32;
        loop {
            let accepted = listener.async_io(Interest::READABLE, |socket| accept(socket));
            match accepted.await {
                Ok((stream, peer)) => {
                    failures = 0;
                    self.admit(stream, unmapped(peer), role, spread);
                }
                // The connection ended while it waited, or an error of the network is reported
                // here (accept(2)): the next may be sound.
                Err(error) if !is_exhaustion(&error) => {
                    self.counters.count(Event::EndedBeforeAccept);
                    // No error may make the loop spin without giving way to others.
                    tokio::task::yield_now().await;
                }
                Err(error) => {
                    failures = failures.saturating_add(1);
                    self.counters.count(Event::AcceptBackoff);
                    if failures == 1 {
                        tracing::warn!(pod = %self.pod.workload().name, %error, "accept rests");
                    }
                    tokio::time::sleep(REST.wait(failures, rand::random())).await;
                }
            }
        }
    }

    /// Checks a connection and hands it over. Whatever is dropped here is reset.
    fn admit(&self, stream: TcpStream, peer: SocketAddr, role: Role, spread: &Spread) {
        let Ok((local, mark)) = read(&stream) else {
            self.counters.count(Event::EndedBeforeAccept);
            return;
        };
        if let Err(fault) = check(role, mark, peer, local, self.pod.addresses()) {
            self.counters.count(Event::RoleMismatch);
            let pod = self.pod.workload();
            tracing::debug!(pod = %pod.name, ?role, %peer, %local, %fault, "reset");
            return;
        }
        if role == Role::Outbound && probe::is_target(local) {
            if !self.probes.came_out(peer, local) {
                self.counters.count(Event::StrayProbe);
            }
            return;
        }
        let Ok(slot) = self.pod.slot() else {
            return;
        };
        self.counters.count(Event::Accepted);
        let tuple = match role {
            Role::Outbound => {
                self.pod.captured();
                None
            }
            Role::Inbound | Role::Hbone => Some(self.pod.ports().take(peer, local)),
        };
        let pod = self.pod.clone();
        // A tunnel is no connection of the pod's, only those inside it are: one that idles in a
        // peer's pool must not hold up a drain.
        let tracked = (role != Role::Hbone).then(|| pod.track());
        let (handler, counters) = (self.handler.clone(), self.counters.clone());
        spread.spawn(async move {
            // Only now, so that the reactor of its worker and no other knows it.
            match tokio::net::TcpStream::from_std(stream) {
                Ok(stream) => {
                    let accepted = Accepted {
                        pod: pod.clone(),
                        role,
                        stream,
                        peer,
                        local,
                    };
                    tokio::select! {
                        () = handler.handle(accepted) => {}
                        () = pod.cut().cancelled() => {}
                    }
                }
                Err(error) => {
                    counters.count(Event::Unregistered);
                    tracing::debug!(pod = %pod.workload().name, %error, "reset");
                }
            }
            drop((slot, tuple, tracked));
        });
    }
}

/// accept4(2): closed on exec, and not blocking.
fn accept(listener: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (stream, peer) = acceptfrom_with(listener, flags)?;
    let peer = peer.ok_or(io::ErrorKind::NotConnected)?;
    Ok((stream.into(), SocketAddr::try_from(peer)?))
}

fn read(stream: &TcpStream) -> io::Result<(SocketAddr, u32)> {
    let mark = SockRef::from(stream).mark()?;
    Ok((unmapped(stream.local_addr()?), mark))
}

/// Whether the process or the node has no descriptor or no memory left.
pub(super) fn is_exhaustion(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accept_rests_for_want_of_descriptors_or_memory_of_process_or_system_only() {
        let rests = |errno| is_exhaustion(&io::Error::from_raw_os_error(errno));
        for errno in [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM] {
            assert!(rests(errno), "{errno}");
        }
        for errno in [libc::ECONNABORTED, libc::EPROTO, libc::EINTR] {
            assert!(!rests(errno), "{errno}");
        }
    }

    fn verdict(role: Role, mark: u32, peer: &str, local: &str) -> Result<(), RoleFault> {
        let own = ["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()]
            .into_iter()
            .collect();
        check(
            role,
            mark,
            peer.parse().unwrap(),
            local.parse().unwrap(),
            own,
        )
    }

    #[tokio::test]
    async fn what_set_a_connection_up_is_gone_when_it_is_served() {
        let set_up = Arc::new(());
        let held = Arc::downgrade(&set_up);
        let setup: Setup = Box::pin(async move {
            let _set_up = set_up;
            tokio::task::yield_now().await;
            let serving: Task = Box::pin(async move {
                tokio::task::yield_now().await;
                assert_eq!(held.strong_count(), 0);
            });
            Some(serving)
        });
        let both = in_parts(setup);
        assert!(size_of_val(&both) <= 64, "{} bytes", size_of_val(&both));
        both.await;
        in_parts(Box::pin(std::future::ready(None))).await;
    }

    #[test]
    fn an_outbound_connection_carries_the_mark_and_comes_from_the_pod() {
        let check = |mark, peer, local| verdict(Role::Outbound, mark, peer, local);
        assert_eq!(check(CAPTURE_MARK, "10.0.0.5:9", "10.96.0.1:80"), Ok(()));
        assert_eq!(
            check(CAPTURE_MARK | 1, "[fd00::5]:9", "[fd96::1]:80"),
            Ok(())
        );
        assert_eq!(
            check(1, "10.0.0.5:9", "10.96.0.1:80"),
            Err(RoleFault::Unmarked)
        );
        assert_eq!(
            check(CAPTURE_MARK, "10.0.0.6:9", "10.96.0.1:80"),
            Err(RoleFault::Peer)
        );
    }

    #[test]
    fn a_connection_to_the_listener_itself_is_no_outbound_connection() {
        for local in ["127.0.0.1:4242", "[::1]:4242", "10.0.0.5:80"] {
            assert_eq!(
                verdict(Role::Outbound, CAPTURE_MARK, "10.0.0.5:9", local),
                Err(RoleFault::Local)
            );
        }
    }

    #[test]
    fn an_inbound_connection_carries_no_mark_and_comes_from_elsewhere() {
        for (role, local) in [
            (Role::Inbound, "10.0.0.5:80"),
            (Role::Hbone, "10.0.0.5:15008"),
        ] {
            assert_eq!(verdict(role, 1, "10.0.0.6:9", local), Ok(()));
            assert_eq!(
                verdict(role, CAPTURE_MARK, "10.0.0.6:9", local),
                Err(RoleFault::Marked)
            );
            for peer in ["10.0.0.5:9", "127.0.0.1:9"] {
                assert_eq!(verdict(role, 0, peer, local), Err(RoleFault::Peer));
            }
            assert_eq!(
                verdict(role, 0, "10.0.0.6:9", "10.0.0.7:15008"),
                Err(RoleFault::Local)
            );
        }
    }

    #[test]
    fn only_the_tunnel_port_is_a_tunnel() {
        assert_eq!(
            verdict(Role::Hbone, 0, "10.0.0.6:9", "10.0.0.5:80"),
            Err(RoleFault::Local)
        );
    }
}
