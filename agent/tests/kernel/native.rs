//! Connections that pass the mesh by.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use socket2::{Domain, Socket, Type};
use undermesh::capture::kernel::{DestinationClass, Family, Kernel, ListenerKind, NativeTraffic};
use undermesh::mesh::Mode;

use crate::fixture::{
    Fixture, PEER_V4, PEER_V6, POD_V4, SERVICE_V4, accept, capture, counters, run, target,
    wait_until,
};

fn traffic(kernel: &Kernel, fixture: &Fixture) -> BTreeMap<DestinationClass, NativeTraffic> {
    let all = kernel.native_traffic(fixture.netns_cookie);
    all.into_iter()
        .filter(|(_, traffic)| traffic.connections > 0)
        .collect()
}

#[test]
fn native_connections_are_counted_with_their_bytes_and_times_when_they_are_closed() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    assert!(kernel.native_traffic(fixture.netns_cookie).is_empty());
    fixture.enrol(&kernel, Mode::Strict);
    let _agent = fixture.listen(&kernel, Family::V4, ListenerKind::Outbound);
    capture(&kernel, &[target(SERVICE_V4, None)]);
    let own = fixture.pod.bind(POD_V4);
    const PAUSE: Duration = Duration::from_millis(50);
    for ip in [IpAddr::from(PEER_V4), PEER_V6.into()] {
        let server = fixture.peer.bind(ip);
        let mut client = fixture.pod.connect(server.local_addr().unwrap()).unwrap();
        let (mut accepted, _) = accept(&server);
        accepted.set_nonblocking(false).unwrap();
        accepted.write_all(&[1; 1000]).unwrap();
        client.read_exact(&mut [0; 1000]).unwrap();
        client.write_all(&[2; 300]).unwrap();
        accepted.read_exact(&mut [0; 300]).unwrap();
        // What is measured: the connection lasts at least so long.
        std::thread::sleep(PAUSE);
        drop(accepted);
        assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    }
    // Neither these two, to the mesh and to itself.
    drop(fixture.pod.connect((SERVICE_V4, 80)).unwrap());
    drop(fixture.pod.connect(own.local_addr().unwrap()).unwrap());
    let private = || {
        let all = traffic(&kernel, &fixture);
        all.get(&DestinationClass::Private)
            .copied()
            .unwrap_or_default()
    };
    wait_until("two connections are counted", || private().connections == 2);
    assert_eq!(traffic(&kernel, &fixture).len(), 1);
    let seen = private();
    // The kernel's counters include the byte that a FIN takes of the sequence.
    assert!((2000..=2002).contains(&seen.to_pod_bytes), "{seen:?}");
    assert!((600..=604).contains(&seen.from_pod_bytes), "{seen:?}");
    assert_eq!((seen.failed, seen.rtt_samples), (0, 2), "{seen:?}");
    assert!((1..1_000_000).contains(&seen.rtt_sum), "{seen:?}");
    let lasted = Duration::from_nanos(seen.duration_sum);
    assert!(lasted >= PAUSE * 2 && lasted < PAUSE * 200, "{lasted:?}");
    // Enrolled again, it goes on; un-enrolled, it is forgotten.
    fixture.enrol(&kernel, Mode::Permissive);
    assert_eq!(private().connections, 2);
    kernel.remove_pod(fixture.netns_cookie).unwrap();
    assert!(kernel.native_traffic(fixture.netns_cookie).is_empty());
}

#[test]
fn each_class_of_destinations_is_counted_apart() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Permissive);
    let mesh: IpAddr = "10.77.0.30".parse().unwrap();
    let node: IpAddr = "10.77.0.31".parse().unwrap();
    let own: IpAddr = "10.77.0.32".parse().unwrap();
    let there = [
        (DestinationClass::Mesh, mesh),
        (
            DestinationClass::LinkLocal,
            "169.254.169.254".parse().unwrap(),
        ),
        (DestinationClass::Node, node),
        (DestinationClass::Private, PEER_V6.into()),
        (DestinationClass::Public, "203.0.113.7".parse().unwrap()),
        (DestinationClass::Public, "2001:db8::7".parse().unwrap()),
    ];
    for (_, ip) in there.iter().filter(|(_, ip)| *ip != IpAddr::from(PEER_V6)) {
        let length = if ip.is_ipv4() { 32 } else { 128 };
        let (pod, peer) = (&fixture.pod.name, &fixture.peer.name);
        let nodad = if ip.is_ipv4() { "" } else { "nodad" };
        run(&format!(
            "ip -n {peer} addr add {ip}/{length} dev eth0 {nodad}"
        ));
        if !ip.to_string().starts_with("10.77") {
            run(&format!("ip -n {pod} route add {ip} dev eth0"));
        }
    }
    // A secondary address of the pod's own is not passing by.
    run(&format!(
        "ip -n {} addr add {own}/32 dev lo",
        fixture.pod.name
    ));
    kernel.set_node_addresses(&[node].into()).unwrap();
    // No agent listens: the mesh is passed by.
    capture(&kernel, &[target(mesh, None)]);
    let itself = fixture.pod.bind(own);
    drop(fixture.pod.connect(itself.local_addr().unwrap()).unwrap());
    for (_, ip) in there {
        let server = fixture.peer.bind(ip);
        drop(fixture.pod.connect(server.local_addr().unwrap()).unwrap());
        drop(accept(&server));
    }
    let classes = || -> Vec<(DestinationClass, u64)> {
        let all = traffic(&kernel, &fixture).into_iter();
        all.map(|(class, traffic)| (class, traffic.connections))
            .collect()
    };
    let expected = [
        (DestinationClass::Mesh, 1),
        (DestinationClass::LinkLocal, 1),
        (DestinationClass::Node, 1),
        (DestinationClass::Private, 1),
        (DestinationClass::Public, 2),
    ];
    wait_until("every class is counted", || classes() == expected);
    assert_eq!(counters(&kernel)["native_unwatched"], 0);
    // A node that has the address no longer.
    kernel.set_node_addresses(&[].into()).unwrap();
    let server = fixture.peer.bind(node);
    drop(fixture.pod.connect(server.local_addr().unwrap()).unwrap());
    wait_until("it counts in its range", || {
        classes().contains(&(DestinationClass::Private, 2))
    });
}

#[test]
fn a_connection_that_never_stands_counts_as_failed_and_its_syns_as_sent_again() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    let refused = fixture.pod.connect((PEER_V4, 1)).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    // Nobody answers: the SYN comes again after a second.
    run(&format!(
        "ip -n {} link set eth0 arp off",
        fixture.peer.name
    ));
    run(&format!(
        "ip -n {} neigh replace {PEER_V4} lladdr 02:00:00:00:00:99 dev eth0",
        fixture.pod.name
    ));
    let silent = fixture.pod.enter(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let to: SocketAddr = (PEER_V4, 2).into();
        socket.connect_timeout(&to.into(), Duration::from_millis(1500))
    });
    assert_eq!(silent.unwrap_err().kind(), io::ErrorKind::TimedOut);
    let seen = || {
        traffic(&kernel, &fixture)
            .get(&DestinationClass::Private)
            .copied()
    };
    wait_until("both are counted", || {
        seen().is_some_and(|seen| seen.connections == 2)
    });
    let seen = seen().unwrap();
    assert_eq!(seen.failed, 2, "{seen:?}");
    assert!(seen.retransmits >= 1, "{seen:?}");
    assert_eq!((seen.from_pod_bytes, seen.to_pod_bytes), (0, 0), "{seen:?}");
}

#[test]
fn a_socket_that_is_captured_after_a_native_connection_is_not_counted_again() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    let agent = fixture.listen(&kernel, Family::V4, ListenerKind::Outbound);
    capture(&kernel, &[target(SERVICE_V4, None)]);
    let server = fixture.peer.bind(PEER_V4);
    let native = server.local_addr().unwrap();
    let socket = fixture
        .pod
        .enter(|| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
    socket.connect(&native.into()).unwrap();
    drop(accept(&server));
    // AF_UNSPEC, and on to the mesh.
    rustix::net::connect_unspec(&socket).unwrap();
    socket
        .connect(&SocketAddr::from((SERVICE_V4, 80)).into())
        .unwrap();
    drop(accept(&agent));
    drop(socket);
    let closed = || {
        let all = traffic(&kernel, &fixture);
        all.values().map(|traffic| traffic.connections).sum::<u64>()
    };
    wait_until("the first is counted", || closed() == 1);
    // Another one passes after it: by then the captured one would be counted too.
    drop(fixture.pod.connect(native).unwrap());
    drop(accept(&server));
    wait_until("the next is counted", || closed() == 2);
}
