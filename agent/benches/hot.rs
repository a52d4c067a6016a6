//! What is done for every connection: `cargo bench -p undermesh --bench hot`.
//!
//! `--count NAME TIMES` does one of them so often and nothing else: `cargo xtask bench --instructions`
//! counts by that.

use std::hint::black_box;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use criterion::{Criterion, Throughput};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use undermesh::mesh::{
    Endpoint, Membership, MeshConfig, Mode, ObjectName, Service, ServicePort, Snapshot, SpiffeId,
    TrustDomain, Workload, WorkloadUid,
};
use undermesh::relay::{Borrowed, relay_tcp};
use undermesh::resilience::balance::BalanceSettings;
use undermesh::resilience::destination::{Ask, Destination, DestinationSettings};
use undermesh::resilience::ejection::{EjectionSettings, SourceId};
use undermesh::resilience::event::NoSink;
use undermesh::resilience::{Breaker, BreakerSettings, BudgetSettings, Member, Outcome, Timestamp};
use undermesh::telemetry::{
    ByteCount, ConnectionInfo, Direction, End, LogFormat, Logging, Party, Security, Telemetry,
};
use undermesh::tunnel::MAX_CHUNK;

mod tunnelled;

use tunnelled::Echoed;

const PODS: u32 = 1_000;
const SERVICES: u32 = 100;
const ENDPOINTS: u32 = 100;
const RELAYED: usize = 1 << 20;

fn address(index: u32) -> SocketAddr {
    (Ipv4Addr::from_bits(0x0a00_0000 + index), 8080).into()
}

fn workload(index: u32) -> Result<Arc<Workload>> {
    let name = format!("pod-{index}");
    Ok(Arc::new(Workload {
        uid: WorkloadUid(name.as_str().into()),
        workload: name.as_str().into(),
        version: Some("v1".into()),
        node: "node-a".into(),
        identity: SpiffeId::new(TrustDomain::default(), "shop", &name)?,
        addresses: vec![address(index).ip()],
        labels: Arc::default(),
        named_ports: Default::default(),
        probe_ports: Default::default(),
        opaque_ports: Default::default(),
        membership: Membership::Meshed(Mode::Strict),
        readiness: undermesh::mesh::Readiness::Ready,
        sandbox: None,
        name: ObjectName::new("shop", &name),
    }))
}

fn virtual_address(index: u32) -> SocketAddr {
    (Ipv4Addr::from_bits(0x0a60_0000 + index), 80).into()
}

fn service(index: u32) -> Arc<Service> {
    let endpoint = |pod| Endpoint {
        address: address(pod),
        readiness: undermesh::mesh::Readiness::Ready,
        workload: Some(WorkloadUid(format!("pod-{pod}").into())),
    };
    let each = PODS / SERVICES;
    Arc::new(Service {
        name: ObjectName::new("shop", &format!("service-{index}")),
        vips: vec![virtual_address(index).ip()],
        ports: vec![ServicePort {
            name: "".into(),
            port: 80,
            app_protocol: None,
            opaque: false,
            endpoints: (index * each..(index + 1) * each).map(endpoint).collect(),
        }],
    })
}

/// What a dialled address stands for: every third is a pod's own.
fn look_up() -> Result<impl FnMut()> {
    let mut snapshot = Snapshot::new(MeshConfig::default());
    for index in 0..PODS {
        snapshot.insert_workload(workload(index)?);
    }
    (0..SERVICES).for_each(|index| snapshot.insert_service(service(index)));
    let mut next = 0_u32;
    Ok(move || {
        next = next.wrapping_add(1);
        let dialled = match next % 3 {
            0 => address(next % PODS),
            _ => virtual_address(next % SERVICES),
        };
        black_box(snapshot.resolve(black_box(dialled)));
    })
}

/// The breaker is asked, an endpoint is chosen, and both are told how it went.
fn decision() -> Result<impl FnMut()> {
    let settings = DestinationSettings {
        balance: BalanceSettings::default(),
        ejection: EjectionSettings::default(),
        budget: BudgetSettings::default(),
        seed: 1,
        sink: Arc::new(NoSink),
    };
    let destination = Destination::new("bench".into(), settings);
    let members: Vec<Member<SocketAddr>> = (0..ENDPOINTS).map(address).map(Member::new).collect();
    destination.replace(&members, Timestamp::ZERO);
    let breaker = Breaker::new(
        "bench".into(),
        BreakerSettings::default(),
        1,
        Arc::new(NoSink),
    );
    let source = destination.source(SourceId(1), Timestamp::ZERO);
    let mut rng = SmallRng::seed_from_u64(1);
    let mut now = Timestamp::ZERO;
    Ok(move || {
        now = now + Duration::from_micros(1);
        if let (Ok(permit), Ok(attempt)) = (
            breaker.admit(now),
            source.pick(&Ask::default(), &mut rng, now),
        ) {
            attempt.finish(Outcome::Success, now);
            permit.finish(Outcome::Success, now);
        }
    })
}

/// A connection in the table and in the metrics, from its beginning to its end.
fn connection() -> Result<impl FnMut()> {
    let telemetry = Telemetry::new();
    let (client, server) = (workload(1)?, workload(2)?);
    Ok(move || {
        let connection = telemetry.open(ConnectionInfo {
            direction: Direction::Outbound,
            source: Party::of(&client, address(1)),
            destination: Party::of(&server, address(2)),
            service: Some(ObjectName::new("shop", "service-0")),
            security: Security::MutualTls,
            original_destination: virtual_address(0),
        });
        connection.established();
        connection.bytes().add_sent(1);
        connection.close(End::Complete);
    })
}

/// A relay between two pairs of sockets of this machine.
struct Relay {
    client: TcpStream,
    server: TcpStream,
    stop: CancellationToken,
}

impl Relay {
    async fn start() -> Result<Self> {
        let (client, downstream) = pair().await?;
        let (upstream, server) = pair().await?;
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        tokio::spawn(async move {
            let bytes = ByteCount::default();
            let connection = Borrowed {
                counts: (&bytes).into(),
                stop: &stopped,
            };
            relay_tcp(downstream, upstream, connection).await
        });
        Ok(Self {
            client,
            server,
            stop,
        })
    }

    async fn carry(&mut self, sent: &[u8], received: &mut [u8]) -> Result<()> {
        let (there, here) = (
            self.client.write_all(sent),
            self.server.read_exact(received),
        );
        tokio::try_join!(there, here)?;
        Ok(())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn pair() -> Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let connected = TcpStream::connect(listener.local_addr()?).await?;
    Ok((connected, listener.accept().await?.0))
}

fn relay(criterion: &mut Criterion) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut relay = runtime.block_on(Relay::start())?;
    let (sent, mut received) = (vec![7; RELAYED], vec![0; RELAYED]);
    let mut group = criterion.benchmark_group("relay");
    group.throughput(Throughput::Bytes(RELAYED as u64));
    let mut failed = None;
    group.bench_function("between two sockets", |bencher| {
        bencher.iter(|| {
            let carried = runtime.block_on(relay.carry(&sent, &mut received));
            failed = carried.err().or(failed.take());
        });
    });
    group.finish();
    failed.map_or(Ok(()), Err)
}

/// A frame that is no larger than one read, and one that fills a tunnel's largest chunk.
fn frame(criterion: &mut Criterion) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut echoed = runtime.block_on(Echoed::start())?;
    let mut group = criterion.benchmark_group("frame");
    let mut failed = None;
    for size in [64, MAX_CHUNK] {
        let frame = Bytes::from(vec![7; size]);
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(format!("{size} bytes there and back"), |bencher| {
            bencher.iter(|| {
                let carried = runtime.block_on(echoed.there_and_back(frame.clone()));
                failed = carried.err().or(failed.take());
            });
        });
    }
    group.finish();
    failed.map_or(Ok(()), Err)
}

/// Does one of them so often. A log line is written for each connection where that is asked for.
fn count(name: &str, times: u64) -> Result<()> {
    let repeat = |mut once: Box<dyn FnMut()>| (0..times).for_each(|_| once());
    match name {
        "look-up" => repeat(Box::new(look_up()?)),
        "decision" => repeat(Box::new(decision()?)),
        "connection" => repeat(Box::new(connection()?)),
        "logged-connection" => {
            let _logging = Logging::init(LogFormat::Text)?;
            repeat(Box::new(connection()?));
        }
        other => bail!("{other} is nothing that is counted"),
    }
    Ok(())
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, name, times] = &arguments[..]
        && flag == "--count"
    {
        return count(name, times.parse().context("how often?")?);
    }
    let mut criterion = Criterion::default()
        .measurement_time(Duration::from_secs(2))
        .warm_up_time(Duration::from_millis(500))
        .sample_size(30)
        .configure_from_args();
    let (mut look_up, mut decision, mut connection) = (look_up()?, decision()?, connection()?);
    criterion.bench_function("look-up", |bencher| bencher.iter(&mut look_up));
    criterion.bench_function("decision", |bencher| bencher.iter(&mut decision));
    criterion.bench_function("connection", |bencher| bencher.iter(&mut connection));
    relay(&mut criterion)?;
    frame(&mut criterion)?;
    criterion.final_summary();
    Ok(())
}
