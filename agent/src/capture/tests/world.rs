//! Pods made of network namespaces on a bridge, a cgroup and a bpffs of their own. Needs root.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use crate::capture::{
    Accepted, Capture, CaptureOptions, Handed, Handler, KernelOptions, Phase, PodStatus, Role,
};
use crate::mesh::{
    Endpoint, Membership, MeshConfig, Mode, ObjectName, Sandbox, Service, ServicePort, Snapshot,
    SpiffeId, TrustDomain, Workload, WorkloadUid,
};
use crate::workers::Workers;

/// Long enough for a busy machine; nothing waits for as long unless it fails.
pub const LIMIT: Duration = Duration::from_secs(20);
pub const NODE: &str = "node-a";
pub const VIP: &str = "10.96.0.10:80";
pub const VIP6: &str = "[fd96::10]:80";

/// A name that no other test and no other process has.
fn unique(kind: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("ue{kind}{}-{number}", std::process::id())
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// The cgroup that this process is in while a world exists: sockets belong to the cgroup of the
/// process that makes them.
struct Cgroup {
    path: PathBuf,
    former: PathBuf,
    users: usize,
}

static CGROUP: Mutex<Option<Cgroup>> = Mutex::new(None);

struct InCgroup(PathBuf);

impl InCgroup {
    fn enter() -> Self {
        let mut cgroup = CGROUP.lock().unwrap();
        let cgroup = cgroup.get_or_insert_with(|| {
            let root = fs::read_to_string("/proc/self/mountinfo")
                .unwrap()
                .lines()
                .find(|line| line.contains(" - cgroup2 "))
                .map(|line| PathBuf::from(line.split(' ').nth(4).unwrap()))
                .expect("a cgroup2 mount");
            let own = fs::read_to_string("/proc/self/cgroup").unwrap();
            let own = own
                .lines()
                .find_map(|line| line.strip_prefix("0::/"))
                .unwrap()
                .to_owned();
            let path = root.join(unique("c"));
            fs::create_dir(&path).unwrap();
            move_to(&path).unwrap();
            Cgroup {
                path,
                former: root.join(own),
                users: 0,
            }
        });
        cgroup.users += 1;
        Self(cgroup.path.clone())
    }
}

fn move_to(path: &Path) -> std::io::Result<()> {
    fs::write(path.join("cgroup.procs"), std::process::id().to_string())
}

impl Drop for InCgroup {
    fn drop(&mut self) {
        let mut shared = CGROUP.lock().unwrap();
        if let Some(cgroup) = shared.as_mut() {
            cgroup.users -= 1;
            if cgroup.users == 0 {
                let _ = move_to(&cgroup.former);
                let _ = fs::remove_dir(&cgroup.path);
                *shared = None;
            }
        }
    }
}

struct Bpffs(tempfile::TempDir);

impl Bpffs {
    fn mount() -> Self {
        let directory = tempfile::tempdir().unwrap();
        mount(
            Some("bpf"),
            directory.path(),
            Some("bpf"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        Self(directory)
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

/// A network namespace under /run/netns.
pub struct Namespace(pub String);

impl Namespace {
    fn new(kind: &str) -> Self {
        let name = unique(kind);
        ip(&format!("netns add {name}"));
        ip(&format!("-n {name} link set lo up"));
        Self(name)
    }

    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.0)
    }

    pub fn ip(&self, arguments: &str) -> String {
        ip(&format!("-n {} {arguments}", self.0))
    }

    /// Runs in the namespace, on a thread of its own.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        self.spawn(job).join().unwrap()
    }

    pub fn spawn<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> std::thread::JoinHandle<T> {
        let netns = fs::File::open(self.path()).unwrap();
        std::thread::spawn(move || {
            setns(&netns, CloneFlags::CLONE_NEWNET).unwrap();
            drop(netns);
            job()
        })
    }

    /// All that capture may change, for comparison.
    pub fn network(&self) -> Vec<String> {
        let settings = self.run(|| {
            [
                "net/ipv4/tcp_fwmark_accept",
                "net/ipv4/fwmark_reflect",
                "net/ipv6/fwmark_reflect",
                "net/ipv4/tcp_tw_reuse",
            ]
            .map(|name| fs::read_to_string(format!("/proc/sys/{name}")).unwrap())
        });
        let mut found = vec![
            self.ip("rule"),
            self.ip("-6 rule"),
            self.ip("route show table all"),
            self.ip("-6 route show table all"),
        ];
        found.extend(settings);
        found
    }

    pub fn delete(&self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).output();
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.delete();
    }
}

/// A pod.
pub struct Pod {
    pub namespace: Namespace,
    pub name: String,
    pub v4: IpAddr,
    pub v6: IpAddr,
}

impl Pod {
    pub fn uid(&self) -> WorkloadUid {
        WorkloadUid(self.name.as_str().into())
    }

    pub fn v4(&self, port: u16) -> SocketAddr {
        (self.v4, port).into()
    }

    pub fn v6(&self, port: u16) -> SocketAddr {
        (self.v6, port).into()
    }

    pub fn workload(&self, mode: Mode) -> Workload {
        workload(
            &self.name,
            &self.namespace.path(),
            &[self.v4, self.v6],
            mode,
        )
    }
}

pub fn workload(name: &str, netns: &Path, addresses: &[IpAddr], mode: Mode) -> Workload {
    Workload {
        uid: WorkloadUid(name.into()),
        name: ObjectName::new("default", name),
        workload: name.into(),
        version: None,
        node: NODE.into(),
        identity: SpiffeId::new(TrustDomain::default(), "default", name).unwrap(),
        addresses: addresses.to_vec(),
        labels: Arc::default(),
        named_ports: Default::default(),
        probe_ports: Default::default(),
        opaque_ports: Default::default(),
        membership: Membership::Meshed(mode),
        readiness: crate::mesh::Readiness::Ready,
        sandbox: Some(Sandbox {
            netns: netns.to_owned(),
            cgroup: None,
        }),
    }
}

/// Everything that a test runs in. Fields are dropped in this order.
pub struct World {
    pub pods: Vec<Pod>,
    fabric: Namespace,
    bpffs: Bpffs,
    cgroup: InCgroup,
}

impl World {
    /// With so many pods on one bridge.
    pub fn new(pods: u8) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "this test needs root");
        let cgroup = InCgroup::enter();
        let fabric = Namespace::new("f");
        fabric.ip("link add br0 type bridge");
        fabric.ip("link set br0 up");
        fabric.ip("addr add 10.244.0.1/24 dev br0");
        fabric.ip("-6 addr add fd00::1/64 dev br0 nodad");
        let mut world = Self {
            pods: Vec::new(),
            fabric,
            bpffs: Bpffs::mount(),
            cgroup,
        };
        for number in 0..pods {
            world.add_pod(number);
        }
        world
    }

    fn add_pod(&mut self, number: u8) {
        let namespace = Namespace::new("p");
        let host = number + 5;
        let (fabric, name) = (&self.fabric.0, &namespace.0);
        ip(&format!(
            "-n {fabric} link add port{number} type veth peer name eth0 netns {name}"
        ));
        self.fabric
            .ip(&format!("link set port{number} master br0 up"));
        namespace.ip("link set eth0 addrgenmode none");
        namespace.ip(&format!("addr add 10.244.0.{host}/24 dev eth0"));
        namespace.ip(&format!("-6 addr add fd00::{host}/64 dev eth0 nodad"));
        namespace.ip("link set eth0 up");
        namespace.ip("route add default via 10.244.0.1");
        namespace.ip("-6 route add default via fd00::1");
        let address = |text: String| text.parse().unwrap();
        self.pods.push(Pod {
            name: format!("pod-{number}"),
            v4: address(format!("10.244.0.{host}")),
            v6: address(format!("fd00::{host}")),
            namespace,
        });
    }

    pub fn fabric(&self) -> &Namespace {
        &self.fabric
    }

    /// All pods in the mesh, and a Service before the last of them.
    pub fn snapshot(&self, mode: Mode) -> Snapshot {
        let mut snapshot = Snapshot::new(MeshConfig {
            drain_timeout: Duration::from_millis(300),
            ..MeshConfig::default()
        });
        for pod in &self.pods {
            snapshot.insert_workload(Arc::new(pod.workload(mode)));
        }
        if let Some(last) = self.pods.last() {
            snapshot.insert_service(Arc::new(service(last)));
        }
        snapshot
    }

    /// The cgroup that the programs are attached to.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup.0
    }

    fn options(&self, probe_cgroups: &[PathBuf]) -> CaptureOptions {
        CaptureOptions {
            node: NODE.to_owned(),
            kernel: KernelOptions {
                cgroup: self.cgroup.0.clone(),
                pins: self.bpffs.0.path().join("undermesh"),
            },
            probe_cgroups: probe_cgroups.to_vec(),
        }
    }

    /// Starts capture with a handler that gives the test what it accepts.
    pub fn start(&self) -> Running {
        self.start_probed_by(&[])
    }

    /// The same, where these cgroups may probe.
    pub fn start_probed_by(&self, probe_cgroups: &[PathBuf]) -> Running {
        let (sender, accepted) = mpsc::unbounded_channel();
        let options = self.options(probe_cgroups);
        Running {
            capture: Capture::start(
                options,
                Arc::new(Forward(sender)),
                Workers::start(2).unwrap(),
            )
            .unwrap(),
            accepted,
        }
    }

    /// The same beside another that still accepts.
    pub fn start_beside(&self, handed: Vec<Handed>, probe_cgroups: &[PathBuf]) -> Running {
        let (sender, accepted) = mpsc::unbounded_channel();
        let options = self.options(probe_cgroups);
        let handler = Arc::new(Forward(sender));
        Running {
            capture: Capture::start_beside(options, handler, Workers::start(2).unwrap(), handed)
                .unwrap(),
            accepted,
        }
    }

    /// Starts capture with all pods in the mesh, and waits until they are.
    pub async fn enrolled(&self, mode: Mode) -> Running {
        let running = self.start();
        running.capture.apply(Arc::new(self.snapshot(mode)));
        for pod in &self.pods {
            running.reaches(pod, Phase::Enrolled).await;
        }
        running
    }
}

fn service(pod: &Pod) -> Service {
    let vip: SocketAddr = VIP.parse().unwrap();
    let vip6: SocketAddr = VIP6.parse().unwrap();
    Service {
        name: ObjectName::new("default", "web"),
        vips: vec![vip.ip(), vip6.ip()],
        ports: vec![ServicePort {
            name: "".into(),
            port: 80,
            app_protocol: None,
            opaque: false,
            endpoints: Arc::new([Endpoint {
                address: pod.v4(8080),
                readiness: crate::mesh::Readiness::Ready,
                workload: Some(pod.uid()),
            }]),
        }],
    }
}

struct Forward(mpsc::UnboundedSender<Accepted>);

impl Handler for Forward {
    fn handle(&self, accepted: Accepted) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let role = accepted.role;
        let _ = self.0.send(accepted);
        Box::pin(async move {
            // A tunnel is served for as long as its peer keeps it.
            if role == Role::Hbone {
                std::future::pending().await
            }
        })
    }
}

pub struct Running {
    pub capture: Arc<Capture>,
    pub accepted: mpsc::UnboundedReceiver<Accepted>,
}

impl Running {
    pub fn status(&self, pod: &Pod) -> Option<PodStatus> {
        let uid = pod.uid();
        self.capture
            .pods()
            .into_iter()
            .find(|status| status.uid == uid)
    }

    pub async fn reaches(&self, pod: &Pod, phase: Phase) -> PodStatus {
        self.until(&format!("{} is {phase:?}", pod.name), || {
            self.status(pod).filter(|status| status.phase == phase)
        })
        .await
    }

    /// Waits for a condition; fails with all statuses when it does not come.
    pub async fn until<T>(&self, what: &str, condition: impl Fn() -> Option<T>) -> T {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(found) = condition() {
                return found;
            }
            assert!(
                Instant::now() < deadline,
                "not within {LIMIT:?}: {what}\n{:#?}\n{:#?}",
                self.capture.pods(),
                self.capture.counters()
            );
            sleep(Duration::from_millis(10)).await;
        }
    }

    pub async fn next(&mut self) -> Accepted {
        match timeout(LIMIT, self.accepted.recv()).await {
            Ok(Some(accepted)) => accepted,
            _ => panic!(
                "nothing was accepted: {:#?}\n{:#?}",
                self.capture.counters(),
                self.capture.kernel().counters()
            ),
        }
    }
}
