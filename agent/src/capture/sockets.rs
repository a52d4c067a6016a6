//! Every socket that the agent has inside a pod is made here, and listeners that another process
//! hands over are taken here.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use thiserror::Error;

use undermesh_common::keepalive;

use super::kernel::{Family, ListenerKind};
use super::{HBONE_PORT, sys};

/// How many connections may wait to be accepted. The pod's `net.core.somaxconn` (4096 by default)
/// limits it further; beyond it, SYNs are dropped and come again.
const BACKLOG: i32 = 4096;

const KEEPALIVE_IDLE: Duration = Duration::from_secs(keepalive::IDLE_SECONDS as u64);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(keepalive::INTERVAL_SECONDS as u64);
/// How long bytes may stay unacknowledged on a tunnel. Not on other connections: the kernel counts
/// a closed receive window too, and an app may stop reading for as long as it likes.
const TUNNEL_USER_TIMEOUT: Duration = Duration::from_secs(30);

/// The addresses of a pod, one of each family at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PodAddresses {
    /// IPv4.
    pub v4: Option<Ipv4Addr>,
    /// IPv6.
    pub v6: Option<Ipv6Addr>,
}

impl PodAddresses {
    /// Its address of a family.
    #[must_use]
    pub fn of(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.v4.map(IpAddr::V4),
            Family::V6 => self.v6.map(IpAddr::V6),
        }
    }

    /// Whether the address is one of them.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.of(family(address)) == Some(address)
    }

    /// The families that it has.
    pub fn families(&self) -> impl Iterator<Item = Family> + use<> {
        let both = [self.v4.map(|_| Family::V4), self.v6.map(|_| Family::V6)];
        both.into_iter().flatten()
    }
}

impl FromIterator<IpAddr> for PodAddresses {
    fn from_iter<T: IntoIterator<Item = IpAddr>>(addresses: T) -> Self {
        let mut found = Self::default();
        for address in addresses {
            match address {
                IpAddr::V4(address) => found.v4 = found.v4.or(Some(address)),
                IpAddr::V6(address) => found.v6 = found.v6.or(Some(address)),
            }
        }
        found
    }
}

/// Family of an address.
#[must_use]
pub fn family(address: IpAddr) -> Family {
    match address {
        IpAddr::V4(_) => Family::V4,
        IpAddr::V6(_) => Family::V6,
    }
}

/// The address with its v4-mapped form undone.
#[must_use]
pub fn unmapped(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// One of a pod's listeners.
#[derive(Debug)]
pub struct Listener {
    /// Its family.
    pub family: Family,
    /// What comes out of it.
    pub kind: ListenerKind,
    /// Not blocking, close-on-exec.
    pub socket: TcpListener,
}

/// Why a descriptor is not taken for a listener.
#[derive(Debug, Error)]
pub enum AdoptError {
    /// It does not listen.
    #[error("the descriptor does not listen")]
    NotListening,
    /// It lives elsewhere.
    #[error("the descriptor belongs to network namespace {found}, not {wanted}")]
    OtherNetns {
        /// Cookie of the pod's namespace.
        wanted: u64,
        /// Cookie of the descriptor's.
        found: u64,
    },
    /// It is of the other family.
    #[error("the descriptor is of another address family")]
    OtherFamily,
    /// It cannot be asked.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Listener {
    /// Opens a listener on any free port of loopback: only `sk_lookup` leads to it. To be called
    /// in the pod's namespace.
    pub fn open(family: Family, kind: ListenerKind) -> io::Result<Self> {
        let socket = new_socket(family)?;
        // Before bind: without it the SYN-ACK from a foreign address finds no route.
        set_transparent(&socket, family)?;
        let address: SocketAddr = match family {
            Family::V4 => (Ipv4Addr::LOCALHOST, 0).into(),
            Family::V6 => {
                socket.set_only_v6(true)?;
                (Ipv6Addr::LOCALHOST, 0).into()
            }
        };
        socket.bind(&address.into())?;
        // Connections have from their first moment what their listener has.
        prepare(&SockRef::from(&socket))?;
        socket.listen(BACKLOG)?;
        Ok(Self {
            family,
            kind,
            socket: socket.into(),
        })
    }

    /// Takes a listener that another process opened with [`Listener::open`] and handed over, with
    /// all that waits in its queue.
    pub fn adopt(
        descriptor: OwnedFd,
        family: Family,
        kind: ListenerKind,
        netns_cookie: u64,
    ) -> Result<Self, AdoptError> {
        let socket = Socket::from(descriptor);
        if !socket.is_listener()? {
            return Err(AdoptError::NotListening);
        }
        if socket.domain()? != domain(family) {
            return Err(AdoptError::OtherFamily);
        }
        let found = sys::netns_cookie(socket.as_fd())?;
        if found != netns_cookie {
            return Err(AdoptError::OtherNetns {
                wanted: netns_cookie,
                found,
            });
        }
        socket.set_cloexec(true)?;
        socket.set_nonblocking(true)?;
        prepare(&SockRef::from(&socket))?;
        Ok(Self {
            family,
            kind,
            socket: socket.into(),
        })
    }
}

/// A socket of the agent in a pod, before connect(2). To be called in the pod's namespace.
pub fn new_socket(family: Family) -> io::Result<Socket> {
    let kind = Type::STREAM.nonblocking();
    Socket::new(domain(family), kind, Some(Protocol::TCP))
}

/// Makes a socket end its connection with RST until [`close_in_order`](crate::relay::close_in_order), and notice a peer that is
/// gone. What a listener has of it, the connections have that come out of it.
pub fn prepare(socket: &SockRef<'_>) -> io::Result<()> {
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(KEEPALIVE_IDLE)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(keepalive::RETRIES),
    )
}

/// Binds a socket to the pod's own address; the kernel chooses the port at connect(2), so that
/// connections to different destinations may have the same. The connect hook does for it what [`prepare`] does
/// beside the reset.
pub fn bind_own(socket: &Socket, own: IpAddr, destination: SocketAddr) -> io::Result<()> {
    socket.set_linger(Some(Duration::ZERO))?;
    if destination.port() == HBONE_PORT {
        socket.set_tcp_user_timeout(Some(TUNNEL_USER_TIMEOUT))?;
    }
    setsockopt(socket, sockopt::IpBindAddressNoPort, &true)?;
    socket.bind(&SocketAddr::new(own, 0).into())
}

/// Binds a socket to the client's address, in the client's pod's stead. The connect hook marks it, and binds it to lo.
pub fn bind_as_client(socket: &Socket, client: SocketAddr) -> io::Result<()> {
    socket.set_linger(Some(Duration::ZERO))?;
    set_transparent(socket, family(client.ip()))?;
    // Deliveries to several ports of the app may have one source, and a server that binds its port
    // again need not wait for ours.
    socket.set_reuse_address(true)?;
    socket.bind(&client.into())
}

fn set_transparent(socket: &Socket, family: Family) -> io::Result<()> {
    match family {
        Family::V4 => socket.set_ip_transparent_v4(true),
        Family::V6 => socket.set_ip_transparent_v6(true),
    }
}

fn domain(family: Family) -> Domain {
    match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_listener_of_the_pods_own_namespace_and_family_is_adopted() {
        let listener = || Listener::open(Family::V4, ListenerKind::Inbound).unwrap();
        let cookie = sys::netns_cookie(listener().socket.as_fd()).unwrap();
        let adopt = |descriptor, family, cookie| {
            Listener::adopt(descriptor, family, ListenerKind::Inbound, cookie)
        };
        let first = listener();
        let address = first.socket.local_addr().unwrap();
        let adopted = adopt(first.socket.into(), Family::V4, cookie).unwrap();
        assert_eq!(adopted.socket.local_addr().unwrap(), address);
        assert!(address.ip().is_loopback());

        let error = adopt(listener().socket.into(), Family::V4, cookie + 1).unwrap_err();
        assert!(matches!(error, AdoptError::OtherNetns { .. }), "{error}");
        let error = adopt(listener().socket.into(), Family::V6, cookie).unwrap_err();
        assert!(matches!(error, AdoptError::OtherFamily), "{error}");
        let connected = new_socket(Family::V4).unwrap();
        let error = adopt(connected.into(), Family::V4, cookie).unwrap_err();
        assert!(matches!(error, AdoptError::NotListening), "{error}");
    }

    #[test]
    fn a_connection_has_from_its_listener_what_it_needs() {
        let own = Listener::open(Family::V4, ListenerKind::Inbound).unwrap();
        let cookie = sys::netns_cookie(own.socket.as_fd()).unwrap();
        let bare = new_socket(Family::V4).unwrap();
        bare.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())
            .unwrap();
        bare.listen(1).unwrap();
        let family = Family::V4;
        let adopted = Listener::adopt(bare.into(), family, ListenerKind::Inbound, cookie).unwrap();
        for listener in [own, adopted] {
            let address = listener.socket.local_addr().unwrap();
            listener.socket.set_nonblocking(false).unwrap();
            let _client = std::net::TcpStream::connect(address).unwrap();
            let (accepted, _) = listener.socket.accept().unwrap();
            let accepted = SockRef::from(&accepted);
            assert_eq!(accepted.linger().unwrap(), Some(Duration::ZERO));
            assert!(accepted.tcp_nodelay().unwrap());
            assert!(accepted.keepalive().unwrap());
            assert_eq!(accepted.tcp_keepalive_time().unwrap(), KEEPALIVE_IDLE);
            let interval = accepted.tcp_keepalive_interval().unwrap();
            assert_eq!(interval, KEEPALIVE_INTERVAL);
            let retries = accepted.tcp_keepalive_retries().unwrap();
            assert_eq!(retries, keepalive::RETRIES);
        }
    }

    #[test]
    fn a_pod_has_at_most_one_address_of_each_family() {
        let addresses: PodAddresses = ["10.0.0.5", "fd00::5", "10.0.0.6"]
            .into_iter()
            .map(|address| address.parse::<IpAddr>().unwrap())
            .collect();
        assert!(addresses.contains("10.0.0.5".parse().unwrap()));
        assert!(addresses.contains("fd00::5".parse().unwrap()));
        assert!(!addresses.contains("10.0.0.6".parse().unwrap()));
        assert_eq!(addresses.families().count(), 2);
    }

    #[test]
    fn a_mapped_address_is_told_as_what_it_is() {
        let mapped: SocketAddr = "[::ffff:10.0.0.5]:80".parse().unwrap();
        assert_eq!(unmapped(mapped), "10.0.0.5:80".parse().unwrap());
    }
}
