//! Opening connections in a pod's network: its own over the wire, and deliveries to its app.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::time::Duration;

use socket2::Socket;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::EnrolledPod;
use crate::capture::counters::Event;
use crate::capture::kernel::{Intent, KernelError};
use crate::capture::netns::NetnsError;
use crate::capture::ports::Choice;
use crate::capture::sockets::{self, unmapped};
use crate::capture::stock::Taken;

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
    /// The kernel side refused to note whose socket it is.
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

impl EnrolledPod {
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
        let at_once = match intent {
            Intent::Own => AtOnce::No,
            Intent::Admitted | Intent::Delivery => answered(&socket, destination)?,
        };
        established(socket, at_once).await.map_err(failed)
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
            let started = sockets::bind_as_client(&socket, source)
                .map_err(|error| dial_error(destination, error))
                .and_then(|()| self.start(&socket, destination, Intent::Delivery));
            match started {
                Ok(()) => {}
                Err(DialError::NoSourcePort(_)) => {
                    self.counters.count(Event::DeliveryPortInUse);
                    continue;
                }
                Err(error) => return Err(error),
            }
            let at_once = answered(&socket, destination)?;
            let answer = established(socket, at_once);
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

    /// Sends the SYN, after the kernel side was told whose socket it is.
    fn start(
        &self,
        socket: &Socket,
        destination: SocketAddr,
        intent: Intent,
    ) -> Result<(), DialError> {
        let failed = |error| dial_error(destination, error);
        self.kernel.declare(socket.as_fd(), intent)?;
        match socket.connect(&destination.into()) {
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(()),
            other => other.map_err(failed),
        }
    }
}

/// Whether a connection was established by the time that connect(2) had sent its SYN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AtOnce {
    Yes,
    No,
}

/// Asks whether a connection to a socket of this machine is established already, as it mostly is: the SYN and its
/// answer pass through the kernel before connect(2) returns. Then nobody needs to wait to be told. A second
/// connect(2) says so (`__inet_stream_connect`, connect(2) under EALREADY), and runs no hook again.
fn answered(socket: &Socket, destination: SocketAddr) -> Result<AtOnce, DialError> {
    match socket.connect(&destination.into()) {
        Ok(()) => Ok(AtOnce::Yes),
        Err(error) => match error.raw_os_error() {
            Some(libc::EISCONN) => Ok(AtOnce::Yes),
            Some(libc::EALREADY | libc::EINPROGRESS) => Ok(AtOnce::No),
            _ => Err(dial_error(destination, error)),
        },
    }
}

async fn established(socket: Socket, at_once: AtOnce) -> io::Result<TcpStream> {
    let stream = TcpStream::from_std(socket.into())?;
    if at_once == AtOnce::Yes {
        return Ok(stream);
    }
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
    use std::net::Ipv4Addr;
    use std::time::Instant as Moment;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::capture::kernel::Family;

    fn listener(backlog: i32) -> (Socket, SocketAddr) {
        let listener = sockets::new_socket(Family::V4).unwrap();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        listener.bind(&address.into()).unwrap();
        listener.listen(backlog).unwrap();
        let address = listener.local_addr().unwrap().as_socket().unwrap();
        (listener, address)
    }

    /// A socket of which connect(2) has sent the SYN.
    fn begun(to: SocketAddr) -> Socket {
        let socket = sockets::new_socket(Family::V4).unwrap();
        let error = socket.connect(&to.into()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS));
        socket
    }

    /// What becomes of it: a busy machine may take a moment even for itself.
    fn answer(socket: &Socket, to: SocketAddr) -> Result<AtOnce, DialError> {
        let deadline = Moment::now() + Duration::from_secs(10);
        loop {
            match answered(socket, to) {
                Ok(AtOnce::No) if Moment::now() < deadline => std::thread::yield_now(),
                answer => return answer,
            }
        }
    }

    #[tokio::test]
    async fn a_connection_that_was_answered_carries_bytes_without_being_waited_for() {
        let (listener, to) = listener(1);
        let socket = begun(to);
        assert_eq!(answer(&socket, to).unwrap(), AtOnce::Yes);
        let mut near = established(socket, AtOnce::Yes).await.unwrap();
        let (far, _) = listener.accept().unwrap();
        far.set_nonblocking(true).unwrap();
        let mut far = TcpStream::from_std(far.into()).unwrap();
        near.write_all(b"there").await.unwrap();
        far.write_all(b"back!").await.unwrap();
        for stream in [&mut near, &mut far] {
            stream.read_exact(&mut [0; 5]).await.unwrap();
        }
    }

    #[test]
    fn a_refusal_is_known_as_one() {
        let (listener, to) = listener(1);
        drop(listener);
        let error = answer(&begun(to), to).unwrap_err();
        assert!(
            matches!(error, DialError::Refused(at) if at == to),
            "{error}"
        );
    }

    #[test]
    fn a_connection_that_nobody_answers_yet_is_waited_for() {
        let (_listener, to) = listener(0);
        // A queue of 0 takes one; the next one's SYN is dropped, and comes again in a second.
        let queued = begun(to);
        assert_eq!(answer(&queued, to).unwrap(), AtOnce::Yes);
        let unanswered = begun(to);
        assert_eq!(answered(&unanswered, to).unwrap(), AtOnce::No);
    }

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
