//! A captured connection stays captured, whatever the process does to its socket later. What leaves
//! the pod is seen on the other end of its link.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::ffi::OsStrExt as _;

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};
use undermesh::capture::kernel::{CAPTURE_MARK, Family, Kernel, ListenerKind};
use undermesh::mesh::Mode;

use crate::fixture::{
    Fixture, LIMIT, PEER_V4, PEER_V6, SERVICE_V4, SERVICE_V6, accept, capture, counters, run,
    target, wait_until,
};

/// What the app says; nobody outside of the pod may hear it.
const SECRET: &[u8] = b"a secret of the application";
/// ETH_P_ALL, in network order.
const EVERYTHING: u16 = 0x0003_u16.to_be();

/// Everything that arrives at the peer's end of the pod's link.
struct Wire(Socket);

impl Wire {
    fn tap(fixture: &Fixture) -> Self {
        let socket = fixture.peer.enter(|| {
            let all = Protocol::from(i32::from(EVERYTHING));
            Socket::new(Domain::PACKET, Type::RAW.nonblocking(), Some(all)).unwrap()
        });
        socket.set_recv_buffer_size(1 << 20).unwrap();
        Self(socket)
    }

    /// Packets since the last call that hold these bytes.
    fn with(&self, bytes: &[u8]) -> usize {
        let mut found = 0;
        let mut packet = [0_u8; 4096];
        while let Ok(length) = (&self.0).read(&mut packet) {
            let packet = &packet[..length];
            found += usize::from(packet.windows(bytes.len()).any(|part| part == bytes));
        }
        found
    }
}

/// The Service's address as it stands in packets.
fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

struct Field {
    fixture: Fixture,
    kernel: Kernel,
    wire: Wire,
}

impl Field {
    /// A pod with a way out, and a mesh of the two Services.
    fn new() -> Self {
        let fixture = Fixture::new();
        let pod = fixture.pod.name.clone();
        run(&format!("ip -n {pod} route add default via {PEER_V4}"));
        run(&format!("ip -6 -n {pod} route add default via {PEER_V6}"));
        let kernel = fixture.load();
        let wire = Wire::tap(&fixture);
        // The control: who is not in the mesh is seen.
        for ip in services() {
            let socket = fixture.pod.enter(|| stream(ip));
            let _ = socket.connect_timeout(&SocketAddr::new(ip, 80).into(), LIMIT / 20);
            wait_until("the control is seen", || wire.with(&octets(ip)) > 0);
        }
        fixture.enrol(&kernel, Mode::Strict);
        capture(
            &kernel,
            &[target(SERVICE_V4, None), target(SERVICE_V6, None)],
        );
        Self {
            fixture,
            kernel,
            wire,
        }
    }

    fn listen(&self, ip: IpAddr) -> TcpListener {
        let family = if ip.is_ipv4() { Family::V4 } else { Family::V6 };
        self.fixture
            .listen(&self.kernel, family, ListenerKind::Outbound)
    }
}

impl Field {
    /// The control: without the hook, the mark goes.
    fn remove_hook(&self) {
        let pin = self.kernel.status().pins.join("link_setsockopt");
        std::fs::remove_file(pin).unwrap();
        let socket = self.fixture.pod.enter(|| stream(SERVICE_V4.into()));
        let agent = self.listen(SERVICE_V4.into());
        let to = SocketAddr::from((SERVICE_V4, 80));
        socket.connect_timeout(&to.into(), LIMIT).unwrap();
        wait_until("the program is off", || {
            socket.set_mark(0).unwrap();
            socket.mark().unwrap() == 0
        });
        drop(agent);
    }
}

fn services() -> [IpAddr; 2] {
    [SERVICE_V4.into(), SERVICE_V6.into()]
}

fn stream(ip: IpAddr) -> Socket {
    let domain = Domain::for_address(SocketAddr::new(ip, 80));
    Socket::new(domain, Type::STREAM, Some(Protocol::TCP)).unwrap()
}

type Dodge = fn(&Socket) -> io::Result<()>;

/// Everything that NET_RAW, or nothing at all, allows.
const DODGES: [(&str, Dodge); 4] = [
    ("no mark", |socket| socket.set_mark(0)),
    ("another mark", |socket| socket.set_mark(0x4000)),
    ("bound to the device", |socket| {
        socket.bind_device(Some(b"eth0"))
    }),
    ("both", |socket| {
        socket.bind_device(Some(b"eth0"))?;
        socket.set_mark(0)
    }),
];

#[test]
fn a_connection_that_stands_stays_with_the_agent_whatever_its_socket_is_told() {
    let field = Field::new();
    for ip in services() {
        let agent = field.listen(ip);
        for (name, dodge) in DODGES {
            let socket = field.fixture.pod.enter(|| stream(ip));
            socket
                .connect_timeout(&SocketAddr::new(ip, 80).into(), LIMIT)
                .unwrap();
            let (mut accepted, _) = accept(&agent);
            accepted.set_nonblocking(false).unwrap();
            accepted.set_read_timeout(Some(LIMIT)).unwrap();
            dodge(&socket).unwrap();
            let mut client = TcpStream::from(socket);
            client.write_all(SECRET).unwrap();
            let mut heard = vec![0; SECRET.len()];
            let result = accepted.read_exact(&mut heard);
            assert_eq!(field.wire.with(SECRET), 0, "{ip} {name}: it left the pod");
            result.unwrap_or_else(|error| panic!("{ip} {name}: {error}"));
            assert_eq!(heard, SECRET, "{ip} {name}");
            let mark = Socket::from(client).mark().unwrap();
            assert_ne!(mark & CAPTURE_MARK, 0, "{ip} {name}");
        }
    }
    // Three of the dodges take the mark off, in each family.
    assert_eq!(counters(&field.kernel)["mark_restored"], 6);

    field.remove_hook();
    let agent = field.listen(SERVICE_V4.into());
    let mut client = field.fixture.pod.connect((SERVICE_V4, 80)).unwrap();
    let _accepted = accept(&agent);
    let socket = Socket::from(client.try_clone().unwrap());
    socket.set_mark(0).unwrap();
    client.write_all(SECRET).unwrap();
    wait_until("it leaves the pod", || field.wire.with(SECRET) > 0);
}

#[test]
fn a_syn_that_is_sent_again_comes_to_the_agent_whatever_its_socket_was_told_meanwhile() {
    let field = Field::new();
    // A queue of one holds two, and the SYNs of the next are dropped. With cookies, a connection
    // would stand at the client before there is room for it.
    field.fixture.pod.sysctl("net.core.somaxconn=1");
    field.fixture.pod.sysctl("net.ipv4.tcp_syncookies=0");
    for ip in services() {
        let agent = field.listen(ip);
        let to = SocketAddr::new(ip, 80);
        let waiting: Vec<_> = (0..2)
            .map(|_| field.fixture.pod.connect(to).unwrap())
            .collect();
        let dodging: Vec<_> = DODGES
            .iter()
            .map(|(name, dodge)| {
                let socket = field.fixture.pod.enter(|| stream(ip));
                socket.set_nonblocking(true).unwrap();
                let error = socket.connect(&to.into()).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS), "{name}");
                dodge(&socket).unwrap();
                socket
            })
            .collect();
        // All come out at the agent once there is room, and none elsewhere.
        for _ in 0..waiting.len() + dodging.len() {
            let (accepted, _) = accept(&agent);
            assert_eq!(accepted.local_addr().unwrap(), to);
        }
        assert_eq!(field.wire.with(&octets(ip)), 0, "{ip}: a SYN left the pod");
        drop(dodging);
    }

    field.remove_hook();
    let _agent = field.listen(SERVICE_V4.into());
    let to = SocketAddr::from((SERVICE_V4, 80));
    let _waiting: Vec<_> = (0..2)
        .map(|_| field.fixture.pod.connect(to).unwrap())
        .collect();
    let socket = field.fixture.pod.enter(|| stream(to.ip()));
    socket.set_nonblocking(true).unwrap();
    let _ = socket.connect(&to.into());
    socket.set_mark(0).unwrap();
    wait_until("a SYN leaves the pod", || {
        field.wire.with(&octets(to.ip())) > 0
    });
}

#[test]
fn an_mptcp_socket_of_a_pod_cannot_change_its_mark_once_it_connects() {
    const MPTCP: i32 = 262;
    let field = Field::new();
    for ip in services() {
        let agent = field.listen(ip);
        let socket = field.fixture.pod.enter(|| {
            let domain = Domain::for_address(SocketAddr::new(ip, 80));
            Socket::new(domain, Type::STREAM, Some(Protocol::from(MPTCP))).unwrap()
        });
        // Before, it is the app's own business.
        socket.set_mark(7).unwrap();
        socket
            .connect_timeout(&SocketAddr::new(ip, 80).into(), LIMIT)
            .unwrap();
        let (mut accepted, _) = accept(&agent);
        accepted.set_nonblocking(false).unwrap();
        accepted.set_read_timeout(Some(LIMIT)).unwrap();
        let told = socket.set_mark(0);
        let mut client = TcpStream::from(socket);
        client.write_all(SECRET).unwrap();
        let mut heard = vec![0; SECRET.len()];
        let result = accepted.read_exact(&mut heard);
        assert_eq!(field.wire.with(SECRET), 0, "{ip}: it left the pod");
        result.unwrap();
        assert_eq!(told.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }
    assert_eq!(counters(&field.kernel)["mark_change_refused"], 2);
}

#[test]
fn marks_and_long_options_of_sockets_that_are_not_captured_are_the_apps_own() {
    let field = Field::new();
    let server = field.fixture.peer.bind(PEER_V4);
    let socket = field.fixture.pod.enter(|| stream(PEER_V4.into()));
    socket
        .connect_timeout(&server.local_addr().unwrap().into(), LIMIT)
        .unwrap();
    socket.set_mark(0x4000).unwrap();
    assert_eq!(socket.mark().unwrap(), 0x4000);
    socket.set_mark(0).unwrap();
    assert_eq!(socket.mark().unwrap(), 0);
    assert_eq!(counters(&field.kernel)["mark_restored"], 0);
    // Longer than the page that the hook is shown: the kernel takes it as it always did.
    let mut long = OsString::from("cubic");
    long.push(OsStr::from_bytes(&[0; 3 * 4096]));
    setsockopt(&socket, sockopt::TcpCongestion, &long).unwrap();
}
