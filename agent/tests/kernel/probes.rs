//! The kubelet's probes: a cgroup and a declared port, or nothing.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use undermesh::capture::kernel::{
    Family, Kernel, ListenerKind, PROBE_PORTS_PER_POD, ProbeCgroup, ProbeCgroupState,
};
use undermesh::mesh::Mode;

use crate::fixture::{
    Fixture, LIMIT, POD_V4, POD_V6, accept, counters, is_idle, wait_for, wait_until,
};

/// None is known by its cgroup.
const NO_PODS: BTreeSet<PathBuf> = BTreeSet::new();

/// A cgroup below that of the test.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(fixture: &Fixture, name: &str) -> Self {
        // Tests share the outer cgroup; the pod's name is the test's own.
        let path = fixture
            .cgroup
            .path()
            .join(format!("{}-{name}", fixture.pod.name));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// Connects from the peer's namespace, by a process in this cgroup or in `below`, and prints
    /// what the server says; fails if it is refused.
    fn connect(&self, fixture: &Fixture, below: &str, to: SocketAddr) -> Child {
        let script = format!(
            "echo $$ > {cgroup}/cgroup.procs; exec ip netns exec {netns} \
             bash -c 'exec 3<>/dev/tcp/{ip}/{port} && cat <&3'",
            cgroup = self.0.join(below).display(),
            netns = fixture.peer.name,
            ip = to.ip(),
            port = to.port(),
        );
        Command::new("bash")
            .args(["-c", &script])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process leaves its cgroup a moment after it was waited for.
        let deadline = std::time::Instant::now() + LIMIT;
        while fs::remove_dir(&self.0).is_err() && self.0.exists() {
            if std::time::Instant::now() > deadline {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

fn declare(fixture: &Fixture, kernel: &Kernel, ports: &[u16]) {
    let ports: BTreeSet<u16> = ports.iter().copied().collect();
    kernel
        .set_probe_ports(&fixture.record(Mode::Strict), &ports)
        .unwrap();
}

fn entries(kernel: &Kernel, map: &str) -> usize {
    let maps = kernel.status().maps;
    let found = maps.iter().find(|status| status.name == map);
    found.unwrap().entries.unwrap()
}

fn reaches(mut client: Child, app: &TcpListener) {
    let (mut accepted, _) = accept(app);
    accepted.write_all(b"alive").unwrap();
    drop(accepted);
    let mut heard = String::new();
    client
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut heard)
        .unwrap();
    assert_eq!(heard, "alive");
    client.wait().unwrap();
}

fn is_refused(client: Child) {
    let output = client.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && error.contains("refused"),
        "{error}"
    );
}

#[test]
fn a_strict_pod_serves_the_probing_cgroup_on_a_declared_port_and_nothing_else() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    let kubelet = Cgroup::new(&fixture, "kubelet");
    let other = Cgroup::new(&fixture, "other");
    let found = kernel.set_probe_cgroups(std::slice::from_ref(&kubelet.0), &NO_PODS);
    assert_eq!(found.unwrap()[0].state, ProbeCgroupState::Known);
    for (turn, pod) in [IpAddr::from(POD_V4), POD_V6.into()]
        .into_iter()
        .enumerate()
    {
        let probed = fixture.pod.bind(pod);
        let unprobed = fixture.pod.bind(pod);
        let (declared, undeclared) = (probed.local_addr().unwrap(), unprobed.local_addr().unwrap());
        declare(&fixture, &kernel, &[declared.port()]);
        let times = turn as u64 + 1;
        reaches(kubelet.connect(&fixture, "", declared), &probed);
        assert_eq!(counters(&kernel)["connect_probe"], times);
        assert_eq!(counters(&kernel)["lookup_admitted"], times);
        is_refused(kubelet.connect(&fixture, "", undeclared));
        assert_eq!(counters(&kernel)["connect_probe_undeclared"], times);
        is_refused(other.connect(&fixture, "", declared));
        assert_eq!(counters(&kernel)["connect_probe_foreign"], times);
        is_refused(other.connect(&fixture, "", undeclared));
        assert!(is_idle(&probed) && is_idle(&unprobed));
        wait_for(&kernel, "tuple_removed", times);
    }
    assert_eq!(counters(&kernel)["lookup_no_listener_refused"], 6);
    assert_eq!(entries(&kernel, "ADMITTED"), 0);
}

#[test]
fn with_the_agent_listening_only_the_probe_passes_it_by() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    let inbound = fixture.listen(&kernel, Family::V4, ListenerKind::Inbound);
    let kubelet = Cgroup::new(&fixture, "kubelet");
    kernel
        .set_probe_cgroups(std::slice::from_ref(&kubelet.0), &NO_PODS)
        .unwrap();
    let app = fixture.pod.bind(POD_V4);
    let to = app.local_addr().unwrap();
    declare(&fixture, &kernel, &[to.port()]);
    reaches(kubelet.connect(&fixture, "", to), &app);
    assert!(is_idle(&inbound));
    // This process is not in the probing cgroup.
    let stranger = fixture.peer.connect(to).unwrap();
    assert_eq!(accept(&inbound).1, stranger.local_addr().unwrap());
    assert!(is_idle(&app));
}

#[test]
fn what_runs_below_the_probing_cgroup_may_probe_and_a_cgroup_that_is_made_anew_is_found_again() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    let app = fixture.pod.bind(POD_V4);
    let to = app.local_addr().unwrap();
    declare(&fixture, &kernel, &[to.port()]);
    let path = fixture
        .cgroup
        .path()
        .join(format!("{}-kubelet", fixture.pod.name));
    let look = || {
        kernel
            .set_probe_cgroups(std::slice::from_ref(&path), &NO_PODS)
            .unwrap()[0]
            .clone()
    };
    let absent = look();
    assert_eq!((absent.id, absent.state), (None, ProbeCgroupState::Absent));
    let mut former = None;
    for _ in 0..2 {
        let kubelet = Cgroup::new(&fixture, "kubelet");
        // Until it is looked for, it is a stranger.
        is_refused(kubelet.connect(&fixture, "", to));
        let found = look();
        assert_eq!(found.state, ProbeCgroupState::Known);
        assert_ne!(found.id, former);
        former = found.id;
        assert_eq!(kernel.status().probe_cgroups, [found]);
        let deep = Cgroup(kubelet.0.join("deep"));
        fs::create_dir(&deep.0).unwrap();
        reaches(kubelet.connect(&fixture, "deep", to), &app);
        drop(deep);
        drop(kubelet);
        look();
        assert_eq!(entries(&kernel, "PROBERS"), 0);
    }
    assert_eq!(counters(&kernel)["connect_probe"], 2);
}

#[test]
fn a_cgroup_that_holds_the_pods_or_is_none_is_not_taken() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    let root = fixture.cgroup.path();
    let tree = root.parent().unwrap().to_owned();
    let sibling = tree.join(format!("{}-beside", fixture.pod.name));
    fs::create_dir(&sibling).unwrap();
    let sibling = Cgroup(sibling);
    let plain = std::env::temp_dir();
    let found = kernel
        .set_probe_cgroups(&[root, tree, sibling.0.clone(), plain], &NO_PODS)
        .unwrap();
    let states: Vec<_> = found.iter().map(|cgroup| cgroup.state).collect();
    assert_eq!(
        states,
        [
            ProbeCgroupState::HoldsPods,
            ProbeCgroupState::HoldsPods,
            ProbeCgroupState::OutOfReach,
            ProbeCgroupState::NotCgroup2,
        ]
    );
    assert_eq!(entries(&kernel, "PROBERS"), 0);
}

#[test]
fn a_cgroup_with_a_pod_below_it_may_not_probe_by_whatever_the_pod_is_known() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    let app = fixture.pod.bind(POD_V4);
    let to = app.local_addr().unwrap();
    declare(&fixture, &kernel, &[to.port()]);
    let look = |path: &PathBuf, pods: &BTreeSet<PathBuf>| {
        let found = kernel.set_probe_cgroups(std::slice::from_ref(path), pods);
        found.unwrap().remove(0)
    };
    let is_refused_for = |found: &ProbeCgroup, why: &str| {
        assert_eq!(found.state, ProbeCgroupState::HoldsPods, "{found:?}");
        let reason = found.reason.as_deref().unwrap();
        assert!(reason.contains(why), "{reason}");
        assert_eq!(entries(&kernel, "PROBERS"), 0);
        assert_eq!(kernel.status().probe_cgroups, std::slice::from_ref(found));
    };

    // By the cgroup that the model knows.
    let slice = Cgroup::new(&fixture, "slice");
    let pod = Cgroup(slice.0.join("pod"));
    fs::create_dir(&pod.0).unwrap();
    assert_eq!(look(&slice.0, &NO_PODS).state, ProbeCgroupState::Known);
    is_refused_for(&look(&slice.0, &[pod.0.clone()].into()), "cgroup of a pod");
    is_refused(slice.connect(&fixture, "", to));
    // A pod that is gone makes no kubelet of it; another cgroup at its place may be one.
    drop(pod);
    is_refused_for(&look(&slice.0, &NO_PODS), "cgroup of a pod");
    drop(slice);
    let slice = Cgroup::new(&fixture, "slice");
    assert_eq!(look(&slice.0, &NO_PODS).state, ProbeCgroupState::Known);

    // By a process in an enrolled pod's network.
    let pod = Cgroup(slice.0.join("pod"));
    fs::create_dir(&pod.0).unwrap();
    let script = format!(
        "echo $$ > {}/cgroup.procs; exec ip netns exec {} cat",
        pod.0.display(),
        fixture.pod.name
    );
    let mut inmate = Command::new("bash")
        .args(["-c", &script])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let found = || look(&slice.0, &NO_PODS);
    wait_until("the process is seen", || {
        found().state == ProbeCgroupState::HoldsPods
    });
    is_refused_for(&found(), "has the network of an enrolled pod");
    drop(inmate.stdin.take());
    inmate.wait().unwrap();
    drop((pod, slice));

    // By what kubelets call it.
    let slice = Cgroup::new(&fixture, "slice");
    let pods = Cgroup(slice.0.join("kubepods.slice"));
    fs::create_dir(&pods.0).unwrap();
    is_refused_for(&look(&slice.0, &NO_PODS), "kubepods.slice");
}

#[test]
fn the_probe_ports_of_a_pod_are_bounded_follow_its_manifest_and_go_with_it() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    let many: Vec<u16> = (1..=100).collect();
    declare(&fixture, &kernel, &many);
    // One entry for each address itself.
    assert_eq!(entries(&kernel, "PROBES"), 2 * (PROBE_PORTS_PER_POD + 1));
    declare(&fixture, &kernel, &[8080]);
    assert_eq!(entries(&kernel, "PROBES"), 2 * 2);
    // An agent that starts keeps those of pods that are there, and forgets the others.
    kernel.put_pod(&fixture.record(Mode::Strict)).unwrap();
    drop(kernel);
    let kernel = fixture.load();
    assert_eq!(entries(&kernel, "PROBES"), 2 * 2);
    kernel.remove_pod(fixture.netns_cookie).unwrap();
    drop(kernel);
    let kernel = fixture.load();
    assert_eq!(entries(&kernel, "PROBES"), 0);
    kernel
        .attach_lookup(fixture.pod.file.as_fd(), &fixture.record(Mode::Strict))
        .unwrap();
    declare(&fixture, &kernel, &[8080]);
    kernel.detach_lookup(fixture.netns_cookie).unwrap();
    assert_eq!(entries(&kernel, "PROBES"), 0);
}

#[test]
fn probes_that_cannot_even_send_a_syn_leave_nothing_behind() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    let kubelet = Cgroup::new(&fixture, "kubelet");
    kernel
        .set_probe_cgroups(std::slice::from_ref(&kubelet.0), &NO_PODS)
        .unwrap();
    declare(&fixture, &kernel, &[8080]);
    crate::fixture::run(&format!("ip -n {} link set eth0 down", fixture.peer.name));
    let output = kubelet
        .connect(&fixture, "", (POD_V4, 8080).into())
        .wait_with_output()
        .unwrap();
    assert!(!output.status.success());
    wait_until("the probe was seen", || {
        counters(&kernel)["connect_probe"] == 1
    });
    assert_eq!(counters(&kernel)["tuple_admitted"], 0);
    assert_eq!(entries(&kernel, "ADMITTED"), 0);
}
