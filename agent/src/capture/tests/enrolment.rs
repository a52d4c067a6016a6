//! How pods come into the mesh, stay in it and leave it.

use std::io::{self, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::world::{LIMIT, Pod, Running, VIP, World, workload};
use crate::capture::{Dial, DialError, Phase, Role};
use crate::mesh::{Membership, Mode, Snapshot, Workload};

fn without(snapshot: &Snapshot, pod: &Pod) -> Arc<Snapshot> {
    let mut snapshot = snapshot.clone();
    let known = snapshot.workload(&pod.uid()).unwrap();
    let outside = Workload {
        membership: Membership::Outside,
        ..Workload::clone(known)
    };
    snapshot.insert_workload(Arc::new(outside));
    Arc::new(snapshot)
}

async fn left(running: &Running, pod: &Pod) {
    running
        .until("the pod has left", || {
            running.status(pod).is_none().then_some(())
        })
        .await;
}

fn connect(pod: &Pod, to: SocketAddr) -> io::Result<TcpStream> {
    pod.namespace
        .run(move || TcpStream::connect_timeout(&to, LIMIT))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_enrolled_pod_is_proven_in_both_families() {
    let world = World::new(1);
    let running = world.enrolled(Mode::Strict).await;
    let pod = &world.pods[0];
    let status = running.status(pod).unwrap();
    let seen = status.proof.unwrap().seen;
    let sources: Vec<_> = seen.iter().map(|proof| proof.source.ip()).collect();
    assert_eq!(sources, [pod.v4, pod.v6]);
    assert_eq!(status.attempts, 1);
    assert!(running.capture.synced());
    assert_eq!(
        running.capture.enrolled(&pod.uid()).unwrap().netns_cookie(),
        status.netns_cookie.unwrap()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_without_ipv6_is_enrolled_with_ipv4() {
    let world = World::new(1);
    let pod = &world.pods[0];
    pod.namespace.run(|| {
        std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
    });
    let running = world.enrolled(Mode::Strict).await;
    assert_eq!(running.status(pod).unwrap().proof.unwrap().seen.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_leaves_has_its_network_back_as_it_was() {
    let world = World::new(1);
    let pod = &world.pods[0];
    // Not the default, to be told from it.
    pod.namespace.run(|| {
        std::fs::write("/proc/sys/net/ipv4/tcp_tw_reuse", "0").unwrap();
    });
    let before = pod.namespace.network();
    let running = world.enrolled(Mode::Strict).await;
    assert_ne!(pod.namespace.network(), before);
    let snapshot = world.snapshot(Mode::Strict);
    running.capture.apply(without(&snapshot, pod));
    left(&running, pod).await;
    assert_eq!(pod.namespace.network(), before);
    assert!(running.capture.enrolled(&pod.uid()).is_none());
    assert_eq!(running.capture.kernel().pods().unwrap(), []);
    assert_eq!(running.capture.kernel().lookups(), Vec::<u64>::new());

    // Plain networking: what comes from outside reaches the app.
    let address = pod.v4(8080);
    let app = pod
        .namespace
        .run(move || TcpListener::bind(address).unwrap());
    let client = world
        .fabric()
        .run(move || TcpStream::connect_timeout(&address, LIMIT).unwrap());
    let (_, peer) = app.accept().unwrap();
    assert_eq!(peer, client.local_addr().unwrap());

    // And back into the mesh.
    running.capture.apply(Arc::new(snapshot));
    running.reaches(pod, Phase::Enrolled).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_live_connection_may_end_while_its_pod_leaves_and_is_reset_when_it_does_not() {
    let world = World::new(1);
    let mut running = world.enrolled(Mode::Strict).await;
    let pod = &world.pods[0];
    let mut client = connect(pod, VIP.parse().unwrap()).unwrap();
    client.set_read_timeout(Some(LIMIT)).unwrap();
    let accepted = running.next().await;
    let tracked = accepted.pod.track();
    let gone = accepted.pod.gone().clone();
    let started = Instant::now();
    running
        .capture
        .apply(without(&world.snapshot(Mode::Strict), pod));
    running.reaches(pod, Phase::Draining).await;
    gone.cancelled().await;
    assert!(started.elapsed() >= Duration::from_millis(300));
    let error = accepted
        .pod
        .connect(Dial::Direct(VIP.parse().unwrap()))
        .await
        .unwrap_err();
    assert!(matches!(error, DialError::Gone));
    drop((accepted, tracked));
    let error = client.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    left(&running, pod).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_pod_delays_no_other_and_does_not_hold_readiness() {
    let world = World::new(1);
    let mut snapshot = world.snapshot(Mode::Strict);
    let broken = [
        (
            "missing",
            Path::new("/run/netns/there-is-no-such-thing"),
            "10.244.0.90",
        ),
        ("no-netns", Path::new("/etc/hostname"), "10.244.0.91"),
        ("node", Path::new("/proc/self/ns/net"), "10.244.0.92"),
        ("shared", &world.pods[0].namespace.path(), "10.244.0.93"),
    ];
    for (name, netns, address) in broken {
        let pod = workload(name, netns, &[address.parse().unwrap()], Mode::Strict);
        snapshot.insert_workload(Arc::new(pod));
    }
    let running = world.start();
    assert!(!running.capture.synced());
    running.capture.apply(Arc::new(snapshot));
    running.reaches(&world.pods[0], Phase::Enrolled).await;
    running
        .until("synced", || running.capture.synced().then_some(()))
        .await;
    let status = |name: &str| {
        running
            .capture
            .pods()
            .into_iter()
            .find(|status| &*status.uid.0 == name)
            .unwrap()
    };
    for (name, phase, reason) in [
        ("missing", Phase::Failed, "is gone"),
        ("no-netns", Phase::Failed, "cannot enter"),
        ("node", Phase::Refused, "node's own"),
    ] {
        let status = status(name);
        assert_eq!(status.phase, phase, "{status:?}");
        assert!(
            status.last_error.as_ref().unwrap().contains(reason),
            "{status:?}"
        );
        assert!(status.next_retry.is_some());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_belongs_to_one_pod() {
    let world = World::new(1);
    let running = world.enrolled(Mode::Strict).await;
    let pod = &world.pods[0];
    let mut snapshot = world.snapshot(Mode::Strict);
    let other = Workload {
        uid: crate::mesh::WorkloadUid("other".into()),
        ..pod.workload(Mode::Strict)
    };
    snapshot.insert_workload(Arc::new(other));
    running.capture.apply(Arc::new(snapshot));
    let reason = running
        .until("the second is refused", || {
            running
                .capture
                .pods()
                .into_iter()
                .find(|status| status.phase == Phase::Refused)?
                .last_error
        })
        .await;
    assert!(reason.contains("shares its network namespace with pod-0"));
    assert_eq!(running.status(pod).unwrap().phase, Phase::Enrolled);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_keeps_the_namespace_of_a_pod_that_ended() {
    let world = World::new(2);
    let mut running = world.enrolled(Mode::Strict).await;
    let [ended, other] = &world.pods[..] else {
        panic!("two pods");
    };
    let client = connect(ended, VIP.parse().unwrap()).unwrap();
    let accepted = running.next().await;
    let held = accepted.pod.clone();
    drop((client, accepted));
    assert!(world.fabric().ip("link").contains("port0"));
    ended.namespace.delete();
    let mut snapshot = world.snapshot(Mode::Strict);
    snapshot.remove_workload(&ended.uid());
    running.capture.apply(Arc::new(snapshot));
    left(&running, ended).await;
    // The veth's other end goes with the namespace.
    running
        .until("the namespace is gone", || {
            (!world.fabric().ip("link").contains("port0")).then_some(())
        })
        .await;
    assert!(held.gone().is_cancelled());
    assert_eq!(running.status(other).unwrap().phase, Phase::Enrolled);
    assert_eq!(running.capture.kernel().pods().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_somebody_took_away_is_put_back() {
    let world = World::new(1);
    let running = world.enrolled(Mode::Strict).await;
    let pod = &world.pods[0];
    let complete = pod.namespace.network();
    pod.namespace.ip("route flush table 30061");
    pod.namespace.ip("rule del priority 1");
    pod.namespace.ip("-6 rule del priority 1");
    pod.namespace.run(|| {
        std::fs::write("/proc/sys/net/ipv4/fwmark_reflect", "0").unwrap();
    });
    let cookie = running.status(pod).unwrap().netns_cookie.unwrap();
    running.capture.kernel().detach_lookup(cookie).unwrap();
    running
        .until("it is repaired", || {
            running.status(pod).filter(|status| status.repaired >= 6)
        })
        .await;
    running.reaches(pod, Phase::Enrolled).await;
    assert_eq!(pod.namespace.network(), complete);
    assert!(running.capture.kernel().lookup_attached(cookie));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_mode_takes_effect_without_a_new_enrolment() {
    let world = World::new(1);
    let mut running = world.enrolled(Mode::Permissive).await;
    let pod = &world.pods[0];
    let client = connect(pod, VIP.parse().unwrap()).unwrap();
    let accepted = running.next().await;
    running
        .capture
        .apply(Arc::new(world.snapshot(Mode::Strict)));
    running
        .until("the kernel knows", || {
            let pods = running.capture.kernel().pods().unwrap();
            (pods[0].mode == Mode::Strict).then_some(())
        })
        .await;
    assert!(!accepted.pod.gone().is_cancelled());
    assert_eq!(running.status(pod).unwrap().attempts, 1);
    drop(client);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_shutdown_new_connections_go_as_the_mode_says_and_a_successor_takes_over() {
    let world = World::new(2);
    let [staying, leaving] = &world.pods[..] else {
        panic!("two pods");
    };
    let before = leaving.namespace.network();
    let former = world.enrolled(Mode::Strict).await;
    former.capture.shutdown().await;
    drop(former);
    let started = Instant::now();
    let error = connect(staying, VIP.parse().unwrap()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    assert!(started.elapsed() < Duration::from_millis(200));

    // While no agent was there, one of the pods was taken out of the mesh.
    let mut successor = world.start();
    let snapshot = world.snapshot(Mode::Strict);
    successor.capture.apply(without(&snapshot, leaving));
    successor.reaches(staying, Phase::Enrolled).await;
    let client = connect(staying, leaving.v4(1)).err();
    assert!(client.is_some(), "not in the mesh, so native, so refused");
    successor
        .until("the former agent's pod is removed", || {
            (successor.capture.kernel().pods().unwrap().len() == 1).then_some(())
        })
        .await;
    successor
        .until("its network is as it was", || {
            (leaving.namespace.network() == before).then_some(())
        })
        .await;
    // A probe's connection is never handed over.
    assert!(successor.accepted.try_recv().is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uninstalling_leaves_nothing() {
    let world = World::new(2);
    let before: Vec<_> = world
        .pods
        .iter()
        .map(|pod| pod.namespace.network())
        .collect();
    let running = world.enrolled(Mode::Permissive).await;
    running.capture.uninstall().await.unwrap();
    let after: Vec<_> = world
        .pods
        .iter()
        .map(|pod| pod.namespace.network())
        .collect();
    assert_eq!(after, before);
    assert!(running.capture.pods().is_empty());
    let address = world.pods[1].v4(8080);
    let app = world.pods[1]
        .namespace
        .run(move || TcpListener::bind(address).unwrap());
    let client = connect(&world.pods[0], address).unwrap();
    let (_, peer) = app.accept().unwrap();
    assert_eq!(peer, client.local_addr().unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_gets_another_address_or_namespace_is_enrolled_anew() {
    let world = World::new(2);
    let [pod, other] = &world.pods[..] else {
        panic!("two pods");
    };
    let mut snapshot = Snapshot::default();
    snapshot.insert_workload(Arc::new(pod.workload(Mode::Strict)));
    let running = world.start();
    running.capture.apply(Arc::new(snapshot.clone()));
    running.reaches(pod, Phase::Enrolled).await;
    let first = running.capture.enrolled(&pod.uid()).unwrap();

    // Only IPv4 is left.
    let changed = Workload {
        addresses: vec![pod.v4],
        ..pod.workload(Mode::Strict)
    };
    snapshot.insert_workload(Arc::new(changed));
    running.capture.apply(Arc::new(snapshot.clone()));
    let second = running
        .until("it has one family", || {
            running
                .capture
                .enrolled(&pod.uid())
                .filter(|now| now.addresses().v6.is_none())
        })
        .await;
    assert!(first.gone().is_cancelled());
    assert!(!second.gone().is_cancelled());

    // The same pod, restarted elsewhere.
    let before = pod.namespace.network();
    let moved = Workload {
        uid: pod.uid(),
        ..other.workload(Mode::Strict)
    };
    snapshot.insert_workload(Arc::new(moved));
    running.capture.apply(Arc::new(snapshot));
    let third = running
        .until("it is in the other namespace", || {
            running
                .capture
                .enrolled(&pod.uid())
                .filter(|now| now.netns_cookie() != first.netns_cookie())
        })
        .await;
    assert_eq!(third.addresses().v4, Some("10.244.0.6".parse().unwrap()));
    assert!(second.gone().is_cancelled());
    assert_ne!(pod.namespace.network(), before);
    assert_eq!(running.capture.kernel().pods().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_pod_speaks_for_itself() {
    let world = World::new(3);
    let mut running = world.enrolled(Mode::Strict).await;
    for pod in &world.pods {
        let _client = connect(pod, VIP.parse().unwrap()).unwrap();
        let accepted = running.next().await;
        assert_eq!(accepted.role, Role::Outbound);
        assert_eq!(accepted.pod.workload().uid, pod.uid());
        assert_eq!(accepted.peer.ip(), pod.v4);
    }
}
