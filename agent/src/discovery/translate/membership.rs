//! Whether a pod belongs to the mesh.

use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::super::object::Fault;
use crate::mesh::{Membership, Mode};

/// Label of a pod or its namespace: `enabled` or `disabled`.
pub const MESH_LABEL: &str = "undermesh.io/mesh";
/// Annotation of a pod or its namespace: `Strict` or `Permissive`.
pub const MODE_ANNOTATION: &str = "undermesh.io/mode";
/// Istio's label of a pod or its namespace: `ambient` or `none`.
const AMBIENT_LABEL: &str = "istio.io/dataplane-mode";

/// Containers that are a sidecar of another mesh.
const SIDECARS: [&str; 2] = ["istio-proxy", "linkerd-proxy"];
/// Annotations that say that a sidecar is in the pod.
const INJECTED: [&str; 2] = ["sidecar.istio.io/status", "linkerd.io/proxy-version"];
/// Labels or annotations, and values, that ask for a sidecar.
const INJECT: [(&str, &[&str]); 2] = [
    ("sidecar.istio.io/inject", &["true"]),
    ("linkerd.io/inject", &["enabled", "ingress"]),
];
/// Parts of the names of runtime classes that have no sockets in the pod's network namespace.
const RUNTIMES: [&str; 3] = ["kata", "gvisor", "runsc"];

/// What a label asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    /// To be in the mesh.
    Enabled,
    /// Not to be.
    Disabled,
}

/// Whether a pod runs on the node of this agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Placement {
    /// It does.
    Here,
    /// Another agent, or a ztunnel, enrols it.
    Elsewhere,
}

/// What labels and annotations of a pod or a namespace ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Wish {
    mesh: Option<Asked>,
    ambient: Option<Asked>,
    mode: Option<Mode>,
}

impl Wish {
    pub(super) fn of(metadata: &ObjectMeta) -> Result<Self, Fault> {
        let label = |name| metadata.labels.as_ref()?.get(name).map(String::as_str);
        let mesh = match label(MESH_LABEL) {
            None => None,
            Some("enabled") => Some(Asked::Enabled),
            Some("disabled") => Some(Asked::Disabled),
            Some(other) => {
                return Err(Fault::new(
                    format!("metadata.labels[{MESH_LABEL}]"),
                    format!("{other:?} is neither \"enabled\" nor \"disabled\""),
                ));
            }
        };
        let ambient = match label(AMBIENT_LABEL) {
            Some("ambient") => Some(Asked::Enabled),
            Some("none") => Some(Asked::Disabled),
            _ => None,
        };
        let mode = annotation(metadata, MODE_ANNOTATION)
            .map(str::parse)
            .transpose()
            .map_err(|error| {
                Fault::new(
                    format!("metadata.annotations[{MODE_ANNOTATION}]"),
                    format!("{error}"),
                )
            })?;
        Ok(Self {
            mesh,
            ambient,
            mode,
        })
    }
}

pub(super) fn annotation<'a>(metadata: &'a ObjectMeta, name: &str) -> Option<&'a str> {
    metadata.annotations.as_ref()?.get(name).map(String::as_str)
}

/// What the mesh needs to know of a namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NamespaceFacts {
    pub(super) wish: Wish,
}

impl NamespaceFacts {
    /// Checks a namespace.
    pub fn of(namespace: &Namespace) -> Result<Self, Fault> {
        Ok(Self {
            wish: Wish::of(&namespace.metadata)?,
        })
    }
}

/// Why this pod cannot be in the mesh, whoever asks for it.
pub(super) fn obstacle(pod: &Pod) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    if spec.host_network == Some(true) {
        return Some("hostNetwork: it shares the network namespace of its node".to_owned());
    }
    if let Some(class) = &spec.runtime_class_name {
        let lower = class.to_ascii_lowercase();
        if RUNTIMES.iter().any(|runtime| lower.contains(runtime)) {
            return Some(format!(
                "runtimeClassName {class}: its sockets are not in the pod's network namespace"
            ));
        }
    }
    let containers = spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten());
    for container in containers {
        if SIDECARS.contains(&container.name.as_str()) {
            return Some(format!(
                "container {}: a sidecar of another mesh",
                container.name
            ));
        }
    }
    let metadata = &pod.metadata;
    for name in INJECTED {
        if annotation(metadata, name).is_some() {
            return Some(format!("annotation {name}: a sidecar of another mesh"));
        }
    }
    for (name, values) in INJECT {
        let label = metadata.labels.as_ref().and_then(|labels| labels.get(name));
        let asked = annotation(metadata, name).or(label.map(String::as_str));
        if let Some(value) = asked.filter(|value| values.contains(value)) {
            return Some(format!(
                "{name}: {value}: asks for a sidecar of another mesh"
            ));
        }
    }
    None
}

/// The pod's own wish wins over its namespace's, and Undermesh's label over Istio's. Istio's counts
/// for pods of other nodes only: those are some ztunnel's, ours have to be asked for.
pub(super) fn membership(
    pod: &Wish,
    namespace: &Wish,
    obstacle: Option<&str>,
    placement: Placement,
    default: Mode,
) -> Membership {
    let mode = pod.mode.or(namespace.mode).unwrap_or(default);
    match (pod.mesh.or(namespace.mesh), obstacle) {
        (Some(Asked::Enabled), None) => return Membership::Meshed(mode),
        (Some(Asked::Enabled), Some(reason)) => return Membership::Refused(reason.to_owned()),
        (Some(Asked::Disabled), _) => return Membership::Outside,
        (None, _) => {}
    }
    let ambient = pod.ambient.or(namespace.ambient) == Some(Asked::Enabled);
    if ambient && placement == Placement::Elsewhere && obstacle.is_none() {
        return Membership::Meshed(mode);
    }
    Membership::Outside
}
