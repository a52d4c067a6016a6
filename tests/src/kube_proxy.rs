//! What kube-proxy does, for connections that no agent took: DNAT from a Service's address to an endpoint.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};

use anyhow::Result;

use crate::netns::Netns;

/// A Service's address with what is behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Backend {
    pub vip: IpAddr,
    pub protocol: Protocol,
    pub port: u16,
    /// Ready ones of the family of `vip`.
    pub endpoints: Vec<SocketAddr>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Tcp,
    Udp,
}

/// Replaces the rules of a node in one transaction.
pub(crate) fn apply(node: &Netns, backends: &[Backend]) -> Result<()> {
    node.feed(&["nft", "-f", "-"], &ruleset(backends))
}

fn ruleset(backends: &[Backend]) -> String {
    let mut translate = String::new();
    let mut reject = String::new();
    let mut addresses = BTreeSet::new();
    for backend in backends {
        let family = family(backend.vip);
        let protocol = match backend.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        let condition = format!(
            "{family} daddr {} {protocol} dport {}",
            backend.vip, backend.port
        );
        let targets: Vec<String> = backend
            .endpoints
            .iter()
            .enumerate()
            .map(|(index, endpoint)| format!("{index} : {} . {}", endpoint.ip(), endpoint.port()))
            .collect();
        addresses.extend(backend.endpoints.iter().map(SocketAddr::ip));
        // Writing to a String cannot fail.
        let _ = if targets.is_empty() {
            writeln!(reject, "    {condition} reject")
        } else {
            writeln!(
                translate,
                "    {condition} dnat {family} to numgen random mod {} map {{ {} }}",
                targets.len(),
                targets.join(", ")
            )
        };
    }
    let mut hairpin = String::new();
    for address in addresses {
        let family = family(address);
        let _ = writeln!(
            hairpin,
            "    {family} saddr {address} {family} daddr {address} ct status dnat masquerade"
        );
    }
    format!(
        "table inet kube-proxy
delete table inet kube-proxy
table inet kube-proxy {{
  chain services {{
{translate}  }}
  chain prerouting {{
    type nat hook prerouting priority dstnat;
    jump services
  }}
  chain output {{
    type nat hook output priority -100;
    jump services
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat;
{hairpin}  }}
  chain nobody {{
    # Before routing: a node without a default route has no way to a Service.
    type filter hook prerouting priority filter;
{reject}  }}
}}
"
    )
}

fn family(address: IpAddr) -> &'static str {
    match address {
        IpAddr::V4(_) => "ip",
        IpAddr::V6(_) => "ip6",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_without_endpoints_is_rejected_and_others_are_spread() {
        let backend = |vip: &str, endpoints: &[&str]| Backend {
            vip: vip.parse().unwrap(),
            protocol: Protocol::Tcp,
            port: 80,
            endpoints: endpoints.iter().map(|text| text.parse().unwrap()).collect(),
        };
        let text = ruleset(&[
            backend("10.96.0.1", &["10.1.0.2:8080", "10.1.0.3:8080"]),
            backend("fd00::1", &[]),
        ]);
        assert!(text.contains(
            "ip daddr 10.96.0.1 tcp dport 80 dnat ip to numgen random mod 2 \
             map { 0 : 10.1.0.2 . 8080, 1 : 10.1.0.3 . 8080 }"
        ));
        assert!(text.contains("ip6 daddr fd00::1 tcp dport 80 reject"));
        assert!(text.contains("ip saddr 10.1.0.3 ip daddr 10.1.0.3 ct status dnat masquerade"));
    }
}
