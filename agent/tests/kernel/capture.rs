//! What a pod opens: captured, or left alone.

use std::collections::BTreeSet;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};
use undermesh::capture::kernel::{
    CAPTURE_MARK, Family, Intent, Kernel, ListenerKind, socket_cookie,
};
use undermesh::mesh::{CaptureTarget, Mode};

use crate::fixture::{Fixture, LIMIT, PEER_V4, PEER_V6, POD_V4, POD_V6, accept, counters, is_idle};

const SERVICE_V4: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const SERVICE_V6: Ipv6Addr = Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 0x10);

fn target(address: impl Into<IpAddr>, port: Option<u16>) -> CaptureTarget {
    CaptureTarget {
        address: address.into(),
        port,
    }
}

fn capture(kernel: &Kernel, targets: &[CaptureTarget]) {
    let targets: BTreeSet<_> = targets.iter().copied().collect();
    kernel.set_targets(&targets).unwrap();
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
        .map(|one| one["name"].as_str().unwrap())
        .collect();
    assert_eq!(&names[..3], ["sock_ops", "connect4", "connect6"]);
    assert_eq!(names.len(), 4);
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
    let mapped = SERVICE_V4.to_ipv6_mapped();
    for (destination, listener, arrives_as, source) in [
        (
            SocketAddr::from((SERVICE_V4, 80)),
            &v4,
            SocketAddr::from((SERVICE_V4, 80)),
            IpAddr::from(POD_V4),
        ),
        (
            SocketAddr::from((mapped, 80)),
            &v4,
            SocketAddr::from((SERVICE_V4, 80)),
            POD_V4.into(),
        ),
        (
            SocketAddr::from((SERVICE_V6, 8443)),
            &v6,
            SocketAddr::from((SERVICE_V6, 8443)),
            POD_V6.into(),
        ),
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
