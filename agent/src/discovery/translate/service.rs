//! Services.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::super::object::Fault;
use super::{check_address, check_name, check_port, is_tcp, opaque_ports};
use crate::mesh::{ObjectName, PortSet};

/// What the mesh needs to know of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceFacts {
    /// Namespace and name.
    pub name: ObjectName,
    /// ClusterIPs, external IPs and load balancer IPs, each once, and the field that it is from.
    pub vips: Vec<(IpAddr, String)>,
    /// TCP ports.
    pub ports: Vec<PortFacts>,
    /// `spec.selector`; empty selects nothing.
    pub selector: BTreeMap<String, String>,
    /// `spec.publishNotReadyAddresses`.
    pub unready: Unready,
}

/// What becomes of selected pods that are not ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unready {
    /// They are endpoints that are not ready.
    Withheld,
    /// They are endpoints like any other.
    Published,
}

/// What the mesh needs to know of a Service's port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortFacts {
    /// `name`, empty if there is one port only.
    pub name: Arc<str>,
    /// `port`.
    pub port: u16,
    /// `targetPort`.
    pub target: TargetPort,
    /// `appProtocol`.
    pub app_protocol: Option<Arc<str>>,
    /// Whether the Service's annotation names it as one that is not looked into.
    pub opaque: bool,
}

/// Which port of a pod is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetPort {
    /// The one of this number.
    Number(u16),
    /// The container port of this name.
    Name(String),
}

impl ServiceFacts {
    /// Checks a Service. None if it is of no concern to a mesh: an `ExternalName` is a name in DNS.
    pub fn of(service: &Service) -> Result<Option<Self>, Fault> {
        let metadata = &service.metadata;
        let name = metadata.name.as_deref().unwrap_or_default();
        let namespace = metadata.namespace.as_deref().unwrap_or("default");
        check_name("metadata.name", name)?;
        check_name("metadata.namespace", namespace)?;
        let Some(spec) = &service.spec else {
            return Err(Fault::new("spec", "is missing"));
        };
        if spec.type_.as_deref() == Some("ExternalName") {
            return Ok(None);
        }
        Ok(Some(Self {
            name: ObjectName::new(namespace, name),
            vips: vips(service, spec)?,
            ports: ports(spec, &opaque_ports(metadata)?)?,
            selector: spec.selector.clone().unwrap_or_default(),
            unready: match spec.publish_not_ready_addresses {
                Some(true) => Unready::Published,
                Some(false) | None => Unready::Withheld,
            },
        }))
    }

    /// Whether it selects pods at all.
    #[must_use]
    pub fn has_selector(&self) -> bool {
        !self.selector.is_empty()
    }

    /// Whether it selects a pod with these labels of its namespace.
    #[must_use]
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        self.has_selector()
            && self
                .selector
                .iter()
                .all(|(name, value)| labels.get(name) == Some(value))
    }

    /// Whether endpoints of this address's family are its own: those of its addresses' families,
    /// every family if it is headless.
    #[must_use]
    pub fn serves(&self, address: IpAddr) -> bool {
        self.vips.is_empty()
            || self
                .vips
                .iter()
                .any(|(vip, _)| vip.is_ipv4() == address.is_ipv4())
    }
}

fn vips(service: &Service, spec: &ServiceSpec) -> Result<Vec<(IpAddr, String)>, Fault> {
    let cluster: Vec<(String, &str)> = match &spec.cluster_ips {
        Some(ips) if !ips.is_empty() => indexed("spec.clusterIPs", ips.iter()).collect(),
        _ => spec
            .cluster_ip
            .iter()
            .map(|ip| ("spec.clusterIP".to_owned(), ip.as_str()))
            .collect(),
    };
    let external = indexed("spec.externalIPs", spec.external_ips.iter().flatten());
    // With `ipMode: Proxy` the load balancer wants to see the traffic.
    let balancers = service
        .status
        .iter()
        .filter_map(|status| status.load_balancer.as_ref())
        .flat_map(|balancer| balancer.ingress.iter().flatten().enumerate())
        .filter(|(_, ingress)| ingress.ip_mode.as_deref() != Some("Proxy"))
        .filter_map(|(index, ingress)| {
            let field = format!("status.loadBalancer.ingress[{index}].ip");
            Some((field, ingress.ip.as_deref()?))
        });
    let mut seen = BTreeSet::new();
    let mut vips = Vec::new();
    for (field, text) in cluster.into_iter().chain(external).chain(balancers) {
        // A headless Service says `None`; one whose address is still to come says nothing.
        if text == "None" || text.is_empty() {
            continue;
        }
        let address = check_address(field.as_str(), text)?;
        if seen.insert(address) {
            vips.push((address, field));
        }
    }
    Ok(vips)
}

fn indexed<'a>(
    list: &'static str,
    items: impl Iterator<Item = &'a String>,
) -> impl Iterator<Item = (String, &'a str)> {
    items
        .enumerate()
        .map(move |(index, item)| (format!("{list}[{index}]"), item.as_str()))
}

fn ports(spec: &ServiceSpec, opaque: &PortSet) -> Result<Vec<PortFacts>, Fault> {
    let given = spec.ports.as_deref().unwrap_or_default();
    let mut names = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    let mut ports = Vec::new();
    for (index, port) in given.iter().enumerate() {
        let field = |leaf: &str| format!("spec.ports[{index}].{leaf}");
        let name = port.name.as_deref().unwrap_or_default();
        if name.is_empty() && given.len() > 1 {
            return Err(Fault::new(
                field("name"),
                "is missing: a Service of several ports names each",
            ));
        }
        if !names.insert(name) {
            return Err(Fault::new(
                field("name"),
                format!("{name:?} is the name of an earlier port"),
            ));
        }
        let number = check_port(field("port"), port.port)?;
        let target = target(field("targetPort"), port, number)?;
        if !is_tcp(port.protocol.as_deref()) {
            continue;
        }
        if !numbers.insert(number) {
            return Err(Fault::new(
                field("port"),
                format!("{number} is the number of an earlier port"),
            ));
        }
        ports.push(PortFacts {
            name: name.into(),
            port: number,
            target,
            app_protocol: port.app_protocol.as_deref().map(Into::into),
            opaque: opaque.contains(number),
        });
    }
    Ok(ports)
}

fn target(field: String, port: &ServicePort, number: u16) -> Result<TargetPort, Fault> {
    match &port.target_port {
        None => Ok(TargetPort::Number(number)),
        Some(IntOrString::Int(target)) => check_port(field, *target).map(TargetPort::Number),
        Some(IntOrString::String(name)) if name.is_empty() => Ok(TargetPort::Number(number)),
        Some(IntOrString::String(name)) => Ok(TargetPort::Name(name.clone())),
    }
}

#[cfg(test)]
#[path = "service_tests.rs"]
mod tests;
