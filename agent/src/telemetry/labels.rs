//! The label set of connection metrics.

use std::fmt::{self, Write};
use std::sync::Arc;

use prometheus_client::encoding::{EncodeLabelSet, LabelSetEncoder};

use super::{ConnectionInfo, Direction, Party, Security};
use crate::mesh::{ObjectName, SpiffeId};

/// Value of a label for which nothing is known, as in Istio.
pub(super) const UNKNOWN: &str = "unknown";

/// Value of the labels of connections that found no room for a series of their own. No object of
/// Kubernetes can be called so.
pub(super) const OVERFLOW: &str = "_overflow";

/// The labels of one series. Values are kept as they came, shared with the model, and written out
/// only when metrics are read.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Labels {
    pub direction: Direction,
    pub security: Security,
    pub ends: Ends,
}

/// Between whom.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Ends {
    /// Shared, so that the scrape can take a copy of the table.
    Named(Arc<NamedEnds>),
    /// What stands for everybody when the table of series is full.
    Overflow,
}

/// The two ends and what the one wanted of the other.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct NamedEnds {
    pub source: PartyLabels,
    pub destination: PartyLabels,
    pub service: Option<ObjectName>,
}

/// The part of the labels that speaks of one end.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct PartyLabels {
    pub workload: Option<Arc<str>>,
    pub namespace: Option<Arc<str>>,
    pub version: Option<Arc<str>>,
    pub principal: Option<SpiffeId>,
}

impl Labels {
    pub fn of(info: &ConnectionInfo) -> Self {
        Self {
            direction: info.direction,
            security: info.security,
            ends: Ends::Named(Arc::new(NamedEnds {
                source: PartyLabels::of(&info.source),
                destination: PartyLabels::of(&info.destination),
                service: info.service.clone(),
            })),
        }
    }

    pub fn overflow(&self) -> Self {
        Self {
            direction: self.direction,
            security: self.security,
            ends: Ends::Overflow,
        }
    }
}

impl PartyLabels {
    fn of(party: &Party) -> Self {
        Self {
            workload: party.workload().cloned(),
            namespace: party.namespace().cloned(),
            version: party.version().cloned(),
            principal: party.identity().cloned(),
        }
    }

    fn encode(&self, names: &PartyNames, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        label(encoder, names.workload, text(self.workload.as_deref()))?;
        label(encoder, names.namespace, text(self.namespace.as_deref()))?;
        match &self.principal {
            Some(principal) => label(encoder, names.principal, principal)?,
            None => label(encoder, names.principal, UNKNOWN)?,
        }
        label(encoder, names.version, text(self.version.as_deref()))
    }
}

struct PartyNames {
    workload: &'static str,
    namespace: &'static str,
    principal: &'static str,
    version: &'static str,
}

const SOURCE: PartyNames = PartyNames {
    workload: "source_workload",
    namespace: "source_workload_namespace",
    principal: "source_principal",
    version: "source_version",
};

const DESTINATION: PartyNames = PartyNames {
    workload: "destination_workload",
    namespace: "destination_workload_namespace",
    principal: "destination_principal",
    version: "destination_version",
};

impl EncodeLabelSet for Labels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        label(encoder, "reporter", self.direction.reporter())?;
        label(encoder, "direction", self.direction.as_str())?;
        match &self.ends {
            Ends::Named(ends) => {
                ends.source.encode(&SOURCE, encoder)?;
                ends.destination.encode(&DESTINATION, encoder)?;
                let service = ends.service.as_ref();
                let name = service.map(|service| &*service.name);
                let namespace = service.map(|service| &*service.namespace);
                label(encoder, "destination_service_name", text(name))?;
                label(encoder, "destination_service_namespace", text(namespace))?;
            }
            Ends::Overflow => {
                for names in [SOURCE, DESTINATION] {
                    label(encoder, names.workload, OVERFLOW)?;
                    label(encoder, names.namespace, OVERFLOW)?;
                    label(encoder, names.principal, OVERFLOW)?;
                    label(encoder, names.version, OVERFLOW)?;
                }
                label(encoder, "destination_service_name", OVERFLOW)?;
                label(encoder, "destination_service_namespace", OVERFLOW)?;
            }
        }
        label(
            encoder,
            "connection_security_policy",
            self.security.as_str(),
        )
    }
}

/// The labels of a series and one more.
#[derive(Debug)]
pub(super) struct With<'a> {
    pub labels: &'a Labels,
    pub name: &'static str,
    pub value: &'static str,
}

impl EncodeLabelSet for With<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        self.labels.encode(encoder)?;
        label(encoder, self.name, self.value)
    }
}

fn text(value: Option<&str>) -> &str {
    value.unwrap_or(UNKNOWN)
}

/// Writes one label; the encoder escapes the value.
pub(super) fn label(
    encoder: &mut LabelSetEncoder<'_>,
    name: &str,
    value: impl fmt::Display,
) -> fmt::Result {
    let mut label = encoder.encode_label();
    let mut key = label.encode_label_key()?;
    key.write_str(name)?;
    let mut written = key.encode_label_value()?;
    write!(written, "{value}")?;
    written.finish()
}
