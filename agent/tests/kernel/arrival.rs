//! What arrives in a pod: to the agent, to the app, or refused.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};
use undermesh::capture::kernel::{CAPTURE_MARK, Family, HBONE_PORT, Intent, Kernel, ListenerKind};
use undermesh::mesh::Mode;

use crate::fixture::{
    Fixture, LIMIT, Namespace, PEER_V4, PEER_V6, POD_V4, POD_V6, accept, counters, is_idle, run,
    wait_for,
};

/// Opens a connection as the agent does: declared before connect(2).
fn dial(kernel: &Kernel, from: &Namespace, destination: SocketAddr) -> io::Result<Socket> {
    let socket =
        from.enter(|| Socket::new(Domain::for_address(destination), Type::STREAM, None))?;
    kernel.declare(socket.as_fd(), Intent::Admitted).unwrap();
    socket.connect_timeout(&destination.into(), LIMIT)?;
    Ok(socket)
}

/// The same, to the app of the pod as if from this client.
fn deliver(
    kernel: &Kernel,
    pod: &Namespace,
    client: SocketAddr,
    destination: SocketAddr,
) -> io::Result<Socket> {
    let socket = pod.enter(|| Socket::new(Domain::for_address(destination), Type::STREAM, None))?;
    // One option does for both families.
    socket.set_ip_transparent_v4(true)?;
    socket.bind(&client.into())?;
    kernel.declare(socket.as_fd(), Intent::Delivery).unwrap();
    socket.connect_timeout(&destination.into(), LIMIT)?;
    Ok(socket)
}

#[test]
fn connections_from_outside_go_to_the_inbound_and_the_hbone_listener() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    for (family, pod) in [
        (Family::V4, IpAddr::from(POD_V4)),
        (Family::V6, IpAddr::from(POD_V6)),
    ] {
        let inbound = fixture.listen(&kernel, family, ListenerKind::Inbound);
        let hbone = fixture.listen(&kernel, family, ListenerKind::Hbone);
        let app = fixture.pod.bind(pod);
        let app_address = app.local_addr().unwrap();
        for (listener, destination) in [
            (&inbound, app_address),
            (&hbone, SocketAddr::from((pod, HBONE_PORT))),
        ] {
            let client = fixture.peer.connect(destination).unwrap();
            let (accepted, peer) = accept(listener);
            assert_eq!(peer, client.local_addr().unwrap());
            assert_eq!(accepted.local_addr().unwrap(), destination);
            assert_eq!(Socket::from(accepted).mark().unwrap() & CAPTURE_MARK, 0);
        }
        assert!(is_idle(&app));
    }
    let counters = counters(&kernel);
    assert_eq!(counters["lookup_inbound"], 2);
    assert_eq!(counters["lookup_hbone"], 2);
}

#[test]
fn without_listeners_a_strict_pod_refuses_and_a_permissive_one_serves() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    let app = fixture.pod.bind(POD_V4);
    let destination = app.local_addr().unwrap();
    fixture.enrol(&kernel, Mode::Strict);
    let error = fixture.peer.connect(destination).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    // The change of mode replaces the program without a moment between.
    fixture.enrol(&kernel, Mode::Permissive);
    let client = fixture.peer.connect(destination).unwrap();
    assert_eq!(accept(&app).1, client.local_addr().unwrap());
    // A tunnel is never the app's.
    let error = fixture.peer.connect((POD_V4, HBONE_PORT)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    let counters = counters(&kernel);
    assert_eq!(counters["lookup_no_listener_refused"], 2);
    assert_eq!(counters["lookup_no_listener_passed"], 1);
}

#[test]
fn an_admitted_connection_passes_to_the_app_and_any_other_does_not() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    let v4 = fixture.pod.bind(POD_V4);
    let v6 = fixture.pod.bind(POD_V6);
    let inbound = [Family::V4, Family::V6]
        .map(|family| fixture.listen(&kernel, family, ListenerKind::Inbound));
    for (app, inbound) in [&v4, &v6].into_iter().zip(&inbound) {
        let destination = app.local_addr().unwrap();
        let admitted = dial(&kernel, &fixture.peer, destination).unwrap();
        let source = admitted.local_addr().unwrap().as_socket().unwrap();
        let (mut accepted, peer) = accept(app);
        assert_eq!(peer, source);
        accepted.write_all(b"native").unwrap();
        let mut heard = [0; 6];
        (&admitted).read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"native");
        // The same from the same namespace, unregistered, comes out at the agent.
        let other = fixture.peer.connect(destination).unwrap();
        assert_eq!(accept(inbound).1, other.local_addr().unwrap());
        assert!(is_idle(app));
    }
    wait_for(&kernel, "tuple_admitted", 2);
    wait_for(&kernel, "tuple_removed", 2);
    assert_eq!(counters(&kernel)["lookup_admitted"], 2);
    let admitted = kernel.status();
    let admitted = admitted.maps.iter().find(|map| map.name == "ADMITTED");
    assert_eq!(admitted.unwrap().entries, Some(0));
}

#[test]
fn a_connection_that_fails_leaves_no_admission() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    let error = dial(&kernel, &fixture.peer, (POD_V4, 1).into()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    wait_for(&kernel, "tuple_admitted", 1);
    wait_for(&kernel, "tuple_removed", 1);
}

#[test]
fn the_agent_delivers_over_lo_with_the_clients_address() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    for (app, client) in [
        (fixture.pod.bind(POD_V4), SocketAddr::from((PEER_V4, 2000))),
        (fixture.pod.bind(POD_V6), SocketAddr::from((PEER_V6, 2000))),
    ] {
        let destination = app.local_addr().unwrap();
        let delivery = deliver(&kernel, &fixture.pod, client, destination).unwrap();
        assert_ne!(delivery.mark().unwrap() & CAPTURE_MARK, 0);
        assert_eq!(delivery.device().unwrap().as_deref(), Some(&b"lo"[..]));
        let (mut accepted, peer) = accept(&app);
        assert_eq!(peer, client);
        accepted.write_all(b"reply").unwrap();
        let mut heard = [0; 5];
        (&delivery).read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"reply");
        // Nobody listens: the app's refusal comes back over lo, at once.
        let start = Instant::now();
        let closed = SocketAddr::new(destination.ip(), 1);
        let client = SocketAddr::new(client.ip(), 2001);
        let error = deliver(&kernel, &fixture.pod, client, closed).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert!(start.elapsed() < Duration::from_millis(500));
    }
    assert_eq!(counters(&kernel)["lookup_admitted"], 4);
}

#[test]
fn the_tuple_of_a_delivery_does_not_admit_a_stranger_from_the_network() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    let app = fixture.pod.bind(POD_V4);
    let destination = app.local_addr().unwrap();
    let inbound = fixture.listen(&kernel, Family::V4, ListenerKind::Inbound);
    let client = SocketAddr::from((PEER_V4, 2002));
    // Its SYN is lost, so that the admission stands and no connection has the tuple.
    run(&format!("ip -n {} link set lo down", fixture.pod.name));
    let delivery = fixture
        .pod
        .enter(|| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
    delivery.set_ip_transparent_v4(true).unwrap();
    // Not bound to lo, which would keep the SYN from being sent.
    delivery.set_mark(CAPTURE_MARK).unwrap();
    delivery.set_nonblocking(true).unwrap();
    delivery.bind(&client.into()).unwrap();
    kernel.declare(delivery.as_fd(), Intent::Admitted).unwrap();
    let _ = delivery.connect(&destination.into());
    wait_for(&kernel, "tuple_admitted", 1);
    let stranger = fixture
        .peer
        .enter(|| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
    stranger.bind(&client.into()).unwrap();
    stranger
        .connect_timeout(&destination.into(), LIMIT)
        .unwrap();
    assert_eq!(accept(&inbound).1, client);
    assert!(is_idle(&app));
    assert_eq!(counters(&kernel)["lookup_admitted"], 0);
    drop(delivery);
    wait_for(&kernel, "tuple_removed", 1);
}

#[test]
fn a_process_of_the_pod_that_poses_as_another_is_refused() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Permissive);
    for (pod, peer) in [
        (IpAddr::from(POD_V4), IpAddr::from(PEER_V4)),
        (POD_V6.into(), PEER_V6.into()),
    ] {
        let app = fixture.pod.bind(pod);
        let destination = app.local_addr().unwrap();
        let socket = fixture
            .pod
            .enter(|| Socket::new(Domain::for_address(destination), Type::STREAM, None).unwrap());
        // Anybody may, and one option does for both families.
        socket.set_freebind_v4(true).unwrap();
        socket.bind(&SocketAddr::new(peer, 2003).into()).unwrap();
        let error = socket.connect(&destination.into()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert!(is_idle(&app));
    }
    assert_eq!(counters(&kernel)["connect_foreign_source_refused"], 2);
}

#[test]
fn a_foreign_source_on_lo_that_nobody_admitted_is_refused() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    // Without the pod map the connect hook sees nothing, as with a socket from elsewhere.
    kernel
        .attach_lookup(fixture.pod.file.as_fd(), &fixture.record(Mode::Permissive))
        .unwrap();
    let app = fixture.pod.bind(POD_V4);
    let socket = fixture
        .pod
        .enter(|| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
    socket.set_ip_transparent_v4(true).unwrap();
    socket.set_mark(CAPTURE_MARK).unwrap(); // else the answer leaves by eth0
    // Without this its packets show the interface of the address, in IPv4 too.
    socket.bind_device(Some(b"lo")).unwrap();
    socket
        .bind(&SocketAddr::from((PEER_V4, 2004)).into())
        .unwrap();
    let error = socket.connect_timeout(&app.local_addr().unwrap().into(), LIMIT);
    assert_eq!(error.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    assert!(is_idle(&app));
    assert_eq!(counters(&kernel)["lookup_foreign_source_refused"], 1);
}

#[test]
fn an_address_that_the_mesh_does_not_know_is_refused_or_passed_by_mode() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    let secondary: IpAddr = "10.77.0.3".parse().unwrap();
    run(&format!(
        "ip -n {} addr add {secondary}/24 dev eth0",
        fixture.pod.name
    ));
    let app = fixture.pod.bind(secondary);
    let _outbound = fixture.listen(&kernel, Family::V4, ListenerKind::Outbound);
    fixture.enrol(&kernel, Mode::Strict);
    let error = fixture.peer.connect(app.local_addr().unwrap()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    fixture.enrol(&kernel, Mode::Permissive);
    fixture.peer.connect(app.local_addr().unwrap()).unwrap();
    accept(&app);
    let counters = counters(&kernel);
    assert_eq!(counters["lookup_unknown_address_refused"], 1);
    assert_eq!(counters["lookup_unknown_address_passed"], 1);
}
