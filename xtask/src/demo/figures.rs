//! What the agents counted.

use anyhow::Result;
use undermesh_lab::metrics::Metrics;
use undermesh_lab::{Lab, Side};

const OPENED: &str = "undermesh_tcp_connections_opened_total";
const SECURITY: &str = "connection_security_policy";
const OUTBOUND: (&str, &str) = ("direction", "outbound");
const INBOUND: (&str, &str) = ("direction", "inbound");

/// Connections that both agents together opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
}

impl Figures {
    /// Scrapes both agents.
    pub fn read(lab: &Lab) -> Result<Self> {
        let mut sum = Self::of(&Metrics::default());
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
        }
    }

    /// What came on top of `before`.
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
        }
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
"#,
        );
        let figures = Figures::of(&metrics);
        assert_eq!((figures.outbound, figures.inbound), (7, 5));
        assert_eq!((figures.mutual_tls, figures.same_node), (3, 4));
        assert_eq!(figures.since(&figures).outbound, 0);
    }
}
