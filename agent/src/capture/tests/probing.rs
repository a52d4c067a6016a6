//! Whose probes are admitted while one agent takes over from another.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use super::world::{LIMIT, Running, World};
use crate::capture::Phase;
use crate::mesh::Mode;

const PROBED: u16 = 8080;

struct Kubelet(PathBuf);

impl Kubelet {
    fn new(world: &World, name: &str) -> Self {
        let path = world.cgroup().join(format!("{}-{name}", world.fabric().0));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// Connects from the node by a process in this cgroup.
    fn connect(&self, world: &World, to: SocketAddr) {
        let script = format!(
            "echo $$ > {}/cgroup.procs; exec ip netns exec {} \
             bash -c 'exec 3<>/dev/tcp/{}/{}' 2>/dev/null",
            self.0.display(),
            world.fabric().0,
            to.ip(),
            to.port(),
        );
        Command::new("bash").args(["-c", &script]).status().unwrap();
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        // A process leaves its cgroup a moment after it was waited for.
        let deadline = std::time::Instant::now() + LIMIT;
        while fs::remove_dir(&self.0).is_err() && self.0.exists() {
            if std::time::Instant::now() > deadline {
                return;
            }
            std::thread::yield_now();
        }
    }
}

fn admitted(running: &Running) -> u64 {
    let counters = running.capture.kernel().counters();
    let mut probes = counters.iter().filter(|(name, _)| *name == "connect_probe");
    probes.next().unwrap().1
}

/// Whether a probe from there is admitted.
fn may_probe(world: &World, running: &Running, kubelet: &Kubelet) -> bool {
    let before = admitted(running);
    kubelet.connect(world, world.pods[0].v4(PROBED));
    admitted(running) > before
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successors_probing_cgroups_are_in_force_once_it_is_alone_and_the_former_ones_until_then()
{
    let world = World::new(1);
    let pod = &world.pods[0];
    let (one, other) = (Kubelet::new(&world, "one"), Kubelet::new(&world, "other"));
    let mut snapshot = world.snapshot(Mode::Strict);
    let mut workload = pod.workload(Mode::Strict);
    workload.probe_ports = [PROBED].into();
    snapshot.insert_workload(Arc::new(workload));
    let snapshot = Arc::new(snapshot);
    let address = pod.v4(PROBED);
    let _app = pod
        .namespace
        .run(move || TcpListener::bind(address).unwrap());

    let former = world.start_probed_by(std::slice::from_ref(&one.0));
    former.capture.apply(snapshot.clone());
    former.reaches(pod, Phase::Enrolled).await;
    assert!(may_probe(&world, &former, &one));
    assert!(!may_probe(&world, &former, &other));

    let held = former.capture.hold().await;
    let handed = former.capture.listeners().unwrap();
    let successor = world.start_beside(handed, std::slice::from_ref(&other.0));
    successor.capture.apply(snapshot);
    successor.capture.laid().await;
    // Its first look has passed; were its cgroups in force, the map would be its own by now.
    assert!(may_probe(&world, &successor, &one));
    assert!(!may_probe(&world, &successor, &other));
    let status = successor.capture.kernel().status();
    assert!(status.probe_cgroups.is_empty(), "{status:?}");

    successor.capture.accept();
    former.capture.shutdown().await;
    drop((held, former));
    successor.capture.go_alone();
    successor
        .until("its cgroups are in force", || {
            let seen = successor.capture.kernel().status().probe_cgroups;
            seen.iter()
                .any(|cgroup| names(&cgroup.path, &other))
                .then_some(())
        })
        .await;
    assert!(may_probe(&world, &successor, &other));
    assert!(!may_probe(&world, &successor, &one));
}

fn names(path: &Path, kubelet: &Kubelet) -> bool {
    path == kubelet.0
}
