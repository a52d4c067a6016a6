//! What is measured: which load, over which path, by which proxies, and what must come of it.

use undermesh_lab::envoy::Protocol;
use undermesh_lab::load::LoadKind;

/// What stands between client and server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Proxy {
    Direct,
    Undermesh,
    EnvoyTcp,
    EnvoyHbone,
    EnvoyHttp,
    /// Undermesh of another build, to see what a change does.
    Former,
}

impl Proxy {
    pub const ALL: [Self; 6] = [
        Self::Direct,
        Self::Undermesh,
        Self::EnvoyTcp,
        Self::EnvoyHbone,
        Self::EnvoyHttp,
        Self::Former,
    ];

    /// With Envoy's configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Undermesh => "undermesh",
            Self::EnvoyTcp => "envoy-tcp",
            Self::EnvoyHbone => "envoy-hbone",
            Self::EnvoyHttp => "envoy-http",
            Self::Former => "former",
        }
    }

    /// Without.
    pub fn family(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Undermesh => "undermesh",
            Self::Former => "former",
            Self::EnvoyTcp | Self::EnvoyHbone | Self::EnvoyHttp => "envoy",
        }
    }

    /// Whether the nodes have agents.
    pub fn meshed(self) -> bool {
        matches!(self, Self::Undermesh | Self::Former)
    }

    pub fn envoy(self) -> Option<Protocol> {
        match self {
            Self::Direct | Self::Undermesh | Self::Former => None,
            Self::EnvoyTcp => Some(Protocol::Tcp),
            Self::EnvoyHbone => Some(Protocol::Hbone),
            Self::EnvoyHttp => Some(Protocol::Http),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    SameNode,
    CrossNode,
}

impl Path {
    pub fn name(self) -> &'static str {
        match self {
            Self::SameNode => "same_node",
            Self::CrossNode => "cross_node",
        }
    }
}

/// Whether the processors may halt. Waking a halted virtual CPU can take longer than all else in a round trip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processors {
    Halting,
    Awake,
}

/// What the agent is told of the port: a name that says HTTP, or one that does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    Opaque,
    Http,
}

/// One load.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    pub id: &'static str,
    pub about: &'static str,
    pub path: Path,
    pub kind: LoadKind,
    pub connections: usize,
    pub rate: Option<u32>,
    pub layer: Layer,
    pub processors: Processors,
    pub proxies: &'static [Proxy],
}

impl Row {
    /// Bytes that one operation carries there.
    pub fn payload_bytes(&self) -> usize {
        match self.kind {
            LoadKind::Bulk => 128 * 1024,
            LoadKind::PingPong => 64,
            LoadKind::Connect | LoadKind::Hold => 1,
            LoadKind::Http => 1024,
        }
    }
}

use Proxy::{Direct, EnvoyHbone, EnvoyHttp, EnvoyTcp, Undermesh};

const ACROSS: &[Proxy] = &[Direct, Undermesh, EnvoyTcp, EnvoyHbone];
const WITHIN: &[Proxy] = &[Direct, Undermesh, EnvoyTcp];
const PARSED: &[Proxy] = &[Undermesh, EnvoyHttp];

const fn row(id: &'static str, about: &'static str, kind: LoadKind, connections: usize) -> Row {
    Row {
        id,
        about,
        path: Path::CrossNode,
        kind,
        connections,
        rate: None,
        layer: Layer::Opaque,
        processors: Processors::Halting,
        proxies: ACROSS,
    }
}

const fn within(row: Row) -> Row {
    Row {
        path: Path::SameNode,
        proxies: WITHIN,
        ..row
    }
}

const fn awake(row: Row) -> Row {
    Row {
        processors: Processors::Awake,
        ..row
    }
}

const fn at(rate: u32, row: Row) -> Row {
    Row {
        rate: Some(rate),
        proxies: WITHIN,
        ..row
    }
}

const fn parsed(row: Row) -> Row {
    Row {
        layer: Layer::Http,
        proxies: PARSED,
        ..row
    }
}

const BULK_1: Row = row("bulk-1", "bulk, 1 connection", LoadKind::Bulk, 1);
const BULK_8: Row = row("bulk-8", "bulk, 8 connections", LoadKind::Bulk, 8);
const PING_PONG_1: Row = row(
    "ping-pong-1",
    "64 B there and back, 1 connection",
    LoadKind::PingPong,
    1,
);
const PING_PONG_64: Row = row(
    "ping-pong-64",
    "64 B there and back, 64 connections",
    LoadKind::PingPong,
    64,
);
const CONNECT: Row = row(
    "connect",
    "connect, one byte, its echo, close; 16 at a time",
    LoadKind::Connect,
    16,
);
const HTTP: &str = "HTTP/1.1 GET of 1 KiB, 64 connections";

/// Every load, in the order of the report. An id with its path is unique.
pub const ROWS: [Row; 18] = [
    BULK_1,
    BULK_8,
    PING_PONG_1,
    awake(Row {
        id: "ping-pong-1-awake",
        ..PING_PONG_1
    }),
    PING_PONG_64,
    CONNECT,
    row("http-opaque", HTTP, LoadKind::Http, 64),
    // What the direct path does, its row of 5,000 tells.
    Row {
        proxies: &[Undermesh, EnvoyTcp],
        ..awake(at(2000, row("http-opaque-2000", HTTP, LoadKind::Http, 64)))
    },
    awake(at(5000, row("http-opaque-5000", HTTP, LoadKind::Http, 64))),
    parsed(row("http-l7", HTTP, LoadKind::Http, 64)),
    parsed(awake(at(
        2000,
        row("http-l7-2000", HTTP, LoadKind::Http, 64),
    ))),
    parsed(awake(at(
        5000,
        row("http-l7-5000", HTTP, LoadKind::Http, 64),
    ))),
    within(BULK_1),
    within(BULK_8),
    within(awake(Row {
        id: "ping-pong-1-awake",
        ..PING_PONG_1
    })),
    within(PING_PONG_64),
    within(CONNECT),
    within(row("http-opaque", HTTP, LoadKind::Http, 64)),
];

/// New connections of which it is counted who saw them.
pub const CAPTURE: Row = Row {
    id: "capture",
    about: "new connections that no agent saw, and what the kernel programs take for a connect(2)",
    proxies: &[Undermesh],
    ..within(CONNECT)
};

/// Loads of idle connections, of which memory is what counts.
pub const MEMORY: &str = "memory";
pub const MEMORY_PROXIES: &[Proxy] = &[Undermesh, EnvoyTcp, EnvoyHbone];

/// What one load gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Figure {
    Throughput,
    Rate,
    P50,
    P99,
    P999,
    CpuPerGib,
    CpuEach,
    /// Resident memory of the proxies with so many idle connections.
    Resident(usize),
    PerConnection,
    GivenBack,
    /// Connections that the agent did not carry.
    Missed,
    /// Run time of all kernel programs for a connect(2), be it a pod's or the agent's own.
    Programs,
}

impl Figure {
    pub fn unit(self) -> &'static str {
        match self {
            Self::Throughput => "Gbit/s",
            Self::Rate => "1/s",
            Self::P50 | Self::P99 | Self::P999 => "µs",
            Self::CpuPerGib => "CPU s/GiB",
            Self::CpuEach => "CPU µs each",
            Self::Resident(_) => "MiB",
            Self::PerConnection => "KiB per connection",
            Self::GivenBack => "share",
            Self::Missed => "connections",
            Self::Programs => "µs each",
        }
    }

    /// What follows the id of the load; nothing for the figure that the load is about.
    pub fn suffix(self) -> String {
        match self {
            Self::Throughput | Self::Rate => String::new(),
            Self::P50 => "/p50".to_owned(),
            Self::P99 => "/p99".to_owned(),
            Self::P999 => "/p99.9".to_owned(),
            Self::CpuPerGib | Self::CpuEach => "/cpu".to_owned(),
            Self::Resident(connections) => format!("/{connections}"),
            Self::PerConnection => "/each".to_owned(),
            Self::GivenBack => "/given-back".to_owned(),
            Self::Missed => "/missed".to_owned(),
            Self::Programs => "/programs".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_load_is_named_once_on_a_path() {
        let names: BTreeSet<_> = ROWS.iter().map(|row| (row.id, row.path.name())).collect();
        assert_eq!(names.len(), ROWS.len());
    }
}
