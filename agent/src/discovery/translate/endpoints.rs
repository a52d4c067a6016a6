//! EndpointSlices, and the endpoints that a Service has.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use k8s_openapi::api::discovery::v1::{
    Endpoint as SliceEndpoint, EndpointConditions, EndpointSlice,
};

use super::super::object::Fault;
use super::service::{PortFacts, ServiceFacts, TargetPort, Unready};
use super::{check_address, check_name, check_port, is_tcp};
use crate::mesh::{Endpoint, ObjectName, Readiness, Workload};

/// Label that names the Service of a slice.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// What the mesh needs to know of an EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceFacts {
    /// The Service that it belongs to.
    pub service: ObjectName,
    /// TCP ports, by the name of the Service's port.
    pub ports: BTreeMap<String, u16>,
    /// Its endpoints.
    pub endpoints: Vec<EndpointFacts>,
}

/// An endpoint of a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointFacts {
    /// The first address: the API says that all of them are the same endpoint.
    pub address: IpAddr,
    /// Its conditions.
    pub readiness: Readiness,
    /// The pod that is meant.
    pub target: Option<TargetRef>,
}

/// The pod that an endpoint is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetRef {
    /// Namespace and name.
    pub pod: ObjectName,
    /// Its UID.
    pub uid: Option<String>,
}

impl TargetRef {
    /// Whether the pod that has the address now is the one that was meant. If it is not, the slice
    /// is older than the pod.
    fn means(&self, workload: &Workload) -> bool {
        // A pod that a manifest gives no UID for has its name as UID: it says nothing more.
        let has_uid = *workload.uid.0 != *workload.name.to_string();
        self.pod == workload.name
            && self
                .uid
                .as_deref()
                .is_none_or(|uid| !has_uid || uid == &*workload.uid.0)
    }
}

impl SliceFacts {
    /// Checks a slice. None if it is of no concern to a mesh: it belongs to no Service, or its
    /// addresses are names.
    pub fn of(slice: &EndpointSlice) -> Result<Option<Self>, Fault> {
        let metadata = &slice.metadata;
        let namespace = metadata.namespace.as_deref().unwrap_or("default");
        check_name(
            "metadata.name",
            metadata.name.as_deref().unwrap_or_default(),
        )?;
        check_name("metadata.namespace", namespace)?;
        let labels = metadata.labels.as_ref();
        let Some(service) = labels.and_then(|labels| labels.get(SERVICE_LABEL)) else {
            return Ok(None);
        };
        check_name(&format!("metadata.labels[{SERVICE_LABEL}]"), service)?;
        let family = match slice.address_type.as_str() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            "FQDN" => return Ok(None),
            other => {
                return Err(Fault::new(
                    "addressType",
                    format!("{other:?} is none of IPv4, IPv6, FQDN"),
                ));
            }
        };
        Ok(Some(Self {
            service: ObjectName::new(namespace, service),
            ports: ports(slice)?,
            endpoints: slice
                .endpoints
                .iter()
                .enumerate()
                .map(|(index, given)| endpoint(index, given, namespace, family))
                .collect::<Result<_, _>>()?,
        }))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

fn ports(slice: &EndpointSlice) -> Result<BTreeMap<String, u16>, Fault> {
    let mut ports = BTreeMap::new();
    for (index, port) in slice.ports.iter().flatten().enumerate() {
        if !is_tcp(port.protocol.as_deref()) {
            continue;
        }
        // Without a number it means all ports, which no Service's port does.
        let Some(number) = port.port else {
            continue;
        };
        let number = check_port(format!("ports[{index}].port"), number)?;
        let name = port.name.clone().unwrap_or_default();
        if ports.insert(name.clone(), number).is_some() {
            return Err(Fault::new(
                format!("ports[{index}].name"),
                format!("{name:?} is the name of an earlier port"),
            ));
        }
    }
    Ok(ports)
}

fn endpoint(
    index: usize,
    given: &SliceEndpoint,
    namespace: &str,
    family: Family,
) -> Result<EndpointFacts, Fault> {
    let field = format!("endpoints[{index}].addresses[0]");
    let Some(text) = given.addresses.first() else {
        return Err(Fault::new(field, "is missing"));
    };
    let address = check_address(field.as_str(), text)?;
    if address.is_ipv4() != (family == Family::V4) {
        return Err(Fault::new(
            field,
            format!("{address} is not of the slice's addressType"),
        ));
    }
    let target = given
        .target_ref
        .as_ref()
        .filter(|target| target.kind.as_deref() == Some("Pod"))
        .and_then(|target| {
            Some(TargetRef {
                pod: ObjectName::new(
                    target.namespace.as_deref().unwrap_or(namespace),
                    target.name.as_deref()?,
                ),
                uid: target.uid.clone(),
            })
        });
    Ok(EndpointFacts {
        address,
        readiness: given
            .conditions
            .as_ref()
            .map_or(Readiness::Ready, readiness),
        target,
    })
}

/// What conditions mean (discovery/v1, EndpointConditions): unset, `ready` counts as true, `serving` as
/// `ready` and `terminating` as false. `ready` is false for what terminates, unless its Service publishes
/// whatever there is: then that is meant, and `ready` wins, as with kube-proxy.
fn readiness(conditions: &EndpointConditions) -> Readiness {
    let is_ready = conditions.ready.unwrap_or(true);
    if is_ready {
        return Readiness::Ready;
    }
    let is_serving = conditions.serving.unwrap_or(is_ready);
    match conditions.terminating.unwrap_or(false) {
        true => Readiness::of(is_serving, true),
        false => Readiness::Unready,
    }
}

/// Endpoints of a Service's port, out of all its slices. An address that two slices have counts
/// once, as the API asks for, with the best of what they say of it. An address that is another pod's
/// by now is left out.
#[must_use]
pub fn slice_endpoints<'a>(
    port: &PortFacts,
    slices: impl Iterator<Item = &'a SliceFacts>,
    pod_at: impl Fn(IpAddr) -> Option<&'a Arc<Workload>>,
) -> Vec<Endpoint> {
    let mut found: BTreeMap<SocketAddr, Endpoint> = BTreeMap::new();
    for slice in slices {
        let Some(&number) = slice.ports.get(&*port.name) else {
            continue;
        };
        for given in &slice.endpoints {
            let workload = pod_at(given.address);
            let stale = match (&given.target, workload) {
                (Some(target), Some(workload)) => !target.means(workload),
                _ => false,
            };
            if stale {
                continue;
            }
            let address = SocketAddr::new(given.address, number);
            found
                .entry(address)
                .and_modify(|known| known.readiness = known.readiness.max(given.readiness))
                .or_insert_with(|| Endpoint {
                    address,
                    readiness: given.readiness,
                    workload: workload.map(|workload| workload.uid.clone()),
                });
        }
    }
    found.into_values().collect()
}

/// Endpoints of a Service's port out of the pods that it selects, as the EndpointSlice controller
/// would make them.
#[must_use]
pub fn derive_endpoints<'a>(
    service: &ServiceFacts,
    port: &PortFacts,
    pods: impl Iterator<Item = &'a Arc<Workload>>,
) -> Vec<Endpoint> {
    let mut found = BTreeMap::new();
    for pod in pods {
        let number = match &port.target {
            TargetPort::Number(number) => Some(*number),
            TargetPort::Name(name) => pod.named_ports.get(name).copied(),
        };
        let Some(number) = number else {
            continue;
        };
        let readiness = match service.unready {
            Unready::Published => Readiness::Ready,
            Unready::Withheld => pod.readiness,
        };
        for &address in pod.addresses.iter().filter(|one| service.serves(**one)) {
            let address = SocketAddr::new(address, number);
            let endpoint = Endpoint {
                address,
                readiness,
                workload: Some(pod.uid.clone()),
            };
            found.insert(address, endpoint);
        }
    }
    found.into_values().collect()
}

#[cfg(test)]
#[path = "endpoints_tests.rs"]
mod tests;
