//! A pod and an outside peer as network namespaces, a cgroup, a bpffs: made for one test, gone
//! with it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Protocol, Socket, Type};
use undermesh::capture::kernel::{
    CAPTURE_MARK, Family, Kernel, KernelOptions, ListenerKind, ListenerSlot, PodRecord,
    netns_cookie,
};
use undermesh::mesh::{CaptureTarget, Mode};

pub const POD_V4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
pub const POD_V6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2);
pub const PEER_V4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 9);
pub const PEER_V6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 9);
pub const SERVICE_V4: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
pub const SERVICE_V6: Ipv6Addr = Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 0x10);
/// Long enough for a busy machine; only what fails waits for so long.
pub const LIMIT: Duration = Duration::from_secs(10);

/// Everything that one test needs.
pub struct Fixture {
    pub pod: Namespace,
    pub peer: Namespace,
    pub pins: BpfFs,
    pub cgroup: CgroupGuard,
    pub netns_cookie: u64,
}

impl Fixture {
    pub fn new() -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "umk{}x{}",
            process::id(),
            COUNTER.fetch_add(1, Ordering::Relaxed)
        );
        let cgroup = CgroupGuard::enter();
        let pins = BpfFs::mount(&name);
        let pod = Namespace::new(format!("{name}p"));
        let peer = Namespace::new(format!("{name}q"));
        let (pod_name, peer_name) = (&pod.name, &peer.name);
        run(&format!(
            "ip -n {pod_name} link add eth0 type veth peer name eth0 netns {peer_name}"
        ));
        for (netns, v4, v6) in [(pod_name, POD_V4, POD_V6), (peer_name, PEER_V4, PEER_V6)] {
            run(&format!("ip -n {netns} addr add {v4}/24 dev eth0"));
            run(&format!("ip -n {netns} addr add {v6}/64 dev eth0 nodad"));
            run(&format!("ip -n {netns} link set eth0 up"));
        }
        let mark = format!("{CAPTURE_MARK:#x}/{CAPTURE_MARK:#x}");
        for (ip, address) in [("ip", POD_V4.to_string()), ("ip -6", POD_V6.to_string())] {
            run(&format!(
                "{ip} -n {pod_name} rule add fwmark {mark} lookup 133 pref 1"
            ));
            for (device, metric) in [("lo", 1), ("eth0", 2)] {
                run(&format!(
                    "{ip} -n {pod_name} route add local default dev {device} src {address} \
                     table 133 metric {metric}"
                ));
            }
        }
        for setting in [
            "net.ipv4.tcp_fwmark_accept=1",
            "net.ipv4.fwmark_reflect=1",
            "net.ipv6.fwmark_reflect=1",
        ] {
            pod.sysctl(setting);
        }
        let netns_cookie = pod.enter(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            netns_cookie(socket.as_fd()).unwrap()
        });
        Self {
            pod,
            peer,
            pins,
            cgroup,
            netns_cookie,
        }
    }

    pub fn options(&self) -> KernelOptions {
        KernelOptions {
            cgroup: self.cgroup.path(),
            pins: self.pins.path.clone(),
        }
    }

    pub fn load(&self) -> Kernel {
        Kernel::load(&self.options()).unwrap()
    }

    pub fn record(&self, mode: Mode) -> PodRecord {
        PodRecord {
            netns_cookie: self.netns_cookie,
            v4: Some(POD_V4),
            v6: Some(POD_V6),
            mode,
        }
    }

    /// Pod map and lookup program, no listeners.
    pub fn enrol(&self, kernel: &Kernel, mode: Mode) {
        let record = self.record(mode);
        kernel
            .attach_lookup(self.pod.file.as_fd(), &record)
            .unwrap();
        kernel.put_pod(&record).unwrap();
    }

    /// A listener of the agent's kind in the pod, in its slot.
    pub fn listen(&self, kernel: &Kernel, family: Family, kind: ListenerKind) -> TcpListener {
        let listener = self.pod.enter(|| transparent_listener(family));
        kernel
            .set_listener(self.slot(family, kind), listener.as_fd())
            .unwrap();
        listener
    }

    pub fn slot(&self, family: Family, kind: ListenerKind) -> ListenerSlot {
        ListenerSlot {
            netns_cookie: self.netns_cookie,
            family,
            kind,
        }
    }
}

fn transparent_listener(family: Family) -> TcpListener {
    let (domain, address): (_, SocketAddr) = match family {
        Family::V4 => (Domain::IPV4, (Ipv4Addr::LOCALHOST, 0).into()),
        Family::V6 => (Domain::IPV6, (Ipv6Addr::LOCALHOST, 0).into()),
    };
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP)).unwrap();
    if family == Family::V6 {
        socket.set_only_v6(true).unwrap();
    }
    // One flag for both families: IPv6 sockets take the option of level IP too.
    socket.set_ip_transparent_v4(true).unwrap();
    socket.bind(&address.into()).unwrap();
    socket.listen(4096).unwrap();
    socket.into()
}

/// The next connection, with a deadline.
pub fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    listener.set_nonblocking(true).unwrap();
    let deadline = Instant::now() + LIMIT;
    loop {
        match listener.accept() {
            Ok(accepted) => return accepted,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                assert!(Instant::now() < deadline, "nothing to accept");
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("accept: {error}"),
        }
    }
}

/// Whether no connection waits there.
pub fn is_idle(listener: &TcpListener) -> bool {
    listener.set_nonblocking(true).unwrap();
    listener
        .accept()
        .is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

pub fn target(address: impl Into<IpAddr>, port: Option<u16>) -> CaptureTarget {
    CaptureTarget {
        address: address.into(),
        port,
    }
}

/// Makes these the destinations of the mesh.
pub fn capture(kernel: &Kernel, targets: &[CaptureTarget]) {
    kernel
        .set_targets(&targets.iter().copied().collect())
        .unwrap();
}

/// The counters, without the one connection of its own that the first load looks for.
pub fn counters(kernel: &Kernel) -> BTreeMap<&'static str, u64> {
    kernel
        .counters()
        .into_iter()
        .map(|(name, count)| match name {
            "tuple_admitted" | "tuple_removed" => (name, count.saturating_sub(1)),
            _ => (name, count),
        })
        .collect()
}

/// Waits until a counter has this value: the kernel counts some verdicts after close(2) returned.
pub fn wait_for(kernel: &Kernel, name: &str, value: u64) {
    wait_until(&format!("{name} is {value}"), || {
        counters(kernel)[name] == value
    });
}

/// Waits, with a deadline.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A network namespace.
pub struct Namespace {
    pub name: String,
    pub file: File,
}

impl Namespace {
    fn new(name: String) -> Self {
        run(&format!("ip netns add {name}"));
        let file = File::open(format!("/run/netns/{name}")).unwrap();
        let namespace = Self { name, file };
        run(&format!("ip -n {} link set lo up", namespace.name));
        namespace
    }

    /// Runs it on a thread of its own in the namespace.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            thread.join().unwrap()
        })
    }

    pub fn sysctl(&self, setting: &str) {
        run(&format!("ip netns exec {} sysctl -qw {setting}", self.name));
    }

    pub fn connect(&self, address: impl Into<SocketAddr>) -> io::Result<TcpStream> {
        let address = address.into();
        self.enter(|| TcpStream::connect_timeout(&address, LIMIT))
    }

    pub fn bind(&self, ip: impl Into<IpAddr>) -> TcpListener {
        let ip = ip.into();
        self.enter(|| TcpListener::bind((ip, 0)).unwrap())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "delete", &self.name])
            .status();
    }
}

/// A bpffs of the test's own.
pub struct BpfFs {
    pub path: PathBuf,
}

impl BpfFs {
    fn mount(name: &str) -> Self {
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        let filesystem = Self { path };
        mount(
            Some("bpf"),
            &filesystem.path,
            Some("bpf"),
            MsFlags::empty(),
            None::<&str>,
        )
        .expect("these tests need root");
        filesystem
    }
}

impl Drop for BpfFs {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&self.path);
    }
}

/// This process is in a cgroup of its own as long as one of these is there.
pub struct CgroupGuard;

struct Cgroup {
    own: PathBuf,
    former: PathBuf,
    users: usize,
}

static CGROUP: Mutex<Option<Cgroup>> = Mutex::new(None);

impl CgroupGuard {
    fn enter() -> Self {
        let mut cgroup = lock();
        let cgroup = cgroup.get_or_insert_with(|| {
            let tree = cgroup2();
            let membership = fs::read_to_string("/proc/self/cgroup").unwrap();
            let former = membership
                .lines()
                .find_map(|line| line.strip_prefix("0::/"))
                .expect("this process is in a cgroup2 tree");
            Cgroup {
                own: tree.join(format!("undermesh-kernel-test-{}", process::id())),
                former: tree.join(former),
                users: 0,
            }
        });
        if cgroup.users == 0 {
            fs::create_dir(&cgroup.own).expect("these tests need root");
            join(&cgroup.own);
        }
        cgroup.users += 1;
        Self
    }

    pub fn path(&self) -> PathBuf {
        lock().as_ref().unwrap().own.clone()
    }
}

impl Drop for CgroupGuard {
    fn drop(&mut self) {
        if let Some(cgroup) = lock().as_mut() {
            cgroup.users -= 1;
            if cgroup.users == 0 {
                join(&cgroup.former);
                let _ = fs::remove_dir(&cgroup.own);
            }
        }
    }
}

fn lock() -> std::sync::MutexGuard<'static, Option<Cgroup>> {
    CGROUP
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn join(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.procs"), process::id().to_string()).unwrap();
}

/// Where the cgroup2 tree is mounted.
fn cgroup2() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts
        .lines()
        .find(|line| line.contains(" - cgroup2 "))
        .and_then(|line| line.split(' ').nth(4))
        .expect("a cgroup2 tree is mounted")
        .into()
}

pub fn run(command: &str) {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap())
        .args(words)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
