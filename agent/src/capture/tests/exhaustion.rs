//! An agent without descriptors. In a process of its own, since the limit is the process's.

use std::io::Write;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

use super::world::{VIP, World};
use crate::capture::Phase;
use crate::mesh::Mode;

const INSIDE: &str = "UNDERMESH_TEST_EXHAUSTION";
const CONNECTIONS: usize = 3;

#[test]
fn an_agent_without_descriptors_neither_spins_nor_loses_the_connections_that_wait() {
    if std::env::var_os(INSIDE).is_some() {
        tokio::runtime::Runtime::new().unwrap().block_on(inside());
        return;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "--nocapture",
            concat!(
                "capture::tests::exhaustion::",
                "an_agent_without_descriptors_neither_spins_nor_loses_the_connections_that_wait"
            ),
        ])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Waits for a line, and then sets the limit of this process: by then it cannot start another.
fn limiter(limit: u32) -> Child {
    let own = std::process::id();
    Command::new("sh")
        .arg("-c")
        .arg(format!("read go && prlimit --pid {own} --nofile={limit}:"))
        .stdin(Stdio::piped())
        .spawn()
        .unwrap()
}

fn go(mut limiter: Child) {
    limiter.stdin.take().unwrap().write_all(b"go\n").unwrap();
    assert!(limiter.wait().unwrap().success());
}

async fn inside() {
    let world = World::new(1);
    let mut running = world.enrolled(Mode::Permissive).await;
    let pod = &world.pods[0];
    let rests = |running: &super::world::Running| {
        let counters = running.capture.counters();
        counters
            .iter()
            .find(|(name, _)| *name == "accept_backoff")
            .unwrap()
            .1
    };
    // Made before there is nothing left; connect(2) needs no descriptor.
    let clients: Vec<_> = pod.namespace.run(|| {
        let new = || {
            let kind = socket2::Type::STREAM.nonblocking();
            socket2::Socket::new(socket2::Domain::IPV4, kind, None).unwrap()
        };
        std::iter::repeat_with(new).take(CONNECTIONS).collect()
    });
    let (lower, raise) = (limiter(3), limiter(1024));
    go(lower);
    let vip: SocketAddr = VIP.parse().unwrap();
    for client in &clients {
        let error = client.connect(&vip.into()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS));
    }
    running
        .until("accept rests", || (rests(&running) >= 3).then_some(()))
        .await;
    // A verification comes round and fails, but the pod stays in the mesh.
    running
        .until("a verification failed", || {
            (running.status(pod)?.failures > 0).then_some(())
        })
        .await;
    assert!(rests(&running) < 60, "it spins: {}", rests(&running));
    assert!(running.accepted.try_recv().is_err());
    go(raise);
    for _ in 0..CONNECTIONS {
        running.next().await;
    }
    running.reaches(pod, Phase::Enrolled).await;
    assert_eq!(running.status(pod).unwrap().attempts, 1);
}
