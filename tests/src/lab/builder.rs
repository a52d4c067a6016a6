//! What a lab is to hold, said in Rust; it becomes the same Kubernetes objects that a directory could hold.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Value, json};

use super::{Binaries, Lab};

/// One of the two nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// `node-a`.
    A,
    /// `node-b`.
    B,
}

impl Side {
    /// Both.
    pub const ALL: [Self; 2] = [Self::A, Self::B];

    /// The node's name.
    #[must_use]
    pub fn node(self) -> &'static str {
        match self {
            Self::A => "node-a",
            Self::B => "node-b",
        }
    }

    /// 1 or 2.
    #[must_use]
    pub fn index(self) -> u8 {
        match self {
            Self::A => 1,
            Self::B => 2,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mesh {
    Default,
    Strict,
    Permissive,
    Outside,
}

/// A pod to be.
#[derive(Debug, Clone)]
pub struct PodSpec {
    name: String,
    namespace: String,
    node: Option<Side>,
    service_account: Option<String>,
    mesh: Mesh,
    labels: BTreeMap<String, String>,
    ports: Vec<(String, u16)>,
    probes: BTreeMap<String, Value>,
    annotations: BTreeMap<String, String>,
    command: Vec<String>,
    v4_only: bool,
    unready: bool,
}

impl PodSpec {
    /// A pod in the mesh, in namespace `default`, with the label `app` and a service account of its own name.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            namespace: "default".to_owned(),
            node: None,
            service_account: None,
            mesh: Mesh::Default,
            labels: [("app".to_owned(), name.to_owned())].into(),
            ports: Vec::new(),
            probes: BTreeMap::new(),
            annotations: BTreeMap::new(),
            command: Vec::new(),
            v4_only: false,
            unready: false,
        }
    }

    /// On this node; else the pods are spread.
    #[must_use]
    pub fn on(mut self, side: Side) -> Self {
        self.node = Some(side);
        self
    }

    /// In this namespace.
    #[must_use]
    pub fn namespace(mut self, namespace: &str) -> Self {
        namespace.clone_into(&mut self.namespace);
        self
    }

    /// With this service account.
    #[must_use]
    pub fn service_account(mut self, name: &str) -> Self {
        self.service_account = Some(name.to_owned());
        self
    }

    /// In STRICT mode.
    #[must_use]
    pub fn strict(mut self) -> Self {
        self.mesh = Mesh::Strict;
        self
    }

    /// In PERMISSIVE mode, whatever the mesh's default is.
    #[must_use]
    pub fn permissive(mut self) -> Self {
        self.mesh = Mesh::Permissive;
        self
    }

    /// Not in the mesh.
    #[must_use]
    pub fn outside(mut self) -> Self {
        self.mesh = Mesh::Outside;
        self
    }

    /// With a label.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    /// With a container port.
    #[must_use]
    pub fn port(mut self, name: &str, port: u16) -> Self {
        self.ports.push((name.to_owned(), port));
        self
    }

    /// With a probe of its container, such as `readinessProbe` and `{"tcpSocket": {"port": 80}}`.
    #[must_use]
    pub fn probe(mut self, kind: &str, probe: Value) -> Self {
        self.probes.insert(kind.to_owned(), probe);
        self
    }

    /// With an annotation; one that the lab would set itself stays as it is given here.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Runs this as soon as the lab stands.
    #[must_use]
    pub fn command(mut self, command: &[&str]) -> Self {
        self.command = command.iter().map(|&word| word.to_owned()).collect();
        self
    }

    /// Without IPv6.
    #[must_use]
    pub fn v4_only(mut self) -> Self {
        self.v4_only = true;
        self
    }

    /// No endpoint of its Services until [`Lab::set_ready`](super::Lab::set_ready) says so.
    #[must_use]
    pub fn unready(mut self) -> Self {
        self.unready = true;
        self
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn to_document(&self) -> Value {
        let mut labels = self.labels.clone();
        if self.mesh != Mesh::Outside {
            labels.insert("undermesh.io/mesh".to_owned(), "enabled".to_owned());
        }
        let ports: Vec<Value> = self
            .ports
            .iter()
            .map(|(name, port)| json!({"name": name, "containerPort": port}))
            .collect();
        let mut container = json!({"name": "app", "image": "none"});
        if !ports.is_empty() {
            container["ports"] = ports.into();
        }
        for (kind, probe) in &self.probes {
            container[kind] = probe.clone();
        }
        if !self.command.is_empty() {
            container["command"] = self.command.clone().into();
        }
        let mut document = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": self.name, "namespace": self.namespace, "labels": labels},
            "spec": {
                "serviceAccountName": self.service_account.as_ref().unwrap_or(&self.name),
                "containers": [container],
            },
        });
        if let Some(side) = self.node {
            document["spec"]["nodeName"] = side.node().into();
        }
        let own = self.annotations.iter();
        let mut annotations: serde_json::Map<String, Value> = own
            .map(|(key, value)| (key.clone(), value.clone().into()))
            .collect();
        match self.mesh {
            Mesh::Strict => annotations.insert("undermesh.io/mode".into(), "Strict".into()),
            Mesh::Permissive => annotations.insert("undermesh.io/mode".into(), "Permissive".into()),
            Mesh::Default | Mesh::Outside => None,
        };
        if self.v4_only {
            annotations.insert(super::plan::V4_ONLY.into(), "true".into());
        }
        if self.unready {
            document["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
        }
        if !annotations.is_empty() {
            document["metadata"]["annotations"] = annotations.into();
        }
        document
    }
}

/// A Service to be.
#[derive(Debug, Clone)]
pub struct ServiceSpec {
    name: String,
    namespace: String,
    selector: BTreeMap<String, String>,
    /// What its name says is spoken, port, target.
    ports: Vec<(&'static str, u16, u16)>,
}

impl ServiceSpec {
    /// A Service in namespace `default` for the pods with the label `app` of this name.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            namespace: "default".to_owned(),
            selector: [("app".to_owned(), name.to_owned())].into(),
            ports: Vec::new(),
        }
    }

    /// In this namespace.
    #[must_use]
    pub fn namespace(mut self, namespace: &str) -> Self {
        namespace.clone_into(&mut self.namespace);
        self
    }

    /// For the pods with this label, instead.
    #[must_use]
    pub fn select(mut self, key: &str, value: &str) -> Self {
        self.selector = [(key.to_owned(), value.to_owned())].into();
        self
    }

    /// With a TCP port that leads to `target` of the pods.
    #[must_use]
    pub fn port(mut self, port: u16, target: u16) -> Self {
        self.ports.push(("tcp", port, target));
        self
    }

    /// The same, for HTTP.
    #[must_use]
    pub fn http(mut self, port: u16, target: u16) -> Self {
        self.ports.push(("http", port, target));
        self
    }

    fn to_document(&self) -> Value {
        let ports: Vec<Value> = self
            .ports
            .iter()
            .map(|(kind, port, target)| {
                json!({"name": format!("{kind}-{port}"), "port": port, "targetPort": target, "protocol": "TCP"})
            })
            .collect();
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": self.name, "namespace": self.namespace},
            "spec": {"selector": self.selector, "ports": ports},
        })
    }
}

/// What a lab is to hold.
#[derive(Debug, Clone)]
pub struct LabBuilder {
    pub(super) id: Option<String>,
    pub(super) documents: Vec<Value>,
    pub(super) binaries: Option<Binaries>,
    pub(super) agents: bool,
    pub(super) certificate_lifetime: Option<String>,
    pub(super) agent_arguments: Vec<String>,
    pub(super) environment: Vec<(String, String)>,
}

impl LabBuilder {
    pub(super) fn new() -> Self {
        Self {
            id: None,
            documents: Vec::new(),
            binaries: None,
            agents: true,
            certificate_lifetime: None,
            agent_arguments: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// With a name, rather than one made from the process id. 1 to 24 of `a-z0-9-`.
    #[must_use]
    pub fn id(mut self, id: &str) -> Self {
        self.id = Some(id.to_owned());
        self
    }

    /// With a pod.
    #[must_use]
    pub fn pod(mut self, pod: PodSpec) -> Self {
        self.documents.push(pod.to_document());
        self
    }

    /// With a Service.
    #[must_use]
    pub fn service(mut self, service: ServiceSpec) -> Self {
        self.documents.push(service.to_document());
        self
    }

    /// With any Kubernetes object.
    #[must_use]
    pub fn document(mut self, document: Value) -> Self {
        self.documents.push(document);
        self
    }

    /// With all of these objects.
    #[must_use]
    pub fn documents(mut self, documents: Vec<Value>) -> Self {
        self.documents.extend(documents);
        self
    }

    /// With programs from elsewhere than [`Binaries::find`] would look.
    #[must_use]
    pub fn binaries(mut self, binaries: Binaries) -> Self {
        self.binaries = Some(binaries);
        self
    }

    /// Without CA and agents: plain pods, until [`Lab::start_mesh`].
    #[must_use]
    pub fn without_agents(mut self) -> Self {
        self.agents = false;
        self
    }

    /// Lifetime of the certificates, such as `5s`.
    #[must_use]
    pub fn certificate_lifetime(mut self, lifetime: &str) -> Self {
        self.certificate_lifetime = Some(lifetime.to_owned());
        self
    }

    /// More arguments for every agent.
    #[must_use]
    pub fn agent_arguments(mut self, arguments: &[&str]) -> Self {
        self.agent_arguments
            .extend(arguments.iter().map(|&word| word.to_owned()));
        self
    }

    /// An environment variable for every agent and the CA.
    #[must_use]
    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Builds it. On an error nothing is left.
    pub fn start(self) -> Result<Lab> {
        Lab::start(self)
    }
}
