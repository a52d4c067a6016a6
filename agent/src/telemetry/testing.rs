//! Connections, exposition lines and log lines for tests.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock};

use parking_lot::Mutex;
use tracing::Dispatch;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use super::logging::subscriber;
use super::{ConnectionInfo, Direction, LogFormat, Party, Security};
use crate::mesh::{Membership, Mode, ObjectName, SpiffeId, TrustDomain, Workload, WorkloadUid};

pub(crate) fn workload(name: &str, address: &str) -> Arc<Workload> {
    Arc::new(Workload {
        uid: WorkloadUid(format!("uid-{name}").into()),
        name: ObjectName::new("shop", &format!("{name}-0")),
        workload: name.into(),
        version: Some("v1".into()),
        node: "node-a".into(),
        identity: SpiffeId::new(TrustDomain::default(), "shop", name).unwrap(),
        addresses: vec![address.parse().unwrap()],
        labels: Arc::default(),
        named_ports: BTreeMap::new(),
        probe_ports: Default::default(),
        opaque_ports: Default::default(),
        membership: Membership::Meshed(Mode::Strict),
        readiness: crate::mesh::Readiness::Ready,
        sandbox: None,
    })
}

/// From the workload `source` to `cart`, over its service.
pub(crate) fn info_from(source: &str) -> ConnectionInfo {
    let address: SocketAddr = "10.0.1.2:40000".parse().unwrap();
    let endpoint: SocketAddr = "10.0.2.3:8080".parse().unwrap();
    ConnectionInfo {
        direction: Direction::Outbound,
        source: Party::of(&workload(source, "10.0.1.2"), address),
        destination: Party::of(&workload("cart", "10.0.2.3"), endpoint),
        service: Some(ObjectName::new("shop", "cart")),
        security: Security::MutualTls,
        original_destination: "10.96.0.10:80".parse().unwrap(),
    }
}

pub(crate) fn info() -> ConnectionInfo {
    info_from("web")
}

/// Sum of the samples of this name of which the labels hold all these parts.
pub(crate) fn total(exposition: &str, name: &str, parts: &[&str]) -> u64 {
    exposition
        .lines()
        .filter(|line| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with(['{', ' ']))
        })
        .filter(|line| parts.iter().all(|part| line.contains(part)))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64)
        .sum()
}

#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl io::Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Written {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// A second subscriber, which hears nothing. While there is only one, whether a place in the code
/// logs is decided for good by the thread that comes there first, and that may be one of a test
/// without any.
static SECOND: LazyLock<Dispatch> = LazyLock::new(|| Dispatch::new(tracing_subscriber::registry()));

/// What is logged meanwhile.
pub(crate) fn logged(format: LogFormat, filter: &str, act: impl FnOnce()) -> String {
    let written = Written::default();
    let filter = EnvFilter::try_new(filter).unwrap();
    LazyLock::force(&SECOND);
    let subscriber = subscriber(format, filter, written.clone(), false);
    tracing::subscriber::with_default(subscriber, act);
    String::from_utf8(written.0.lock().clone()).unwrap()
}

/// The one line that is logged meanwhile.
pub(crate) fn logged_as_json(act: impl FnOnce()) -> serde_json::Value {
    let text = logged(LogFormat::Json, "info", act);
    assert_eq!(text.lines().count(), 1, "{text}");
    serde_json::from_str(&text).unwrap()
}
