//! Pods.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, Pod, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

use super::super::object::Fault;
use super::membership::{Placement, Wish, annotation, membership, obstacle};
use super::probes::probe_ports;
use super::{NamespaceFacts, check_address, check_name, check_port, is_tcp, opaque_ports};
use crate::mesh::{
    Membership, MeshConfig, ObjectName, Readiness, Sandbox, SpiffeId, TrustDomain, Workload,
    WorkloadUid,
};

/// Annotation: path of the pod's network namespace.
pub const NETNS_ANNOTATION: &str = "undermesh.io/netns";
/// Annotation: path of the pod's cgroup2 directory.
pub const CGROUP_ANNOTATION: &str = "undermesh.io/cgroup";

/// What the mesh needs to know of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodFacts {
    /// How far it is.
    pub state: PodState,
    /// The pod as it would be outside of any mesh, in the default trust domain.
    workload: Workload,
    wish: Wish,
    obstacle: Option<String>,
}

/// How far a pod is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PodState {
    /// It has no address yet. Not a workload.
    Pending,
    /// It has its addresses, or uses its node's.
    Running,
    /// Succeeded or Failed: its addresses may be another's by now. Not a workload.
    Finished,
}

/// What decides on a pod beside itself.
#[derive(Debug, Clone, Copy)]
pub struct PodContext<'a> {
    /// Its namespace, if that is known.
    pub namespace: Option<&'a NamespaceFacts>,
    /// Settings of the mesh.
    pub config: &'a MeshConfig,
    /// The node of this agent.
    pub node: &'a str,
}

impl PodFacts {
    /// Checks a pod.
    pub fn of(pod: &Pod) -> Result<Self, Fault> {
        let metadata = &pod.metadata;
        let name = name_of(metadata)?;
        let spec = pod.spec.as_ref();
        let host_network = spec.and_then(|spec| spec.host_network) == Some(true);
        // The address of a host-network pod is its node's: it tells nothing about the pod.
        let addresses = match &pod.status {
            Some(status) if !host_network => addresses(status)?,
            _ => Vec::new(),
        };
        let state = match pod
            .status
            .as_ref()
            .and_then(|status| status.phase.as_deref())
        {
            Some("Succeeded" | "Failed") => PodState::Finished,
            _ if addresses.is_empty() && !host_network => PodState::Pending,
            _ => PodState::Running,
        };
        let account = spec
            .and_then(|spec| spec.service_account_name.as_deref())
            .filter(|account| !account.is_empty())
            .unwrap_or("default");
        let identity = SpiffeId::new(TrustDomain::default(), &name.namespace, account)
            .map_err(|error| Fault::new("spec.serviceAccountName", format!("{error}")))?;
        let labels = metadata.labels.clone().unwrap_or_default();
        let probe_ports = probe_ports(pod, &addresses)?;
        let workload = Workload {
            uid: uid(metadata, &name),
            workload: owner(metadata, &labels)
                .unwrap_or(name.name.as_ref())
                .into(),
            version: ["app.kubernetes.io/version", "version"]
                .iter()
                .find_map(|label| labels.get(*label))
                .map(|version| version.as_str().into()),
            node: spec
                .and_then(|spec| spec.node_name.as_deref())
                .unwrap_or_default()
                .into(),
            identity,
            addresses,
            labels: Arc::new(labels),
            named_ports: named_ports(pod)?,
            probe_ports,
            opaque_ports: opaque_ports(metadata)?,
            membership: Membership::Outside,
            readiness: readiness(pod),
            sandbox: sandbox(metadata)?,
            name,
        };
        Ok(Self {
            state,
            workload,
            wish: Wish::of(metadata)?,
            obstacle: obstacle(pod),
        })
    }

    /// Its addresses, if nobody else may have them: those of a running pod.
    #[must_use]
    pub fn addresses(&self) -> &[IpAddr] {
        match self.state {
            PodState::Running => &self.workload.addresses,
            PodState::Pending | PodState::Finished => &[],
        }
    }

    /// Its UID.
    #[must_use]
    pub fn uid(&self) -> &WorkloadUid {
        &self.workload.uid
    }

    /// Its labels.
    #[must_use]
    pub fn labels(&self) -> &BTreeMap<String, String> {
        &self.workload.labels
    }

    /// The workload that it is, if it runs.
    #[must_use]
    pub fn workload(&self, context: PodContext<'_>) -> Option<Workload> {
        if self.state != PodState::Running {
            return None;
        }
        let placement = if &*self.workload.node == context.node {
            Placement::Here
        } else {
            Placement::Elsewhere
        };
        let nothing = Wish::default();
        Some(Workload {
            identity: self
                .workload
                .identity
                .in_trust_domain(context.config.trust_domain.clone()),
            membership: membership(
                &self.wish,
                context.namespace.map_or(&nothing, |facts| &facts.wish),
                self.obstacle.as_deref(),
                placement,
                context.config.mode,
            ),
            ..self.workload.clone()
        })
    }
}

fn name_of(metadata: &ObjectMeta) -> Result<ObjectName, Fault> {
    let name = metadata.name.as_deref().unwrap_or_default();
    let namespace = metadata.namespace.as_deref().unwrap_or("default");
    check_name("metadata.name", name)?;
    check_name("metadata.namespace", namespace)?;
    Ok(ObjectName::new(namespace, name))
}

fn uid(metadata: &ObjectMeta, name: &ObjectName) -> WorkloadUid {
    match metadata.uid.as_deref() {
        Some(uid) if !uid.is_empty() => WorkloadUid(uid.into()),
        _ => WorkloadUid(name.to_string().into()),
    }
}

/// `podIPs`, or `podIP` where only that is given; at most one of each family.
fn addresses(status: &PodStatus) -> Result<Vec<IpAddr>, Fault> {
    let given: Vec<(String, &str)> = match &status.pod_ips {
        Some(ips) if !ips.is_empty() => ips
            .iter()
            .enumerate()
            .map(|(index, ip)| (format!("status.podIPs[{index}].ip"), ip.ip.as_str()))
            .collect(),
        _ => status
            .pod_ip
            .iter()
            .filter(|ip| !ip.is_empty())
            .map(|ip| ("status.podIP".to_owned(), ip.as_str()))
            .collect(),
    };
    let mut addresses: Vec<IpAddr> = Vec::with_capacity(given.len());
    for (field, text) in given {
        let address = check_address(field.as_str(), text)?;
        if let Some(other) = addresses
            .iter()
            .find(|other| other.is_ipv4() == address.is_ipv4())
        {
            return Err(Fault::new(
                field,
                format!("{address} is a second address of the family of {other}"),
            ));
        }
        addresses.push(address);
    }
    Ok(addresses)
}

/// Unset counts as ready where nothing reports conditions at all, as in a manifest by hand. A pod
/// that is being deleted is leaving, like in EndpointSlices.
fn readiness(pod: &Pod) -> Readiness {
    let conditions = pod
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_deref())
        .unwrap_or_default();
    let is_serving = conditions.is_empty()
        || conditions
            .iter()
            .any(|condition| condition.type_ == "Ready" && condition.status == "True");
    Readiness::of(is_serving, pod.metadata.deletion_timestamp.is_some())
}

/// Named TCP ports of the containers that run as long as the pod: init containers only if they are
/// sidecars. The first of a name counts, as in Kubernetes.
fn named_ports(pod: &Pod) -> Result<BTreeMap<String, u16>, Fault> {
    let Some(spec) = &pod.spec else {
        return Ok(BTreeMap::new());
    };
    let is_sidecar = |container: &Container| container.restart_policy.as_deref() == Some("Always");
    let inits = spec.init_containers.iter().flatten().enumerate();
    let containers = spec
        .containers
        .iter()
        .enumerate()
        .map(|(index, container)| ("containers", index, container))
        .chain(
            inits
                .filter(|(_, container)| is_sidecar(container))
                .map(|(index, container)| ("initContainers", index, container)),
        );
    let mut named = BTreeMap::new();
    for (list, at, container) in containers {
        for (index, port) in container.ports.iter().flatten().enumerate() {
            let field = format!("spec.{list}[{at}].ports[{index}].containerPort");
            let number = check_port(field, port.container_port)?;
            if let Some(name) = port
                .name
                .as_ref()
                .filter(|_| is_tcp(port.protocol.as_deref()))
            {
                named.entry(name.clone()).or_insert(number);
            }
        }
    }
    Ok(named)
}

fn sandbox(metadata: &ObjectMeta) -> Result<Option<Sandbox>, Fault> {
    let path = |name: &str| {
        annotation(metadata, name)
            .map(|text| {
                let path = PathBuf::from(text);
                if path.is_absolute() {
                    return Ok(path);
                }
                Err(Fault::new(
                    format!("metadata.annotations[{name}]"),
                    format!("{text:?} is not an absolute path"),
                ))
            })
            .transpose()
    };
    let cgroup = path(CGROUP_ANNOTATION)?;
    Ok(path(NETNS_ANNOTATION)?.map(|netns| Sandbox { netns, cgroup }))
}

/// Name of the owner that people speak of: the Deployment of a ReplicaSet, the CronJob of a Job.
fn owner<'a>(metadata: &'a ObjectMeta, labels: &BTreeMap<String, String>) -> Option<&'a str> {
    let owners = metadata.owner_references.as_deref()?;
    let owner: &OwnerReference = owners
        .iter()
        .find(|owner| owner.controller == Some(true))
        .or(owners.first())?;
    let name = owner.name.as_str();
    match owner.kind.as_str() {
        // A static pod is its node's.
        "Node" => None,
        "ReplicaSet" => Some(without_template_hash(name, labels)),
        "Job" => Some(without_schedule(name)),
        _ => Some(name),
    }
}

/// A Deployment's ReplicaSets end in `-<hash>`, which their pods bear as a label.
fn without_template_hash<'a>(name: &'a str, labels: &BTreeMap<String, String>) -> &'a str {
    labels
        .get("pod-template-hash")
        .and_then(|hash| name.strip_suffix(hash.as_str())?.strip_suffix('-'))
        .filter(|deployment| !deployment.is_empty())
        .unwrap_or(name)
}

/// A CronJob's Jobs end in `-<minutes since the epoch>`.
fn without_schedule(name: &str) -> &str {
    match name.rsplit_once('-') {
        Some((cron_job, minutes))
            if !cron_job.is_empty()
                && minutes.len() >= 8
                && minutes.bytes().all(|c| c.is_ascii_digit()) =>
        {
            cron_job
        }
        _ => name,
    }
}

#[cfg(test)]
#[path = "pod_tests.rs"]
mod tests;
