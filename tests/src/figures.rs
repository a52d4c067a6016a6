//! What the agents of a lab counted, to be held against what clients and servers counted.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::lab::{Lab, Side};
use crate::metrics::Metrics;
use crate::wait;

const OPENED: &str = "undermesh_tcp_connections_opened_total";
const FAILED: &str = "undermesh_tcp_connections_failed_total";
const SECURITY: &str = "connection_security_policy";
const OUTBOUND: (&str, &str) = ("direction", "outbound");
const INBOUND: (&str, &str) = ("direction", "inbound");
/// Counters follow the last byte by a moment.
const SETTLE: Duration = Duration::from_secs(15);

/// Connections that both agents together opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Figures {
    /// From local pods to the mesh.
    pub outbound: u64,
    /// From the mesh to local pods.
    pub inbound: u64,
    /// Of those from local pods: over mTLS to another node.
    pub mutual_tls: u64,
    /// Of those from local pods: to a pod of the same node.
    pub same_node: u64,
    /// Of those to local pods: over mTLS.
    pub inbound_mutual_tls: u64,
    /// Of those to local pods: from outside the mesh.
    pub inbound_plaintext: u64,
    /// Those that failed, in either direction.
    pub failed: u64,
}

impl Figures {
    /// Scrapes both agents.
    pub fn read(lab: &Lab) -> Result<Self> {
        let mut sum = Self::default();
        for side in Side::ALL {
            let metrics = Metrics::parse(&lab.node(side)?.agent().metrics()?);
            sum = sum.zip(&Self::of(&metrics), |one, other| one + other);
        }
        Ok(sum)
    }

    fn of(metrics: &Metrics) -> Self {
        let opened = |labels: &[(&str, &str)]| metrics.count(OPENED, labels);
        Self {
            outbound: opened(&[OUTBOUND]),
            inbound: opened(&[INBOUND]),
            mutual_tls: opened(&[OUTBOUND, (SECURITY, "mutual_tls")]),
            same_node: opened(&[OUTBOUND, (SECURITY, "same_node")]),
            inbound_mutual_tls: opened(&[INBOUND, (SECURITY, "mutual_tls")]),
            inbound_plaintext: opened(&[INBOUND, (SECURITY, "plaintext")]),
            failed: metrics.count(FAILED, &[]),
        }
    }

    /// What came on top of `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        self.zip(before, u64::saturating_sub)
    }

    fn zip(&self, other: &Self, combine: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            outbound: combine(self.outbound, other.outbound),
            inbound: combine(self.inbound, other.inbound),
            mutual_tls: combine(self.mutual_tls, other.mutual_tls),
            same_node: combine(self.same_node, other.same_node),
            inbound_mutual_tls: combine(self.inbound_mutual_tls, other.inbound_mutual_tls),
            inbound_plaintext: combine(self.inbound_plaintext, other.inbound_plaintext),
            failed: combine(self.failed, other.failed),
        }
    }
}

/// The agents' view of what happens from now on.
#[derive(Debug)]
pub struct Witness<'a> {
    lab: &'a Lab,
    before: Figures,
    patience: Duration,
}

impl<'a> Witness<'a> {
    /// From now on.
    pub fn start(lab: &'a Lab) -> Result<Self> {
        Ok(Self {
            lab,
            before: Figures::read(lab)?,
            patience: SETTLE,
        })
    }

    /// Waits no longer than this for counters.
    #[must_use]
    pub fn patience(mut self, limit: Duration) -> Self {
        self.patience = limit;
        self
    }

    /// What the agents counted since.
    pub fn figures(&self) -> Result<Figures> {
        Ok(Figures::read(self.lab)?.since(&self.before))
    }

    /// Waits until `holds` of the figures, and gives them back; else the error shows them.
    pub fn until(&self, what: &str, holds: impl Fn(&Figures) -> bool) -> Result<Figures> {
        let mut last = Figures::default();
        wait::until(what, self.patience, || {
            last = self.figures()?;
            Ok(holds(&last).then_some(last))
        })
        .with_context(|| format!("{last:?}"))
    }

    /// The agents must have seen exactly these: `across` connections over mTLS, on both of their ends, and
    /// `beside` connections within a node. So a connection that went past them is found, as is one too many.
    pub fn expect(&self, across: u64, beside: u64) -> Result<Figures> {
        let what = format!("{across} connections over mTLS and {beside} within a node");
        self.until(&what, |seen| {
            (seen.mutual_tls, seen.inbound_mutual_tls, seen.same_node) == (across, across, beside)
                && seen.outbound == across + beside
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directions_and_security_are_told_apart() {
        let metrics = Metrics::parse(
            r#"undermesh_tcp_connections_opened_total{direction="outbound",connection_security_policy="mutual_tls"} 3
undermesh_tcp_connections_opened_total{direction="outbound",connection_security_policy="same_node"} 4
undermesh_tcp_connections_opened_total{direction="inbound",connection_security_policy="mutual_tls"} 5
undermesh_tcp_connections_failed_total{direction="inbound",reason="denied"} 6
"#,
        );
        let figures = Figures::of(&metrics);
        assert_eq!(
            (figures.outbound, figures.inbound, figures.failed),
            (7, 5, 6)
        );
        assert_eq!((figures.mutual_tls, figures.same_node), (3, 4));
        assert_eq!(figures.since(&figures), Figures::default());
    }
}
