//! What a pod opens: captured, or left alone.

use std::collections::BTreeSet;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Socket, Type};
use undermesh::capture::kernel::{CAPTURE_MARK, Family, Intent, ListenerKind};
use undermesh::mesh::Mode;

use crate::fixture::{
    Fixture, LIMIT, PEER_V4, PEER_V6, POD_V4, POD_V6, SERVICE_V4, SERVICE_V6, accept, capture,
    counters, is_idle, target,
};

/// Much less than a SYN's first retransmission, after which a dropped connection is noticed.
const AT_ONCE: Duration = Duration::from_millis(500);

fn port(listener: &TcpListener) -> u16 {
    listener.local_addr().unwrap().port()
}

#[test]
fn the_verifier_accepts_all_programs_and_they_are_attached() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    assert!(!kernel.lookup_attached(fixture.netns_cookie));
    fixture.enrol(&kernel, Mode::Strict);
    assert!(kernel.lookup_attached(fixture.netns_cookie));
    let status = serde_json::to_value(kernel.status()).unwrap();
    let programs = status["programs"].as_array().unwrap();
    let names: Vec<_> = programs
        .iter()
        .map(|program| program["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        &names[..4],
        ["sock_ops", "setsockopt", "connect4", "connect6"]
    );
    assert_eq!(names.len(), 5);
    for program in programs {
        assert_ne!(program["attached"], "detached", "{program}");
        assert_ne!(program["program_id"], 0, "{program}");
    }
    kernel.detach_lookup(fixture.netns_cookie).unwrap();
    assert!(!kernel.lookup_attached(fixture.netns_cookie));
}

#[test]
fn a_captured_connection_reaches_the_listener_with_its_true_destination() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    capture(
        &kernel,
        &[target(SERVICE_V4, Some(80)), target(SERVICE_V6, None)],
    );
    let v4 = fixture.listen(&kernel, Family::V4, ListenerKind::Outbound);
    let v6 = fixture.listen(&kernel, Family::V6, ListenerKind::Outbound);
    let service_v4 = SocketAddr::from((SERVICE_V4, 80));
    let mapped = SocketAddr::from((SERVICE_V4.to_ipv6_mapped(), 80));
    let service_v6 = SocketAddr::from((SERVICE_V6, 8443));
    for (destination, listener, arrives_as, source) in [
        (service_v4, &v4, service_v4, IpAddr::from(POD_V4)),
        (mapped, &v4, service_v4, POD_V4.into()),
        (service_v6, &v6, service_v6, POD_V6.into()),
    ] {
        let mut client = fixture.pod.connect(destination).unwrap();
        assert_eq!(client.peer_addr().unwrap(), destination);
        let (mut accepted, peer) = accept(listener);
        assert_eq!(accepted.local_addr().unwrap(), arrives_as);
        assert_eq!(peer.ip(), source);
        assert_eq!(peer.port(), client.local_addr().unwrap().port());
        accepted.set_nonblocking(false).unwrap();
        client.write_all(b"hello").unwrap();
        let mut heard = [0; 5];
        accepted.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"hello");
    }
    let counters = counters(&kernel);
    assert_eq!(counters["connect_captured"], 3);
    assert_eq!(counters["lookup_outbound"], 3);
}

#[test]
fn what_is_not_mesh_is_untouched() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    let agent = fixture.listen(&kernel, Family::V4, ListenerKind::Outbound);
    let server = fixture.peer.bind(PEER_V4);
    let own = fixture.pod.bind(POD_V4);
    // Another port of an address with a mesh port, and the pod's own address, whatever the map says.
    capture(
        &kernel,
        &[
            target(PEER_V4, Some(port(&server).wrapping_add(1).max(1))),
            target(POD_V4, None),
        ],
    );
    let client = fixture.pod.connect((PEER_V4, port(&server))).unwrap();
    let (accepted, peer) = accept(&server);
    assert_eq!(peer, client.local_addr().unwrap());
    assert_eq!(accepted.local_addr().unwrap(), client.peer_addr().unwrap());
    assert_eq!(Socket::from(client).mark().unwrap(), 0);
    let client = fixture.pod.connect((POD_V4, port(&own))).unwrap();
    assert_eq!(accept(&own).1, client.local_addr().unwrap());
    let refused = fixture.pod.connect((PEER_V4, 1)).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    assert!(is_idle(&agent));
    let counters = counters(&kernel);
    assert_eq!(counters["connect_native"], 2);
    assert_eq!(counters["connect_own_address"], 1);
    assert_eq!(counters["lookup_self"], 1);
    assert_eq!(counters["connect_captured"], 0);
}

#[test]
fn each_of_many_connections_at_once_reports_its_own_destination() {
    const THREADS: u16 = 4;
    const EACH: u16 = 250;
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    let agent = fixture.listen(&kernel, Family::V4, ListenerKind::Outbound);
    capture(&kernel, &[target(SERVICE_V4, None)]);
    // Two connections may share a source port, as their destinations differ.
    let mut arrived = BTreeSet::new();
    let mut opened = BTreeSet::new();
    let (sender, receiver) = mpsc::channel();
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (sender, fixture) = (sender.clone(), &fixture);
            scope.spawn(move || {
                fixture.pod.enter(|| {
                    for port in 1 + thread * EACH..1 + (thread + 1) * EACH {
                        let client = TcpStream::connect((SERVICE_V4, port)).unwrap();
                        sender.send((port, client)).unwrap();
                    }
                });
            });
        }
        for _ in 0..THREADS * EACH {
            let (accepted, peer) = accept(&agent);
            arrived.insert((peer, accepted.local_addr().unwrap()));
        }
    });
    drop(sender);
    for (port, client) in receiver {
        let destination = SocketAddr::from((SERVICE_V4, port));
        opened.insert((client.local_addr().unwrap(), destination));
    }
    assert_eq!(arrived.len(), usize::from(THREADS * EACH));
    assert_eq!(arrived, opened);
}

#[test]
fn a_namespace_that_is_not_enrolled_is_untouched() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    let server = fixture.peer.bind(PEER_V6);
    capture(&kernel, &[target(PEER_V6, None)]);
    fixture.pod.connect((PEER_V6, port(&server))).unwrap();
    accept(&server);
    assert!(counters(&kernel).values().all(|count| *count == 0));
}

#[test]
fn udp_is_untouched() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    capture(&kernel, &[target(PEER_V4, None)]);
    let server = fixture
        .peer
        .enter(|| UdpSocket::bind((PEER_V4, 0)).unwrap());
    server.set_read_timeout(Some(LIMIT)).unwrap();
    let client = fixture.pod.enter(|| UdpSocket::bind((POD_V4, 0)).unwrap());
    client.set_read_timeout(Some(LIMIT)).unwrap();
    client.connect(server.local_addr().unwrap()).unwrap();
    client.send(b"question").unwrap();
    let mut buffer = [0; 16];
    let (length, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"question");
    assert_eq!(from, client.local_addr().unwrap());
    // The answer to a socket that is not connected passes sk_lookup.
    let unconnected = fixture.pod.enter(|| UdpSocket::bind((POD_V4, 0)).unwrap());
    unconnected.set_read_timeout(Some(LIMIT)).unwrap();
    server
        .send_to(b"answer", unconnected.local_addr().unwrap())
        .unwrap();
    let length = unconnected.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"answer");
    assert!(counters(&kernel).values().all(|count| *count == 0));
}

#[test]
fn the_agents_declared_socket_is_not_captured_and_keeps_its_marks() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    let agent = fixture.listen(&kernel, Family::V4, ListenerKind::Outbound);
    let server = fixture.peer.bind(PEER_V4);
    capture(&kernel, &[target(PEER_V4, None)]);
    let destination = server.local_addr().unwrap();
    let socket = fixture.pod.enter(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_mark(0x40).unwrap();
        socket
    });
    kernel.declare(socket.as_fd(), Intent::Own).unwrap();
    socket.connect(&destination.into()).unwrap();
    assert_eq!(accept(&server).0.local_addr().unwrap(), destination);
    assert_eq!(socket.mark().unwrap(), 0x40);
    assert!(is_idle(&agent));
    assert_eq!(counters(&kernel)["connect_own_socket"], 1);
    // What was declared is of that socket, not of its descriptor.
    drop(socket);
    let client = fixture.pod.connect(destination).unwrap();
    assert_eq!(accept(&agent).1, client.local_addr().unwrap());
    assert!(is_idle(&server));
}

#[test]
fn the_hook_gives_the_agents_sockets_their_options_and_no_others() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    for (peer, own) in [
        (IpAddr::from(PEER_V4), IpAddr::from(POD_V4)),
        (PEER_V6.into(), POD_V6.into()),
    ] {
        for (intent, server, mark, keepalive) in [
            (Intent::Own, fixture.peer.bind(peer), 0x40, true),
            (Intent::Admitted, fixture.peer.bind(peer), 0x40, true),
            (
                Intent::Delivery,
                fixture.pod.bind(own),
                0x40 | CAPTURE_MARK,
                false,
            ),
        ] {
            let destination = server.local_addr().unwrap();
            let socket = fixture.pod.enter(|| {
                let domain = Domain::for_address(destination);
                let socket = Socket::new(domain, Type::STREAM, None).unwrap();
                socket.set_mark(0x40).unwrap();
                socket
            });
            kernel.declare(socket.as_fd(), intent).unwrap();
            if intent == Intent::Delivery {
                // The client is the pod itself: over lo its own SYN-ACK would not find it.
                socket.bind(&SocketAddr::new(own, 0).into()).unwrap();
            }
            socket.connect_timeout(&destination.into(), LIMIT).unwrap();
            assert_eq!(socket.mark().unwrap(), mark, "{intent:?}");
            assert!(socket.tcp_nodelay().unwrap(), "{intent:?}");
            assert_eq!(socket.device().unwrap(), None, "{intent:?}");
            assert_eq!(socket.keepalive().unwrap(), keepalive, "{intent:?}");
            if keepalive {
                let seconds = Duration::from_secs;
                assert_eq!(socket.tcp_keepalive_time().unwrap(), seconds(30));
                assert_eq!(socket.tcp_keepalive_interval().unwrap(), seconds(10));
                assert_eq!(socket.tcp_keepalive_retries().unwrap(), 3);
            }
            accept(&server);
            // An app's socket is left as it is.
            let app = fixture.pod.connect(destination).unwrap();
            assert!(!app.nodelay().unwrap());
            accept(&server);
        }
    }
    assert_eq!(counters(&kernel)["connect_own_socket"], 6);
    assert_eq!(counters(&kernel)["connect_own_socket_failed"], 0);
}

#[test]
fn without_a_listener_a_strict_pod_is_refused_at_once() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    let v4 = fixture.peer.bind(PEER_V4);
    let v6 = fixture.peer.bind(PEER_V6);
    capture(&kernel, &[target(PEER_V4, None), target(PEER_V6, None)]);
    // The listener was there, and its process died.
    drop(fixture.listen(&kernel, Family::V4, ListenerKind::Outbound));
    drop(fixture.listen(&kernel, Family::V6, ListenerKind::Outbound));
    for server in [&v4, &v6] {
        let start = Instant::now();
        let error = fixture
            .pod
            .connect(server.local_addr().unwrap())
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
        assert!(is_idle(server));
    }
    assert_eq!(counters(&kernel)["connect_agent_gone_refused"], 2);
}

#[test]
fn without_a_listener_a_permissive_pod_goes_direct() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Permissive);
    let v4 = fixture.peer.bind(PEER_V4);
    let v6 = fixture.peer.bind(PEER_V6);
    capture(&kernel, &[target(PEER_V4, None), target(PEER_V6, None)]);
    // Only the listener of the packets' own family counts.
    let _other = fixture.listen(&kernel, Family::V4, ListenerKind::Inbound);
    for server in [&v4, &v6] {
        let client = fixture.pod.connect(server.local_addr().unwrap()).unwrap();
        assert_eq!(accept(server).1, client.local_addr().unwrap());
    }
    assert_eq!(counters(&kernel)["connect_agent_gone_passed"], 2);
}

#[test]
fn a_pod_without_an_address_of_the_family_is_not_captured_in_it() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    let mut record = fixture.record(Mode::Strict);
    record.v6 = None;
    kernel.put_pod(&record).unwrap();
    let _agent = fixture.listen(&kernel, Family::V6, ListenerKind::Outbound);
    let server = fixture.peer.bind(PEER_V6);
    capture(&kernel, &[target(PEER_V6, None)]);
    fixture.pod.connect(server.local_addr().unwrap()).unwrap();
    accept(&server);
    assert_eq!(counters(&kernel)["connect_family_absent"], 1);
}

#[test]
fn an_apps_own_mark_survives_beside_the_bit() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    let agent = fixture.listen(&kernel, Family::V4, ListenerKind::Outbound);
    capture(&kernel, &[target(SERVICE_V4, Some(80))]);
    let socket = fixture
        .pod
        .enter(|| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
    socket.set_mark(0x40).unwrap();
    let destination = SocketAddr::from((SERVICE_V4, 80));
    socket.connect(&destination.into()).unwrap();
    assert_eq!(socket.mark().unwrap(), 0x40 | CAPTURE_MARK);
    // The accepted socket inherits it: the agent's check of its role.
    let accepted = Socket::from(accept(&agent).0);
    assert_ne!(accepted.mark().unwrap() & CAPTURE_MARK, 0);
}

#[test]
fn a_mark_that_the_app_sets_itself_is_cleared_for_what_is_not_mesh() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    let agent = fixture.listen(&kernel, Family::V4, ListenerKind::Outbound);
    let server = fixture.peer.bind(PEER_V4);
    let socket = fixture
        .pod
        .enter(|| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
    socket.set_mark(0x40 | CAPTURE_MARK).unwrap();
    socket
        .connect(&server.local_addr().unwrap().into())
        .unwrap();
    assert_eq!(socket.mark().unwrap(), 0x40);
    accept(&server);
    assert!(is_idle(&agent));
}

#[test]
fn a_socket_that_was_captured_is_free_after_it_connects_elsewhere() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    let agent = fixture.listen(&kernel, Family::V4, ListenerKind::Outbound);
    let server = fixture.peer.bind(PEER_V4);
    capture(&kernel, &[target(SERVICE_V4, None)]);
    let client = fixture.pod.connect((SERVICE_V4, 80)).unwrap();
    accept(&agent);
    let socket = Socket::from(client);
    rustix::net::connect_unspec(&socket).unwrap();
    socket
        .connect(&server.local_addr().unwrap().into())
        .unwrap();
    assert_eq!(socket.mark().unwrap() & CAPTURE_MARK, 0);
    accept(&server);
    assert!(is_idle(&agent));
    assert_eq!(counters(&kernel)["mark_restored"], 0);
}

#[test]
fn a_socket_bound_to_the_device_is_captured_too() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    capture(
        &kernel,
        &[target(SERVICE_V4, None), target(SERVICE_V6, None)],
    );
    let v4 = fixture.listen(&kernel, Family::V4, ListenerKind::Outbound);
    let v6 = fixture.listen(&kernel, Family::V6, ListenerKind::Outbound);
    for (domain, destination, agent) in [
        (Domain::IPV4, SocketAddr::from((SERVICE_V4, 80)), &v4),
        (Domain::IPV6, SocketAddr::from((SERVICE_V6, 80)), &v6),
    ] {
        let socket = fixture
            .pod
            .enter(|| Socket::new(domain, Type::STREAM, None).unwrap());
        socket.bind_device(Some(b"eth0")).unwrap();
        socket.connect_timeout(&destination.into(), LIMIT).unwrap();
        let (accepted, peer) = accept(agent);
        assert_eq!(accepted.local_addr().unwrap(), destination);
        assert_eq!(Some(peer), socket.local_addr().unwrap().as_socket());
    }
    assert_eq!(counters(&kernel)["lookup_outbound"], 2);
}

#[test]
fn a_mark_changed_between_a_deferred_connect_and_the_syn_is_set_again() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    let agent = fixture.listen(&kernel, Family::V4, ListenerKind::Outbound);
    capture(&kernel, &[target(SERVICE_V4, None)]);
    fixture.pod.sysctl("net.ipv4.tcp_fastopen=5"); // client, and no cookie needed
    let destination = SocketAddr::from((SERVICE_V4, 80));
    let socket = fixture
        .pod
        .enter(|| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
    setsockopt(&socket, sockopt::TcpFastOpenConnect, &true).unwrap();
    socket.connect(&destination.into()).unwrap();
    assert_ne!(socket.mark().unwrap() & CAPTURE_MARK, 0);
    socket.set_mark(0).unwrap();
    let mut client = TcpStream::from(socket);
    client.write_all(b"late").unwrap();
    let (accepted, _) = accept(&agent);
    assert_eq!(accepted.local_addr().unwrap(), destination);
    assert_eq!(counters(&kernel)["mark_restored"], 1);
}
