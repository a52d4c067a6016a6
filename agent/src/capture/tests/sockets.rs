//! What comes out of a pod, what goes into it, and as whom.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::world::{LIMIT, Pod, Running, VIP, VIP6, World};
use crate::capture::{Dial, DialError, Full, Role};
use crate::mesh::Mode;
use crate::relay::close_in_order;

/// An ordinary client: connects, says hello, reads to the end.
fn client(pod: &Pod, to: SocketAddr) -> JoinHandle<io::Result<(SocketAddr, SocketAddr, String)>> {
    pod.namespace.spawn(move || {
        let mut stream = TcpStream::connect_timeout(&to, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let (local, peer) = (stream.local_addr()?, stream.peer_addr()?);
        stream.write_all(b"hello")?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok((local, peer, answer))
    })
}

/// An ordinary server that takes one connection: whom it sees, what it reads.
fn server(pod: &Pod, listen: SocketAddr) -> JoinHandle<(SocketAddr, SocketAddr, String)> {
    let listener = pod
        .namespace
        .run(move || TcpListener::bind(listen).unwrap());
    std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        stream.write_all(b"welcome").unwrap();
        (peer, stream.local_addr().unwrap(), text)
    })
}

/// The client's side of a relay: says hello, reads to the end.
async fn converse(mut stream: tokio::net::TcpStream) -> String {
    stream.write_all(b"hello").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    close_in_order(stream);
    text
}

async fn joined<T: Send + 'static>(thread: JoinHandle<T>) -> T {
    tokio::task::spawn_blocking(move || thread.join().unwrap())
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_comes_out_with_its_true_destination_and_sees_true_addresses() {
    let world = World::new(1);
    let mut running = world.enrolled(Mode::Strict).await;
    let pod = &world.pods[0];
    for (to, from) in [
        (VIP, pod.v4),
        (VIP6, pod.v6),
        ("[::ffff:10.96.0.10]:80", pod.v4),
    ] {
        let to: SocketAddr = to.parse().unwrap();
        let client = client(pod, to);
        let mut accepted = running.next().await;
        assert_eq!(accepted.role, Role::Outbound);
        assert_eq!(accepted.local.ip(), to.ip().to_canonical());
        assert_eq!(accepted.local.port(), 80);
        assert_eq!(accepted.peer.ip(), from);
        assert_eq!(accepted.pod.workload().uid, pod.uid());
        let mut text = String::new();
        accepted.stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "hello");
        accepted.stream.write_all(b"welcome").await.unwrap();
        accepted.stream.shutdown().await.unwrap();
        close_in_order(accepted.stream);
        let (local, peer, answer) = joined(client).await.unwrap();
        assert_eq!(local.ip().to_canonical(), from);
        assert_eq!(peer, to);
        assert_eq!(answer, "welcome");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn none_of_many_connections_at_once_is_lost_or_taken_for_another() {
    const THREADS: u16 = 8;
    const EACH: u16 = 250;
    let world = World::new(2);
    let mut running = world.enrolled(Mode::Strict).await;
    let [pod, other] = &world.pods[..] else {
        panic!("two pods");
    };
    // Each connection to a port of its own, so that each is told from all others.
    let address = other.v4;
    let clients: Vec<_> = (0..THREADS)
        .map(|thread| {
            pod.namespace.spawn(move || {
                (0..EACH)
                    .map(|number| {
                        let to = SocketAddr::new(address, 1_000 + thread * EACH + number);
                        let stream = TcpStream::connect_timeout(&to, LIMIT).unwrap();
                        (stream.local_addr().unwrap(), stream.peer_addr().unwrap())
                    })
                    .collect::<Vec<_>>()
            })
        })
        .collect();
    let mut seen = std::collections::BTreeSet::new();
    // Held until the clients are done: dropping one resets it, perhaps while its client connects.
    let mut held = Vec::new();
    for _ in 0..THREADS * EACH {
        let accepted = running.next().await;
        assert_eq!(accepted.role, Role::Outbound);
        seen.insert((accepted.peer, accepted.local));
        held.push(accepted);
    }
    let mut opened = std::collections::BTreeSet::new();
    for client in clients {
        opened.extend(joined(client).await);
    }
    assert_eq!(seen, opened);
    assert_eq!(seen.len(), usize::from(THREADS * EACH));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_did_not_end_in_order_is_reset() {
    let world = World::new(1);
    let mut running = world.enrolled(Mode::Permissive).await;
    let client = client(&world.pods[0], VIP.parse().unwrap());
    let mut accepted = running.next().await;
    accepted.stream.write_all(b"half of the ans").await.unwrap();
    drop(accepted);
    let error = joined(client).await.unwrap_err();
    // The latter if the reset was there before the client asked for its peer's address.
    let reset = [io::ErrorKind::ConnectionReset, io::ErrorKind::NotConnected];
    assert!(reset.contains(&error.kind()), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_app_sees_the_client_as_the_source_of_a_delivery() {
    let world = World::new(1);
    let running = world.enrolled(Mode::Strict).await;
    let pod = &world.pods[0];
    let enrolled = running.capture.enrolled(&pod.uid()).unwrap();
    for (source, destination) in [
        ("10.1.2.3:40000", pod.v4(8080)),
        ("[fd12::3]:40000", pod.v6(8080)),
        // Hairpin: the client is the pod itself.
        ("10.244.0.5:40000", pod.v4(8080)),
        ("[fd00::5]:40000", pod.v6(8080)),
    ] {
        let any = if destination.is_ipv4() {
            "0.0.0.0:8080"
        } else {
            "[::]:8080"
        };
        let app = server(pod, any.parse().unwrap());
        let source: SocketAddr = source.parse().unwrap();
        let stream = enrolled
            .connect(Dial::Deliver {
                source,
                destination,
            })
            .await
            .unwrap();
        assert_eq!(converse(stream).await, "welcome");
        let (peer, local, text) = joined(app).await;
        assert_eq!(peer.ip(), source.ip());
        assert!(!(32_768..=60_999).contains(&peer.port()), "{peer}");
        assert_eq!(local, destination);
        assert_eq!(text, "hello");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_that_refuses_a_delivery_is_seen_to_refuse_it_at_once() {
    let world = World::new(1);
    let running = world.enrolled(Mode::Strict).await;
    let pod = &world.pods[0];
    let enrolled = running.capture.enrolled(&pod.uid()).unwrap();
    for (source, destination) in [
        ("10.1.2.3:40000", pod.v4(8080)),
        ("[fd12::3]:40000", pod.v6(8080)),
        ("10.244.0.5:40000", pod.v4(8080)),
    ] {
        let started = Instant::now();
        let error = enrolled
            .connect(Dial::Deliver {
                source: source.parse().unwrap(),
                destination,
            })
            .await
            .unwrap_err();
        assert!(matches!(error, DialError::Refused(_)), "{error:?}");
        assert!(started.elapsed() < Duration::from_millis(150));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delivery_goes_round_real_connections_that_nobody_told_it_of() {
    let world = World::new(2);
    let [client, pod] = &world.pods[..] else {
        panic!("two pods");
    };
    // A delivery has one of three ports; the client's real connections get two of them.
    let give_away = |pod: &Pod, ports: &'static str| {
        pod.namespace.run(move || {
            std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", ports).unwrap();
        });
    };
    give_away(pod, "1024 65532");
    let running = world.enrolled(Mode::Permissive).await;
    give_away(client, "65534 65535");
    let from = running.capture.enrolled(&client.uid()).unwrap();
    let enrolled = running.capture.enrolled(&pod.uid()).unwrap();
    let destination = pod.v4(8080);
    let app = pod
        .namespace
        .run(move || TcpListener::bind(destination).unwrap());
    let mut real = Vec::new();
    for _ in 0..2 {
        let admitted = Dial::Admitted {
            destination,
            netns_cookie: enrolled.netns_cookie(),
        };
        let stream = from.connect(admitted).await.unwrap();
        real.push((stream, app.accept().unwrap()));
    }
    // In three deliveries each port has its turn.
    for _ in 0..3 {
        let stream = enrolled
            .connect(Dial::Deliver {
                source: client.v4(40_000),
                destination,
            })
            .await
            .unwrap();
        let (_, seen) = app.accept().unwrap();
        assert_eq!(seen, client.v4(65_533));
        drop(stream);
    }
    assert!(counted(&running, "delivery_unanswered") >= 2);
    // The real ones were not harmed.
    for (stream, (mut at_app, _)) in real {
        let conversation = tokio::spawn(converse(stream));
        let mut text = String::new();
        at_app.read_to_string(&mut text).unwrap();
        at_app.write_all(b"welcome").unwrap();
        drop(at_app);
        assert_eq!(conversation.await.unwrap(), "welcome");
        assert_eq!(text, "hello");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_deliveries_than_there_are_source_ports_go_to_one_app_one_after_the_other() {
    const DELIVERIES: usize = 6_000;
    let world = World::new(1);
    let running = world.enrolled(Mode::Strict).await;
    let pod = &world.pods[0];
    let enrolled = running.capture.enrolled(&pod.uid()).unwrap();
    let destination = pod.v4(8080);
    let app = pod
        .namespace
        .run(move || TcpListener::bind(destination).unwrap());
    // Every other connection is closed first by the app, the rest by us, so that both ends have
    // connections in TIME_WAIT.
    let app = std::thread::spawn(move || {
        for number in 0..DELIVERIES {
            let (mut stream, _) = app.accept().unwrap();
            if number % 2 == 0 {
                stream.shutdown(std::net::Shutdown::Write).unwrap();
            }
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            assert_eq!(text, "hello");
        }
    });
    for number in 0..DELIVERIES {
        let mut stream = enrolled
            .connect(Dial::Deliver {
                source: "10.1.2.3:1".parse().unwrap(),
                destination,
            })
            .await
            .unwrap_or_else(|error| panic!("delivery {number}: {error}"));
        stream.write_all(b"hello").await.unwrap();
        let mut text = String::new();
        if number % 2 == 0 {
            stream.read_to_string(&mut text).await.unwrap();
            stream.shutdown().await.unwrap();
        } else {
            stream.shutdown().await.unwrap();
            stream.read_to_string(&mut text).await.unwrap();
        }
        close_in_order(stream);
    }
    joined(app).await;
    assert_eq!(counted(&running, "delivery_unanswered"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_connects_to_the_probes_destination_gets_nothing_and_stays_in_the_mesh() {
    let world = World::new(1);
    let mut running = world.enrolled(Mode::Permissive).await;
    let pod = &world.pods[0];
    for _ in 0..100 {
        let to: SocketAddr = "192.0.2.1:15009".parse().unwrap();
        let result = joined(client(pod, to)).await;
        assert!(result.is_err(), "{result:?}");
    }
    let proven = |running: &Running| running.status(pod).unwrap().proof.unwrap().at;
    let before = proven(&running);
    running
        .until("it is proven again", || {
            (proven(&running) > before).then_some(())
        })
        .await;
    assert!(running.accepted.try_recv().is_err());
    assert_eq!(running.status(pod).unwrap().failures, 0);
}

/// The value of a counter.
fn counted(running: &Running, name: &str) -> u64 {
    let counters = running.capture.counters();
    counters.iter().find(|(known, _)| *known == name).unwrap().1
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_to_a_listener_itself_is_reset_and_counted() {
    let world = World::new(1);
    let mut running = world.enrolled(Mode::Permissive).await;
    let pod = &world.pods[0];
    // The listeners are found as a program in the pod would find them.
    let ports: Vec<u16> = pod.namespace.run(|| {
        let table = std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
        table
            .lines()
            .filter_map(|line| line.split_whitespace().nth(1)?.strip_prefix("0100007F:"))
            .map(|port| u16::from_str_radix(port, 16).unwrap())
            .collect()
    });
    assert_eq!(ports.len(), 3);
    for port in ports {
        let result = joined(client(pod, ([127, 0, 0, 1], port).into())).await;
        assert!(result.is_err(), "{result:?}");
    }
    assert_eq!(counted(&running, "role_mismatch"), 3);
    assert!(running.accepted.try_recv().is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_with_as_many_connections_as_it_may_have_gets_no_more() {
    let world = World::new(1);
    let mut running = world.enrolled(Mode::Permissive).await;
    let pod = &world.pods[0];
    let enrolled = running.capture.enrolled(&pod.uid()).unwrap();
    let mut slots = Vec::new();
    let full = loop {
        match enrolled.admit() {
            Ok(slot) => slots.push(slot),
            Err(full) => break full,
        }
    };
    let event = match full {
        Full::Pod => "pod_full",
        // The limit of descriptors of whoever runs the tests decides which.
        Full::Node | Full::Memory => "node_full",
    };
    let before = counted(&running, event);
    let result = joined(client(pod, VIP.parse().unwrap())).await;
    assert!(result.is_err(), "{result:?}");
    assert_eq!(counted(&running, event), before + 1);
    // Inside a tunnel neither.
    assert_eq!(enrolled.admit().unwrap_err(), full);
    assert_eq!(counted(&running, event), before + 2);
    let status = running.status(pod).unwrap();
    assert_eq!(status.refused[full.as_str()], before + 2);
    assert!(running.accepted.try_recv().is_err());
    drop(slots);
    assert!(enrolled.admit().is_ok());
    let _client = client(pod, VIP.parse().unwrap());
    running.next().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_memory_is_short_new_connections_are_reset_and_the_pod_stays_in_the_mesh() {
    let world = World::new(1);
    let mut running = world.enrolled(Mode::Strict).await;
    let pod = &world.pods[0];
    let first = client(pod, VIP.parse().unwrap());
    let mut live = running.next().await.stream;
    running.capture.tools.share.set_short_of_memory(true);
    let result = joined(client(pod, VIP.parse().unwrap())).await;
    assert!(result.is_err(), "{result:?}");
    assert_eq!(counted(&running, "memory_short"), 1);
    assert_eq!(running.status(pod).unwrap().refused["memory"], 1);
    assert!(running.accepted.try_recv().is_err());
    // What is live goes on, and the proof of capture needs no place.
    let proven = |running: &Running| running.status(pod)?.proof.map(|proof| proof.at);
    let before = proven(&running);
    running
        .until("the pod is verified", || {
            (proven(&running) > before).then_some(())
        })
        .await;
    live.read_exact(&mut [0; 5]).await.unwrap();
    live.write_all(b"welcome").await.unwrap();
    close_in_order(live);
    assert_eq!(joined(first).await.unwrap().2, "welcome");
    running.capture.tools.share.set_short_of_memory(false);
    let _client = client(pod, VIP.parse().unwrap());
    running.next().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_queues_of_a_pods_listeners_are_shown_with_their_room() {
    let world = World::new(1);
    let running = world.enrolled(Mode::Strict).await;
    let backlogs = running.status(&world.pods[0]).unwrap().backlogs;
    // Three for each family.
    assert_eq!(backlogs.len(), 6);
    for backlog in backlogs {
        assert!(backlog.room > 0, "{backlog:?}");
        assert_eq!(backlog.dropped, 0, "{backlog:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_from_outside_come_out_as_inbound_and_tunnels_apart() {
    let world = World::new(2);
    let mut running = world.enrolled(Mode::Strict).await;
    let [client_pod, pod] = &world.pods[..] else {
        panic!("two pods");
    };
    // From the fabric, as from a node: nothing captures it on its way out.
    let cases = [
        (pod.v4(8080), Role::Inbound, "10.244.0.1"),
        (pod.v6(8080), Role::Inbound, "fd00::1"),
        (pod.v4(15_008), Role::Hbone, "10.244.0.1"),
        (pod.v6(15_008), Role::Hbone, "fd00::1"),
    ];
    for (to, role, from) in cases {
        let connected = world
            .fabric()
            .run(move || TcpStream::connect_timeout(&to, LIMIT).unwrap());
        let accepted = running.next().await;
        assert_eq!(accepted.role, role);
        assert_eq!(accepted.local, to);
        assert_eq!(accepted.peer, connected.local_addr().unwrap());
        assert_eq!(accepted.peer.ip().to_string(), from);
        assert_eq!(accepted.pod.workload().uid, pod.uid());
    }
    // From a meshed pod: captured there, and there only.
    let _connected = client(client_pod, pod.v4(8080));
    let accepted = running.next().await;
    assert_eq!(accepted.role, Role::Outbound);
    assert_eq!(accepted.pod.workload().uid, client_pod.uid());
    assert_eq!(accepted.local, pod.v4(8080));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_agents_own_connections_leave_from_the_pods_address_and_are_not_captured() {
    let world = World::new(2);
    let mut running = world.enrolled(Mode::Strict).await;
    let [client, pod] = &world.pods[..] else {
        panic!("two pods");
    };
    let from = running.capture.enrolled(&client.uid()).unwrap();
    let enrolled = running.capture.enrolled(&pod.uid()).unwrap();
    for (to, own) in [(pod.v4(15_008), client.v4), (pod.v6(15_008), client.v6)] {
        let stream = from.connect(Dial::Direct(to)).await.unwrap();
        let accepted = running.next().await;
        assert_eq!(accepted.role, Role::Hbone);
        assert_eq!(accepted.pod.workload().uid, pod.uid());
        assert_eq!(accepted.peer, stream.local_addr().unwrap());
        assert_eq!(accepted.peer.ip(), own);
    }
    for (to, own) in [(pod.v4(8080), client.v4), (pod.v6(8080), client.v6)] {
        let app = server(pod, to);
        let dial = |netns_cookie| Dial::Admitted {
            destination: to,
            netns_cookie,
        };
        let right = dial(enrolled.netns_cookie());
        let stream = from.connect(right).await.unwrap();
        assert_eq!(converse(stream).await, "welcome");
        let (peer, _, _) = joined(app).await;
        assert_eq!(peer.ip(), own);
        // Nobody listens any more.
        let error = from.connect(right).await.unwrap_err();
        assert!(matches!(error, DialError::Refused(_)), "{error:?}");
        // The address went to another pod: whoever answers there hears nothing.
        let app = pod.namespace.run(move || TcpListener::bind(to).unwrap());
        let error = from.connect(dial(from.netns_cookie())).await.unwrap_err();
        assert!(matches!(error, DialError::Misdirected(_)), "{error:?}");
        let mut heard = Vec::new();
        let end = app.accept().unwrap().0.read_to_end(&mut heard).unwrap_err();
        assert_eq!(end.kind(), io::ErrorKind::ConnectionReset);
        assert!(heard.is_empty());
    }
}
