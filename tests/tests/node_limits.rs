//! What an agent owes its node: the kubelet's probes pass and nothing else does, what passes the mesh
//! by is counted, and one pod's greed is not another's loss.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use undermesh_lab::cgroup::{Cgroup, mount_point};
use undermesh_lab::metrics::Metrics;
use undermesh_lab::process::{Place, Process};
use undermesh_lab::traffic::{ClientOptions, ClientReport, ServeOptions};
use undermesh_lab::{Lab, NodeHandle, PodSpec, Side, wait};

const APP: u16 = 7000;
const HEALTH: u16 = 7001;
const SETTLE: Duration = Duration::from_secs(15);
const VERDICTS: &str = "undermesh_kernel_verdicts_total";

/// An agent with more arguments in place of the one that runs.
fn restart(node: &NodeHandle, more: &[String]) -> Result<Process> {
    let agent = node.agent();
    agent.end(Signal::SIGTERM)?;
    let mut process = agent.spawn(more, &[])?;
    agent.wait_ready(&mut process)?;
    Ok(process)
}

/// Beside the pods, in the node's network.
fn place(node: &NodeHandle, cgroup: &str) -> Result<Place> {
    let path = node.record().cgroup.join(cgroup);
    Ok(Place {
        cgroup: Cgroup::create(&path)?,
        ..node.place()
    })
}

fn traffic(lab: &Lab, place: &Place, options: &ClientOptions) -> Result<ClientReport> {
    let program = lab.state().binaries.traffic.display().to_string();
    let output = place.output(&program, &options.to_args())?;
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text).with_context(|| text.into_owned())
}

fn verdicts(node: &NodeHandle, verdict: &str) -> Result<u64> {
    let metrics = Metrics::parse(&node.agent().metrics()?);
    Ok(metrics.count(VERDICTS, &[("verdict", verdict)]))
}

#[test]
fn a_strict_pod_answers_the_kubelets_probes_on_declared_ports_and_nobody_elses() -> Result<()> {
    let lab = Lab::builder()
        .pod(
            PodSpec::new("web")
                .on(Side::A)
                .strict()
                .probe("readinessProbe", json!({"tcpSocket": {"port": "health"}}))
                .port("health", HEALTH),
        )
        .start()?;
    let (node, web) = (lab.node(Side::A)?, lab.pod("web")?);
    let _server = web.serve(ServeOptions::new().echo(APP).echo(HEALTH))?;
    let path = node.record().cgroup.join("kubelet.service");
    let option = ["--probe-cgroup".to_owned(), path.display().to_string()];
    let _agent = restart(&node, &option)?;
    node.agent().wait_enrolled(&web.full_name())?;
    let state = || -> Result<String> {
        let kernel = node.agent().admin("/kernel")?;
        Ok(kernel["probe_cgroups"][0]["state"].to_string())
    };
    ensure!(state()?.contains("absent"), "{}", state()?);
    let pods = node.agent().admin("/pods")?;
    ensure!(pods[0]["probe_ports"] == json!([HEALTH]), "{pods}");

    let other = node.place();
    let mut admitted = 0;
    for round in 0..2 {
        // The kubelet comes later than the agent, and once more after its service was started again.
        let kubelet = place(&node, "kubelet.service")?;
        wait::until_true("the kubelet's cgroup to be known", SETTLE, || {
            Ok(state()?.contains("known"))
        })?;
        for (health, app) in [
            (web.v4(HEALTH), web.v4(APP)),
            (web.v6(HEALTH)?, web.v6(APP)?),
        ] {
            let probe = ClientOptions::echo(health).connections(20).concurrency(4);
            let report = traffic(&lab, &kubelet, &probe)?;
            ensure!(
                (report.ok, report.failed) == (20, 0),
                "{health} {round}: {report:?}"
            );
            admitted += 20;
            for (place, to) in [(&kubelet, app), (&other, health), (&other, app)] {
                let report = traffic(&lab, place, &ClientOptions::echo(to).connections(5))?;
                ensure!(
                    (report.ok, report.failed) == (0, 5),
                    "{to} {round}: {report:?}"
                );
            }
        }
        // io_uring connects in the kubelet's name too.
        let connects = lab
            .state()
            .binaries
            .traffic
            .with_file_name("undermesh-connects");
        let line = ["connect", "--kind", "io_uring", "--attempts", "5", "--to"];
        for (place, right) in [(&kubelet, 5), (&other, 0)] {
            let mut line: Vec<String> = line.iter().map(|&word| word.to_owned()).collect();
            line.push(web.v4(HEALTH).to_string());
            let output = place.run(&connects.display().to_string(), &line)?;
            let report: serde_json::Value = serde_json::from_str(&output)?;
            ensure!(report["right"] == right, "io_uring {round}: {report}");
            admitted += right;
        }
        ensure!(verdicts(&node, "connect_probe")? == admitted);
        ensure!(verdicts(&node, "lookup_admitted")? >= admitted);
        ensure!(verdicts(&node, "connect_probe_foreign")? > 0);
        ensure!(verdicts(&node, "connect_probe_undeclared")? > 0);
        kubelet.cgroup.wait_empty(SETTLE)?;
        fs::remove_dir(kubelet.cgroup.path())?;
        wait::until_true("the kubelet's cgroup to be gone", SETTLE, || {
            Ok(state()?.contains("absent"))
        })?;
    }

    // Nobody needs the agent for it.
    let kubelet = place(&node, "kubelet.service")?;
    wait::until_true("the kubelet's cgroup to be known", SETTLE, || {
        Ok(state()?.contains("known"))
    })?;
    node.agent().end(Signal::SIGKILL)?;
    for (place, to, ok) in [
        (&kubelet, HEALTH, 5),
        (&kubelet, APP, 0),
        (&other, HEALTH, 0),
    ] {
        let report = traffic(&lab, place, &ClientOptions::echo(web.v4(to)).connections(5))?;
        ensure!(
            (report.ok, report.failed) == (ok, 5 - ok),
            "{to}: {report:?}"
        );
    }
    Ok(())
}

#[test]
fn what_a_pod_sends_past_the_mesh_is_counted_by_class_and_goes_with_the_pod() -> Result<()> {
    const BYTES: u64 = 40 * 64;
    let lab = Lab::builder()
        .pod(PodSpec::new("web").on(Side::A).strict())
        .pod(PodSpec::new("outsider").on(Side::B).outside())
        .start()?;
    let (node, web, outsider) = (lab.node(Side::A)?, lab.pod("web")?, lab.pod("outsider")?);
    let _server = outsider.serve(ServeOptions::new().echo(APP))?;
    let options = ClientOptions::echo(outsider.v4(APP)).connections(40);
    let report = web.traffic(&options)?;
    ensure!((report.ok, report.failed) == (40, 0), "{report:?}");
    let refused = web.traffic(&ClientOptions::echo((node.record().address, 9).into()))?;
    ensure!(refused.failed == 1, "{refused:?}");
    let pod = web.full_name();
    let count = |name: &str, class: &str| -> Result<u64> {
        let metrics = Metrics::parse(&node.agent().metrics()?);
        let labels = [("source_pod", &*pod), ("destination_class", class)];
        Ok(metrics.count(&format!("undermesh_native_{name}_total"), &labels))
    };
    wait::until_true("the connections to be counted", SETTLE, || {
        Ok(count("connections_closed", "private")? == 40
            && count("connections_closed", "node")? == 1)
    })?;
    ensure!(count("connections_failed", "private")? == 0);
    ensure!(count("connections_failed", "node")? == 1);
    ensure!(count("rtt_samples", "private")? == 40);
    // 40 lines of any length, there and back.
    let (sent, received) = (
        count("sent_bytes", "private")?,
        count("received_bytes", "private")?,
    );
    ensure!(sent >= 40 && received >= 40, "{sent} {received}");
    ensure!(sent.abs_diff(received) <= BYTES, "{sent} {received}");
    let shown = node.agent().admin("/pods")?;
    let native = &shown[0]["native"]["private"];
    ensure!(
        native["closed"] == 40 && native["mean_rtt_seconds"].as_f64() > Some(0.0),
        "{shown}"
    );
    lab.remove_pod("web")?;
    wait::until_true("the pod's series to go", SETTLE, || {
        Ok(!node
            .agent()
            .metrics()?
            .contains("undermesh_native_connections_closed_total{"))
    })?;
    Ok(())
}

/// An agent below a hard limit of descriptors, or in a cgroup of the memory controller.
fn wrapped(lab: &Lab, node: &NodeHandle, wrapper: &[&str]) -> Result<Process> {
    let agent = node.agent();
    agent.end(Signal::SIGTERM)?;
    let place = place(node, "agent")?;
    let mut command = place.detached(wrapper[0]);
    command
        .args(&wrapper[1..])
        .arg(lab.state().binaries.agent)
        .args(agent.arguments());
    let mut process = Process::start("wrapped agent", command, &agent.log())?;
    agent.wait_ready(&mut process)?;
    Ok(process)
}

#[test]
fn two_greedy_pods_do_not_use_up_what_a_third_needs() -> Result<()> {
    const DESCRIPTORS: &str = "--nofile=3072:3072";
    /// Each alone could take all of (3072 - 1024) / 2.
    const EACH: u32 = 1_100;
    let lab = Lab::builder()
        .pod(PodSpec::new("first").on(Side::A).strict())
        .pod(PodSpec::new("second").on(Side::A).strict())
        .pod(PodSpec::new("bystander").on(Side::A).strict())
        .pod(PodSpec::new("near").on(Side::A).strict())
        .start()?;
    let node = lab.node(Side::A)?;
    let near = lab.pod("near")?;
    let _server = near.serve(ServeOptions::new().echo(APP))?;
    let _agent = wrapped(&lab, &node, &["prlimit", DESCRIPTORS])?;
    for pod in ["first", "second", "bystander", "near"] {
        node.agent().wait_enrolled(&lab.pod(pod)?.full_name())?;
    }
    let program = lab
        .state()
        .binaries
        .traffic
        .with_file_name("undermesh-connects");
    let program = program.display().to_string();
    let (to, each) = (near.v4(APP).to_string(), EACH.to_string());
    let line = [
        "attack",
        "--attack",
        "hoard",
        "--seconds",
        "600",
        "--to",
        &to,
        "--attempts",
        &each,
    ];
    let mut hoards = Vec::new();
    for pod in ["first", "second"] {
        let mut hoard = lab.pod(pod)?.spawn("hoard", &program, &line)?;
        hoard.until(
            "connections to be held",
            Duration::from_secs(120),
            |hoard| Ok(hoard.output().contains("held")),
        )?;
        hoards.push(hoard);
    }
    let event = |name: &str| -> Result<u64> {
        let metrics = Metrics::parse(&node.agent().metrics()?);
        Ok(metrics.count("undermesh_capture_events_total", &[("event", name)]))
    };
    ensure!(event("node_full")? > 0);
    let metrics = Metrics::parse(&node.agent().metrics()?);
    for pod in ["first", "second"] {
        let labels = [
            ("pod", &*lab.pod(pod)?.full_name()),
            ("reason", "node_full"),
        ];
        ensure!(
            metrics.count("undermesh_pod_connections_refused_total", &labels) > 0,
            "{pod}"
        );
    }
    let options = ClientOptions::echo(near.v4(APP))
        .connections(60)
        .concurrency(6);
    let report = lab.pod("bystander")?.traffic(&options)?;
    ensure!((report.ok, report.failed) == (60, 0), "{report:?}");
    ensure!(event("accept_backoff")? == 0);
    // What was greedy is a pod like any other again.
    drop(hoards);
    wait::until_true("room for the greedy", SETTLE, || {
        let report = lab.pod("first")?.traffic(&options)?;
        Ok((report.ok, report.failed) == (60, 0))
    })?;
    Ok(())
}

#[test]
fn an_agent_short_of_memory_sheds_new_connections_lives_and_recovers() -> Result<()> {
    let lab = Lab::builder()
        .pod(PodSpec::new("client").on(Side::A).strict())
        .pod(PodSpec::new("near").on(Side::A).strict())
        .start()?;
    let node = lab.node(Side::A)?;
    let (client, near) = (lab.pod("client")?, lab.pod("near")?);
    let _server = near.serve(ServeOptions::new().echo(APP))?;
    let memory = MemoryCgroup::create(&node)?;
    let _agent = wrapped(
        &lab,
        &node,
        &[
            "sh",
            "-c",
            "echo $$ > \"$0\" && exec \"$@\"",
            &memory.procs(),
        ],
    )?;
    for pod in [&client, &near] {
        node.agent().wait_enrolled(&pod.full_name())?;
    }
    let pid = node.agent().pid()?;
    let options = ClientOptions::echo(near.v4(APP))
        .connections(20)
        .concurrency(2);
    let report = client.traffic(&options)?;
    ensure!((report.ok, report.failed) == (20, 0), "{report:?}");
    let idle = ClientOptions::echo(near.v4(APP))
        .requests(2)
        .think(Duration::from_secs(3600));
    let live = client.start_traffic(&idle)?;
    wait::until_true("a connection to be live", SETTLE, || {
        Ok(node.agent().admin("/connections")?[0]["phase"] == "established")
    })?;
    let gauge = |name: &str| -> Result<f64> {
        let metrics = Metrics::parse(&node.agent().metrics()?);
        Ok(metrics.sum(&format!("undermesh_memory_{name}"), &[]))
    };
    // The kernel drops what it can when the limit comes near, so it is set by what is left then.
    memory.limit(256 << 20)?;
    wait::until_true("the agent to be short of memory", SETTLE, || {
        let shedding = gauge("shedding")? > 0.0;
        if !shedding {
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let used = gauge("used_bytes")? as u64;
            ensure!(used > 2 << 20, "an agent of {used} bytes");
            memory.limit(used / 93 * 100)?;
        }
        Ok(shedding)
    })?;
    let report = client.traffic(&options)?;
    ensure!((report.ok, report.failed) == (0, 20), "{report:?}");
    let metrics = Metrics::parse(&node.agent().metrics()?);
    let labels = [("pod", &*client.full_name()), ("reason", "memory")];
    ensure!(metrics.count("undermesh_pod_connections_refused_total", &labels) >= 20);
    let health = node.agent().admin("/healthz")?;
    ensure!(health.to_string().contains("\"shedding\":true"), "{health}");
    memory.limit(1 << 30)?;
    wait::until_true("connections again", SETTLE, || {
        let report = client.traffic(&options)?;
        Ok((report.ok, report.failed) == (20, 0))
    })?;
    ensure!(gauge("shedding")? == 0.0);
    ensure!(node.agent().pid()? == pid, "the agent was killed");
    let shown = node.agent().admin("/connections")?;
    ensure!(
        shown.as_array().is_some_and(|all| !all.is_empty()),
        "{shown}"
    );
    drop(live);
    Ok(())
}

/// A cgroup of the memory controller, of version 1 or, where the machine has that, of 2.
struct MemoryCgroup {
    path: PathBuf,
    limit: &'static str,
    /// Of version 1: then it is nobody else's to remove.
    own: bool,
}

impl MemoryCgroup {
    fn create(node: &NodeHandle) -> Result<Self> {
        let version_1 = Path::new("/sys/fs/cgroup/memory");
        if version_1.exists() {
            let path = version_1.join(format!("undermesh-lab-{}", std::process::id()));
            fs::create_dir(&path)?;
            return Ok(Self {
                path,
                limit: "memory.limit_in_bytes",
                own: true,
            });
        }
        let path = node.record().cgroup.join("agent");
        let mount = mount_point()?;
        let parents: Vec<_> = path
            .ancestors()
            .skip(1)
            .take_while(|parent| parent.starts_with(&mount))
            .collect();
        for parent in parents.iter().rev() {
            fs::write(parent.join("cgroup.subtree_control"), "+memory")
                .with_context(|| parent.display().to_string())?;
        }
        Ok(Self {
            path,
            limit: "memory.max",
            own: false,
        })
    }

    fn procs(&self) -> String {
        self.path.join("cgroup.procs").display().to_string()
    }

    fn limit(&self, bytes: u64) -> Result<()> {
        let file = self.path.join(self.limit);
        fs::write(&file, bytes.to_string())
            .with_context(|| format!("{} to {}", bytes, file.display()))
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        if !self.own {
            return;
        }
        // Whoever is still in it goes to the root: a cgroup with processes cannot be removed.
        let text = fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        for pid in text.lines() {
            let _ = fs::write("/sys/fs/cgroup/memory/cgroup.procs", pid);
        }
        let _ = fs::remove_dir(&self.path);
    }
}

#[test]
fn connections_that_find_no_room_in_a_listeners_queue_are_counted() -> Result<()> {
    let lab = Lab::builder()
        .pod(PodSpec::new("web").on(Side::A).strict())
        .pod(PodSpec::new("outsider").on(Side::A).outside())
        .without_agents()
        .start()?;
    let (web, outsider) = (lab.pod("web")?, lab.pod("outsider")?);
    web.place().netns.sysctl(&[("core/somaxconn", "4")])?;
    lab.start_mesh()?;
    let node = lab.node(Side::A)?;
    node.agent().wait_enrolled(&web.full_name())?;
    let dropped = || -> Result<u64> {
        let metrics = Metrics::parse(&node.agent().metrics()?);
        let labels = [("pod", &*web.full_name()), ("listener", "inbound")];
        Ok(metrics.count("undermesh_pod_listener_drops_total", &labels))
    };
    ensure!(dropped()? == 0);
    node.agent().signal(Signal::SIGSTOP)?;
    let options = ClientOptions::echo(web.v4(APP))
        .connections(40)
        .concurrency(40)
        .timeout(Duration::from_secs(2));
    let report = outsider.traffic(&options);
    node.agent().signal(Signal::SIGCONT)?;
    ensure!(report?.failed > 0);
    wait::until_true("drops to be counted", SETTLE, || Ok(dropped()? > 0))?;
    Ok(())
}
