//! The agent: its parts, put together.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use clap::Args;
use futures_util::future::BoxFuture;
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::admin::breakers::{
    BREAKER_COLUMNS, BreakerWatch, report as report_breakers, rows as breaker_rows,
};
use crate::admin::{Admin, AdminError, AdminOptions, Control, ControlError, Exposure};
use crate::capture::{Capture, CaptureError, CaptureOptions, EnrolError, KernelOptions};
use crate::cli::CONTROL_SOCKET;
use crate::discovery::files::{FileSource, FileSourceError, FileSourceOptions};
use crate::fairness::{Fairness, MachineClock, QuotaLimits, Quotas};
use crate::handover::{Giver, HandoverError};
use crate::http::HttpCounters;
use crate::identity::{
    AuthorityClient, AuthorityClientOptions, Certificates, CertificatesOptions, ClientError,
};
use crate::inbound::{HttpService, Inbound};
use crate::mesh::{MeshConfig, SharedSnapshot, Snapshot};
use crate::outbound::{Clock, Destinations, Outbound, OutboundParts};
use crate::resilience::BreakerBook;
use crate::telemetry::{Logging, Telemetry, housekeep};
use crate::tunnel::{self, Pool, PoolOptions};
use crate::workers::Workers;

mod dispatch;
mod metrics;
mod succession;
mod trim;
mod views;

use self::dispatch::Dispatch;
use self::metrics::{count, count_parts, count_upstreams};
use self::views::{ROUTE_COLUMNS, admin_state, with_policies};

/// How often a stopping agent looks whether its last connection has ended.
const DRAIN_CHECK: Duration = Duration::from_millis(50);

/// Options of `undermesh agent`.
#[derive(Debug, Clone, Args)]
pub struct AgentOptions {
    /// Name of this node, as `spec.nodeName` of its pods says it
    #[arg(long, env = "NODE_NAME")]
    pub node: String,
    /// Directory of Kubernetes manifests that say what the mesh should be; followed
    #[arg(long, value_name = "DIR")]
    pub manifests: PathBuf,
    /// cgroup2 directory that all pods and this agent are below. Default: the root of the cgroup2
    /// mount in /proc/self/mountinfo
    #[arg(long, value_name = "DIR")]
    pub cgroup_root: Option<PathBuf>,
    /// cgroup2 directory of the kubelet, which may appear later: what runs there, or below, reaches
    /// the declared probe ports of STRICT pods. May be repeated
    #[arg(long, value_name = "DIR")]
    pub probe_cgroup: Vec<PathBuf>,
    /// Directory on a bpffs for what outlives the agent
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/undermesh")]
    pub pins: PathBuf,
    /// Where certificates come from
    #[arg(long, value_name = "HOST:PORT")]
    pub ca_address: String,
    /// PEM file of the roots that this mesh trusts
    #[arg(long, value_name = "FILE")]
    pub ca_root: PathBuf,
    /// File of the bearer token by which the CA knows this node
    #[arg(long, value_name = "FILE")]
    pub ca_token_file: PathBuf,
    /// Name that the CA's certificate must carry. Default: the host of --ca-address
    #[arg(long, value_name = "NAME")]
    pub ca_server_name: Option<String>,
    /// Where the admin endpoint listens: loopback only
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:15000")]
    pub admin: SocketAddr,
    /// Unix socket for what changes something, for root alone: forcing circuit breakers
    #[arg(long, value_name = "PATH", default_value = CONTROL_SOCKET)]
    pub admin_socket: PathBuf,
    /// Where metrics are served
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:15020")]
    pub metrics: SocketAddr,
    /// Where readiness is served
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:15021")]
    pub readiness: SocketAddr,
    /// How many seconds live connections may go on after SIGTERM; then they are reset
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    pub shutdown_drain: u64,
    /// Unix socket where a successor takes this agent's listeners, and where a running agent is
    /// looked for at start: if one answers, it is taken over. Default: a file in /run/undermesh that
    /// is named after the device and inode of --pins
    #[arg(long, value_name = "PATH")]
    pub hand_over_socket: Option<PathBuf>,
    /// Take a running agent over, or do not start
    #[arg(long)]
    pub take_over: bool,
    /// How many seconds live connections may go on after a successor has taken over; then they are
    /// reset. SIGTERM meanwhile shortens it to --shutdown-drain
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub hand_over_drain: u64,
    /// Take all pods of this node out of the mesh and everything out of the kernel, instead of
    /// leaving the failure mode in force, when the agent is told to stop
    #[arg(long)]
    pub uninstall_on_stop: bool,
}

/// Why the agent cannot run.
#[derive(Debug, Error)]
pub enum AgentError {
    /// No cgroup2 mount was found.
    #[error("no cgroup2 mount in /proc/self/mountinfo: mount one, or name it with --cgroup-root")]
    NoCgroup2,
    /// The mounts could not be read.
    #[error("/proc/self/mountinfo: {0}")]
    Mounts(std::io::Error),
    /// The kernel side.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The kernel side could not be taken away, or not replaced.
    #[error(transparent)]
    Kernel(#[from] EnrolError),
    /// The CA's address.
    #[error(transparent)]
    Authority(#[from] ClientError),
    /// The manifests.
    #[error(transparent)]
    Manifests(#[from] FileSourceError),
    /// Taking over from a running agent, or waiting for a successor.
    #[error("hand-over: {0}")]
    Handover(#[from] HandoverError),
    /// The admin endpoint.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// The control socket.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// Runs the agent until `stop`, then lets live connections end for a while. The pods' connections are served by
/// `workers`, all else on the runtime that this is called on.
///
/// Boxed, so that what it awaits is compiled with this crate, and not once more with the program.
pub fn run(
    options: AgentOptions,
    logging: &Logging,
    workers: Arc<Workers>,
    stop: CancellationToken,
) -> BoxFuture<'_, Result<(), AgentError>> {
    Box::pin(live(options, logging, workers, stop))
}

async fn live(
    options: AgentOptions,
    logging: &Logging,
    workers: Arc<Workers>,
    stop: CancellationToken,
) -> Result<(), AgentError> {
    let telemetry = Telemetry::new();
    logging.report(&telemetry);
    workers.report(&telemetry);
    let snapshot: SharedSnapshot =
        Arc::new(ArcSwap::from_pointee(Snapshot::new(MeshConfig::default())));
    let background = CancellationToken::new();
    let _background = background.clone().drop_guard();

    let authority = AuthorityClientOptions {
        server_name: options.ca_server_name.clone(),
        ..AuthorityClientOptions::new(
            &options.ca_address,
            &options.ca_root,
            &options.ca_token_file,
        )
    };
    let authority = Arc::new(AuthorityClient::new(authority)?);
    let certificates = Certificates::new(CertificatesOptions::new(authority));
    tokio::spawn(certificates.clone().run(background.clone()));

    let manifests = FileSourceOptions::new(&options.manifests, &options.node);
    let manifests = FileSource::start(manifests, snapshot.clone(), background.clone())?;
    let mut taken = match succession::find(&options).await? {
        Some(running) => {
            let now = snapshot.load();
            tokio::select! {
                taken = succession::prepare(running, &certificates, &now, &options.node) => Some(taken?),
                // The running agent was not touched.
                () = stop.cancelled() => return Ok(()),
            }
        }
        None => None,
    };

    let fairness: Arc<[_]> = workers
        .runtimes()
        .map(|worker| {
            let _on = worker.enter();
            Fairness::start(MachineClock, background.clone())
        })
        .collect();
    let trimmed = workers.clone();
    let pool = Pool::new(PoolOptions::default());
    let leaving = stop.child_token();
    let breakers = BreakerWatch::new();
    let destinations = Destinations::new(
        snapshot.clone(),
        &options.node,
        Clock::start(),
        breakers.clone(),
    );
    let http = Arc::new(HttpCounters::default());
    let quotas = Arc::new(Quotas::new(QuotaLimits::default()));
    let outbound = Outbound::new(OutboundParts {
        snapshot: snapshot.clone(),
        certificates: certificates.clone(),
        tunnels: pool.clone(),
        destinations: destinations.clone(),
        counters: http.clone(),
        telemetry: telemetry.clone(),
        quotas: quotas.clone(),
        drain: leaving.clone(),
    });
    tokio::spawn(outbound.clone().maintain(background.clone()));
    let dispatch = Arc::new(Dispatch {
        outbound: outbound.clone(),
        inbound: Arc::new(Inbound {
            snapshot: snapshot.clone(),
            certificates: certificates.clone(),
            telemetry: telemetry.clone(),
            drain: leaving.clone(),
            http: HttpService {
                counters: http.clone(),
                ..HttpService::default()
            },
        }),
        fairness: fairness.clone(),
        capture: OnceLock::new(),
    });
    let cgroup = match &options.cgroup_root {
        Some(directory) => directory.clone(),
        None => cgroup2_mount()?,
    };
    let capture = CaptureOptions {
        node: options.node.clone(),
        kernel: KernelOptions {
            cgroup,
            pins: options.pins.clone(),
        },
        probe_cgroups: options.probe_cgroup.clone(),
    };
    let mut slots = Vec::new();
    let capture = match &mut taken {
        None => Capture::start(capture, dispatch.clone(), workers)?,
        Some(taken) => {
            let handed = std::mem::take(&mut taken.listeners);
            slots.extend(handed.iter().map(|one| one.slot));
            Capture::start_beside(capture, dispatch.clone(), workers, handed)?
        }
    };
    // Only this place sets it.
    let _ = dispatch.capture.set(Arc::downgrade(&capture));

    tokio::spawn(trim::run(trimmed, telemetry.clone(), background.clone()));
    tokio::spawn(make_room(capture.shortage()));
    tokio::spawn(housekeep(
        telemetry.clone(),
        snapshot.clone(),
        background.clone(),
    ));
    count(&telemetry, &capture, &certificates, &pool, &http);
    let book: Arc<dyn BreakerBook> = destinations;
    report_breakers(&telemetry, &book, &breakers);
    count_upstreams(&telemetry, outbound.upstreams());
    count_parts(&telemetry, fairness, quotas);

    let routed = snapshot.clone();
    let state = admin_state(
        &options,
        &telemetry,
        &capture,
        &certificates,
        &pool,
        &manifests,
        &leaving,
    )
    .view("routes", ROUTE_COLUMNS, move || routed.load().route_views());
    let state = with_policies(state, &snapshot);
    let (shown, watch) = (book.clone(), breakers.clone());
    let state = state.view("breakers", BREAKER_COLUMNS, move || {
        breaker_rows(&*shown, &watch)
    });
    let control = Control::bind(&options.admin_socket, book)?;
    let addresses = AdminOptions {
        admin: options.admin,
        exposure: Exposure::Loopback,
        metrics: options.metrics,
        readiness: options.readiness,
    };
    let handed = taken
        .as_mut()
        .map(succession::own_listeners)
        .unwrap_or_default();
    let admin = Admin::bind_with(&addresses, Arc::new(state), handed).await?;
    let copies = admin.copies().map_err(HandoverError::from)?;
    if taken.is_some() || capture.waits_for_replacement() {
        let refused = manifests.statuses().borrow().errors_total;
        let now = snapshot.load_full();
        succession::want(&certificates, &now, &options.node);
        capture.keep_leftovers(refused > 0);
        capture.apply(now);
        succession::complete(taken, &capture, &slots).await?;
    }
    let serving = background.child_token();
    tokio::spawn(admin.run(serving.clone()));
    tokio::spawn(control.run(background.clone()));
    tracing::info!(node = options.node, manifests = %options.manifests.display(), "started");

    let giver = Giver::open(
        &succession::socket(&options)?,
        &options.node,
        capture.clone(),
        certificates.clone(),
        succession::endpoints(copies),
    )
    .await?;
    let mut successor = Box::pin(giver.serve());
    let mut statuses = manifests.statuses();
    while !stop.is_cancelled() {
        // Before the snapshot: a change between the two is seen again.
        let refused = statuses.borrow_and_update().errors_total;
        let now = snapshot.load_full();
        // The identities first: a pod's first connection asks for its certificate.
        succession::want(&certificates, &now, &options.node);
        capture.keep_leftovers(refused > 0);
        capture.apply(now);
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            committed = &mut successor => {
                leaving.cancel();
                serving.cancel();
                return succession::hand_over(committed, &options, &capture, &telemetry, &stop).await;
            }
            changed = statuses.changed() => if changed.is_err() { stop.cancelled().await },
        }
    }
    drop(successor);
    stopped(&options, &capture, &telemetry).await
}

/// Tunnels hold less while memory is short.
async fn make_room(mut shortage: watch::Receiver<bool>) {
    while shortage.changed().await.is_ok() {
        tunnel::set_short_of_memory(*shortage.borrow_and_update());
    }
}

/// Lets live connections end until the deadline. Those that are left are reset when their sockets
/// are closed, never ended by a FIN.
async fn stopped(
    options: &AgentOptions,
    capture: &Capture,
    telemetry: &Telemetry,
) -> Result<(), AgentError> {
    if options.uninstall_on_stop {
        tracing::info!("stopping: taking every pod out of the mesh");
        return Ok(capture.uninstall().await?);
    }
    let live = telemetry.live();
    tracing::info!(
        live,
        drain_seconds = options.shutdown_drain,
        "stopping: no new connections"
    );
    capture.shutdown().await;
    let deadline = Instant::now() + Duration::from_secs(options.shutdown_drain);
    succession::drain(telemetry, deadline).await;
    Ok(())
}

/// Where the cgroup2 tree is mounted: on machines with cgroup v1 controllers it is not at
/// `/sys/fs/cgroup`.
fn cgroup2_mount() -> Result<PathBuf, AgentError> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").map_err(AgentError::Mounts)?;
    mount_of_type(&mounts, "cgroup2").ok_or(AgentError::NoCgroup2)
}

/// First mount point of a file system's type in mountinfo (proc(5)).
fn mount_of_type(mountinfo: &str, kind: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let is_kind = file_system.split(' ').next() == Some(kind);
        // The fourth field is the mount's root: only the whole tree will do.
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        (is_kind && root == "/").then(|| PathBuf::from(point.replace("\\040", " ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup2_mount_is_found_beside_those_of_version_1() {
        let mounts = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
            35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
            40 31 0:38 /pod /mnt/part rw - cgroup2 cgroup2 rw\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:3 - cgroup2 cgroup2 rw\n";
        let found = mount_of_type(mounts, "cgroup2");
        assert_eq!(found, Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(mount_of_type(mounts, "bpf"), None);
    }
}
