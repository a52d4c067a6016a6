//! Two nodes of their own for each proxy, alike but for what stands between client and server.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path as File, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use undermesh_lab::envoy::{Envoy, Sidecars};
use undermesh_lab::figures::Figures;
use undermesh_lab::load::{LoadKind, LoadOptions, LoadReport, SinkOptions, SinkReport};
use undermesh_lab::metrics::Metrics;
use undermesh_lab::process::{self, Process};
use undermesh_lab::traffic;
use undermesh_lab::{Binaries, Lab, PodHandle, PodSpec, Side, machine, wait};

use super::rows::{Layer, Path, Processors, Proxy, Row};
use super::settings::CUBIC;

/// Ports of the server that no name calls HTTP. Several, so that connections that come and go do not run out of
/// the client's ports.
const OPAQUE: [u16; 4] = [7000, 7001, 7002, 7003];
/// The port that a name calls HTTP.
const HTTP: u16 = 7100;
/// Where the client runs, and where the server does.
const CLIENT_CPU: usize = 0;
const SERVER_CPU: usize = 1;
/// Of the same processes, run after run.
const WARM_UP: Duration = Duration::from_millis(200);
const START: Duration = Duration::from_secs(20);
/// For all of the idle connections to be open, and for all to be closed.
const HELD: Duration = Duration::from_secs(120);
const REQUESTS: &str = "undermesh_http_requests_total";

/// While they live, no processor halts.
struct Spinners {
    _processes: Vec<Process>,
}

impl Spinners {
    fn start(program: &File, dir: &File) -> Result<Self> {
        let spin = |cpu: usize| {
            let mut command = Command::new("chrt");
            command.args(["--idle", "0"]).arg(program);
            command.args(["spin", "--cpu", &cpu.to_string()]);
            Process::start("spinner", command, &dir.join("spinner.log"))
        };
        Ok(Self {
            _processes: (0..machine::cpus()).map(spin).collect::<Result<_>>()?,
        })
    }
}

/// A client on one node, a server beside it and one on the other node.
pub struct Stage {
    proxy: Proxy,
    lab: Lab,
    envoy: Option<Envoy>,
    load: PathBuf,
    sidecars: RefCell<BTreeMap<&'static str, Sidecars>>,
    servers: Vec<(Path, Process, PathBuf)>,
}

/// Pod of the server on that path.
fn server_of(path: Path) -> &'static str {
    match path {
        Path::SameNode => "near",
        Path::CrossNode => "far",
    }
}

impl Stage {
    /// `tag` tells stages of one proxy apart.
    pub fn build(
        proxy: Proxy,
        binaries: &Binaries,
        envoy: Option<&Envoy>,
        tag: &str,
    ) -> Result<Self> {
        let meshed = proxy.meshed();
        let pod = |name: &str, side| {
            let pod = PodSpec::new(name).on(side);
            if meshed { pod } else { pod.outside() }
        };
        let mut builder = Lab::builder()
            .id(&format!(
                "bench{}-{tag}{}",
                std::process::id(),
                proxy as usize
            ))
            .binaries(binaries.clone())
            .pod(pod("client", Side::A))
            .pod(pod("near", Side::A))
            .pod(pod("far", Side::B))
            .document(service("near"))
            .document(service("far"));
        if !meshed {
            builder = builder.without_agents();
        }
        let lab = builder.start()?;
        for name in ["client", "near", "far"] {
            let netns = lab.pod(name)?.place().netns;
            // The agent sets the second for its pods; without it connections run out of ports.
            netns.sysctl(&[
                ("ipv4/tcp_congestion_control", CUBIC),
                ("ipv4/tcp_tw_reuse", "1"),
            ])?;
            if meshed {
                lab.wait_enrolled(&lab.pod(name)?)?;
            }
        }
        let mut servers = Vec::new();
        for path in [Path::SameNode, Path::CrossNode] {
            let pod = lab.pod(server_of(path))?;
            let (process, control) = serve(&pod, &binaries.load)?;
            servers.push((path, process, control));
        }
        Ok(Self {
            proxy,
            lab,
            envoy: envoy.cloned(),
            load: binaries.load.clone(),
            sidecars: RefCell::default(),
            servers,
        })
    }

    /// Where the client connects to. The address of the Service, as applications do; Envoy's port where there
    /// is nobody to redirect.
    fn to(&self, path: Path, layer: Layer) -> Result<Vec<SocketAddr>> {
        let server = server_of(path);
        if let Some(protocol) = self.proxy.envoy() {
            let listen = match path {
                Path::SameNode => SocketAddr::from(([127, 0, 0, 2], OPAQUE[0])),
                Path::CrossNode => SocketAddr::from(([127, 0, 0, 1], OPAQUE[0])),
            };
            let mut sidecars = self.sidecars.borrow_mut();
            if !sidecars.contains_key(path.name()) {
                let envoy = self.envoy.as_ref().context("no Envoy")?;
                let (client, server) = (self.lab.pod("client")?, self.lab.pod(server)?);
                let pair = Sidecars::start(envoy, protocol, &client, listen, &server, OPAQUE[0])?;
                sidecars.insert(path.name(), pair);
            }
            return Ok(vec![listen]);
        }
        match layer {
            Layer::Http => Ok(vec![self.lab.service(server, HTTP)?]),
            Layer::Opaque => OPAQUE
                .iter()
                .map(|port| self.lab.service(server, *port))
                .collect(),
        }
    }

    /// Processes whose costs count.
    fn pids(&self, path: Path) -> Result<Vec<i32>> {
        match self.proxy {
            Proxy::Direct => Ok(Vec::new()),
            Proxy::Undermesh | Proxy::Former => {
                let sides: &[Side] = match path {
                    Path::SameNode => &[Side::A],
                    Path::CrossNode => &Side::ALL,
                };
                let pid = |side: &Side| self.lab.node(*side)?.agent().pid()?.context("no agent");
                sides.iter().map(pid).collect()
            }
            Proxy::EnvoyTcp | Proxy::EnvoyHbone | Proxy::EnvoyHttp => {
                let sidecars = self.sidecars.borrow();
                Ok(sidecars.get(path.name()).map_or(Vec::new(), Sidecars::pids))
            }
        }
    }

    /// Resident memory of the proxies, in bytes.
    pub fn resident_bytes(&self) -> Result<u64> {
        let pids = self.pids(Path::CrossNode)?;
        let resident = |pid: i32| process::resident_bytes(pid).context("a proxy is gone");
        pids.into_iter().map(resident).sum()
    }

    /// Starts what a cross-node load needs.
    pub fn warm(&self) -> Result<()> {
        self.to(Path::CrossNode, Layer::Opaque).map(|_| ())
    }

    /// How many connections the server on that path has accepted.
    pub fn served(&self, path: Path) -> Result<u64> {
        Ok(traffic::query::<SinkReport>(self.control(path)?)?.accepted)
    }

    /// Where the server on that path is asked.
    fn control(&self, path: Path) -> Result<&File> {
        let mut servers = self.servers.iter();
        let (.., control) = servers
            .find(|(own, ..)| *own == path)
            .context("no server")?;
        Ok(control)
    }

    /// What the agents have counted.
    pub fn figures(&self) -> Result<Figures> {
        Figures::read(&self.lab)
    }

    /// Runs the client once.
    pub fn measure(&self, row: &Row, window: Duration) -> Result<LoadReport> {
        let to = self.to(row.path, row.layer)?;
        let options = LoadOptions {
            connections: row.connections,
            rate: row.rate,
            warm_up: WARM_UP,
            window,
            cpu: Some(CLIENT_CPU),
            watch: self.pids(row.path)?,
            server: match row.kind {
                LoadKind::Bulk => Some(self.control(row.path)?.to_owned()),
                _ => None,
            },
            ..LoadOptions::new(row.kind, to)
        };
        let pod = self.lab.pod("client")?;
        let seen = self.seen(row)?;
        let _spinners = match row.processors {
            Processors::Awake => Some(Spinners::start(&self.load, &pod.record().dir)?),
            Processors::Halting => None,
        };
        let output = pod.run(&self.load.display().to_string(), &options.to_args())?;
        let report: LoadReport = serde_json::from_str(output.trim())
            .with_context(|| format!("no report: {output:.200}"))?;
        if let Some(before) = seen {
            self.check_carried(row, &report, &before)?;
        }
        Ok(report)
    }

    /// Whether the agent takes HTTP apart, by its own count of a request that is sent for this.
    pub fn speaks_http(&self) -> Result<bool> {
        let row = Row {
            connections: 1,
            ..*super::rows::ROWS
                .iter()
                .find(|row| row.layer == Layer::Http)
                .context("no row of HTTP")?
        };
        self.measure(&row, Duration::from_millis(200))?;
        let mut requests = 0;
        for side in Side::ALL {
            let metrics = Metrics::parse(&self.lab.node(side)?.agent().metrics()?);
            requests += metrics.count(REQUESTS, &[]);
        }
        Ok(requests > 0)
    }

    fn seen(&self, row: &Row) -> Result<Option<Figures>> {
        // What HTTP counts is for others to know: requests of one connection may take several ways.
        if !self.proxy.meshed() || row.layer == Layer::Http {
            return Ok(None);
        }
        self.figures().map(Some)
    }

    /// What was measured must have gone the way that it is measured for: over mTLS across nodes, and within one
    /// without.
    fn check_carried(&self, row: &Row, report: &LoadReport, before: &Figures) -> Result<()> {
        let least = match row.kind {
            LoadKind::Connect => report.operations,
            _ => row.connections as u64,
        };
        wait::until_true("the agents' count of connections", START, || {
            let seen = self.figures()?.since(before);
            let carried = match row.path {
                Path::SameNode => seen.same_node,
                Path::CrossNode => seen.mutual_tls,
            };
            ensure!(carried >= least, "{carried} of {least}");
            Ok(true)
        })
    }

    /// Opens idle connections across nodes, and gives back who holds them.
    pub fn hold(&self, connections: usize) -> Result<Process> {
        let options = LoadOptions {
            connections,
            cpu: Some(CLIENT_CPU),
            ..LoadOptions::new(LoadKind::Hold, self.to(Path::CrossNode, Layer::Opaque)?)
        };
        let pod = self.lab.pod("client")?;
        let name = format!("hold-{connections}");
        let program = self.load.display().to_string();
        let mut process = pod.spawn(&name, &program, &options.to_args())?;
        process.until("idle connections to be open", HELD, |process| {
            Ok(process.output().contains('{'))
        })?;
        let report: LoadReport = serde_json::from_str(process.output().trim())?;
        ensure!(
            report.operations == connections as u64,
            "{} of {connections} connections: {:?}",
            report.operations,
            report.examples
        );
        Ok(process)
    }
}

/// Closes all that it holds.
pub fn release(mut holder: Process) -> Result<()> {
    holder.stop(Signal::SIGTERM, HELD).map(|_| ())
}

fn serve(pod: &PodHandle, program: &File) -> Result<(Process, PathBuf)> {
    let control = pod.record().dir.join("load.sock");
    let options = SinkOptions {
        port: OPAQUE.into_iter().chain([HTTP]).collect(),
        cpu: Some(SERVER_CPU),
        control: control.clone(),
    };
    let mut process = pod.spawn("load", &program.display().to_string(), &options.to_args())?;
    process.until("the server to start", START, |_| Ok(control.exists()))?;
    Ok((process, control))
}

/// A Service whose ports say what they carry.
fn service(name: &str) -> Value {
    let mut ports: Vec<Value> = OPAQUE
        .iter()
        .map(|port| {
            json!({"name": format!("tcp-{port}"), "port": port, "targetPort": port, "protocol": "TCP"})
        })
        .collect();
    ports.push(json!({
        "name": "http", "port": HTTP, "targetPort": HTTP, "protocol": "TCP", "appProtocol": "http",
    }));
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"selector": {"app": name}, "ports": ports},
    })
}
