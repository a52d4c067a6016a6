//! A connection as it is shown.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Serialize, Serializer};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::connection::Moved;
use super::{CloseReason, ConnectionInfo, Direction, FailureReason, Party, Security};
use crate::mesh::{ObjectName, SpiffeId};

/// How far a connection has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Its endpoint is being chosen and dialled.
    Connecting,
    /// Bytes may flow.
    Established,
    /// It ended.
    Closed,
}

/// A connection as `/connections` shows it. The names are those of labels and log fields.
#[derive(Debug, Clone, Serialize)]
pub struct ConnectionView {
    /// Number of the connection, never used again by this process.
    pub id: u64,
    /// On which side the agent stands.
    pub direction: Direction,
    /// How far it has come.
    pub phase: Phase,
    /// The client.
    #[serde(flatten)]
    pub source: SourceView,
    /// The server.
    #[serde(flatten)]
    pub destination: DestinationView,
    /// Name of the Service that the client asked for.
    pub destination_service_name: Option<Arc<str>>,
    /// Namespace of that Service.
    pub destination_service_namespace: Option<Arc<str>>,
    /// The address that the client connected to.
    pub original_destination: SocketAddr,
    /// How it is protected.
    pub connection_security_policy: Security,
    /// Bytes sent to the source.
    pub sent_bytes: u64,
    /// Bytes received from the source.
    pub received_bytes: u64,
    /// When it was opened.
    #[serde(serialize_with = "rfc3339")]
    pub opened_at: SystemTime,
    /// How long it is open; of a closed one, how long it was. As seconds with three decimals.
    #[serde(rename = "duration_seconds", serialize_with = "seconds")]
    pub age: Duration,
}

/// A connection that ended, as `/connections/ended` and the access log show it.
#[derive(Debug, Clone, Serialize)]
pub struct EndedView {
    /// What it was at its end.
    #[serde(flatten)]
    pub connection: ConnectionView,
    /// How it ended.
    pub close_reason: CloseReason,
    /// Why, if it failed.
    pub reason: Option<FailureReason>,
    /// An explanation of that, at most 512 bytes.
    pub detail: Option<Box<str>>,
}

/// The client of a connection.
#[derive(Debug, Clone, Serialize)]
pub struct SourceView {
    /// Owner of the pod.
    pub source_workload: Option<Arc<str>>,
    /// Namespace of the workload.
    pub source_workload_namespace: Option<Arc<str>>,
    /// Version of the workload.
    pub source_version: Option<Arc<str>>,
    /// The pod.
    pub source_pod: Option<ObjectName>,
    /// Its service account.
    pub source_service_account: Option<Arc<str>>,
    /// Its proven identity.
    pub source_principal: Option<SpiffeId>,
    /// Its address and port.
    pub source_address: SocketAddr,
}

/// The server of a connection.
#[derive(Debug, Clone, Serialize)]
pub struct DestinationView {
    /// Owner of the pod.
    pub destination_workload: Option<Arc<str>>,
    /// Namespace of the workload.
    pub destination_workload_namespace: Option<Arc<str>>,
    /// Version of the workload.
    pub destination_version: Option<Arc<str>>,
    /// The pod.
    pub destination_pod: Option<ObjectName>,
    /// Its service account.
    pub destination_service_account: Option<Arc<str>>,
    /// Its identity.
    pub destination_principal: Option<SpiffeId>,
    /// Its address and port.
    pub destination_address: SocketAddr,
}

impl ConnectionView {
    pub(super) fn new(
        id: u64,
        info: &ConnectionInfo,
        phase: Phase,
        moved: Moved,
        opened_at: SystemTime,
        age: Duration,
    ) -> Self {
        let (service_name, service_namespace) = match &info.service {
            Some(service) => (Some(service.name.clone()), Some(service.namespace.clone())),
            None => (None, None),
        };
        Self {
            id,
            direction: info.direction,
            phase,
            source: SourceView::of(&info.source),
            destination: DestinationView::of(&info.destination),
            destination_service_name: service_name,
            destination_service_namespace: service_namespace,
            original_destination: info.original_destination,
            connection_security_policy: info.security,
            sent_bytes: moved.sent,
            received_bytes: moved.received,
            opened_at,
            age,
        }
    }
}

impl SourceView {
    fn of(party: &Party) -> Self {
        Self {
            source_workload: party.workload().cloned(),
            source_workload_namespace: party.namespace().cloned(),
            source_version: party.version().cloned(),
            source_pod: party.pod().cloned(),
            source_service_account: party.service_account().cloned(),
            source_principal: party.identity().cloned(),
            source_address: party.address,
        }
    }
}

impl DestinationView {
    fn of(party: &Party) -> Self {
        Self {
            destination_workload: party.workload().cloned(),
            destination_workload_namespace: party.namespace().cloned(),
            destination_version: party.version().cloned(),
            destination_pod: party.pod().cloned(),
            destination_service_account: party.service_account().cloned(),
            destination_principal: party.identity().cloned(),
            destination_address: party.address,
        }
    }
}

/// A moment as RFC 3339 in UTC.
fn format_rfc3339(moment: SystemTime) -> String {
    let moment = OffsetDateTime::from(moment);
    // Fails only for years beyond 9999.
    moment
        .format(&Rfc3339)
        .unwrap_or_else(|_| moment.to_string())
}

fn rfc3339<S: Serializer>(moment: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format_rfc3339(*moment))
}

fn seconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(rounded_seconds(*duration))
}

/// Seconds, to the millisecond.
fn rounded_seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1_000.0).round() / 1_000.0
}
