//! From the objects that were asked for to those of a running cluster: nodes, addresses, namespaces and cgroups
//! are filled in, as scheduler and kubelet would.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::builder::Side;
use super::endpoints::{number, vips};
use super::state::{PodRecord, ServiceRecord};
use crate::manifests::{file_name, items, kind, name, namespace, object, text};

/// When pods were deleted that were.
const DELETED: &str = "2026-01-01T00:00:00Z";

/// Annotation of a pod that gets no IPv6.
pub(super) const V4_ONLY: &str = "lab.undermesh.io/v4-only";

/// Address of a node on the wire.
pub(super) fn node_v4(index: u8) -> Ipv4Addr {
    Ipv4Addr::new(172, 30, 0, index)
}

pub(super) fn node_v6(index: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x172, 0x30, 0, 0, 0, 0, index.into())
}

/// Pods of node 1 are 10.241.0.0/16 and fd00:10:241::/64.
pub(super) fn pod_v4(node: u8, index: u16) -> Ipv4Addr {
    let [high, low] = index.to_be_bytes();
    Ipv4Addr::new(10, 240 + node, high, low)
}

pub(super) fn pod_v6(node: u8, index: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x240 + u16::from(node), 0, 0, 0, 0, index)
}

fn vip_v4(index: u16) -> Ipv4Addr {
    let [high, low] = index.to_be_bytes();
    Ipv4Addr::new(10, 96, high, low)
}

fn vip_v6(index: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, index)
}

/// The objects of a cluster.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Names of directories come from these.
    pub dir: PathBuf,
    pub cgroup: PathBuf,
    pub(super) objects: BTreeMap<String, Value>,
    pub pods: Vec<PodRecord>,
    pub services: Vec<ServiceRecord>,
    /// By node; 1 is the gateway.
    last_pod: [u16; 2],
    last_vip: u16,
}

impl Plan {
    pub fn new(dir: PathBuf, cgroup: PathBuf) -> Self {
        Self {
            dir,
            cgroup,
            last_pod: [1, 1],
            ..Self::default()
        }
    }

    /// Adds objects, filled in. Gives back the pods among them.
    pub fn add(&mut self, documents: Vec<Value>) -> Result<Vec<PodRecord>> {
        // Pods are judged by their namespaces and by the mesh's settings: those first.
        let (pods, others): (Vec<_>, Vec<_>) = documents
            .into_iter()
            .partition(|document| kind(document) == "Pod");
        for document in others {
            match kind(&document) {
                "Service" => self.add_service(document)?,
                "" => bail!("an object without kind: {document}"),
                _ => self.insert(document)?,
            }
        }
        let mut added = Vec::new();
        for document in pods {
            let title = format!("pod {}/{}", namespace(&document), name(&document));
            added.push(self.add_pod(document, None).context(title)?);
        }
        Ok(added)
    }

    /// Adds a pod that has the addresses of another of the same node, which must be gone by then.
    pub fn add_heir(&mut self, document: Value, former: &PodRecord) -> Result<PodRecord> {
        self.add_pod(document, Some(former.index))
    }

    fn insert(&mut self, document: Value) -> Result<()> {
        if name(&document).is_empty() {
            bail!("a {} without metadata.name", kind(&document));
        }
        let file = file_name(&document);
        if self.objects.contains_key(&file) {
            bail!(
                "{} {}/{} exists already",
                kind(&document),
                namespace(&document),
                name(&document)
            );
        }
        self.objects.insert(file, document);
        Ok(())
    }

    /// Takes an object out, whatever it is.
    pub fn remove_object(&mut self, wanted: &str, space: &str, title: &str) {
        self.objects.retain(|_, object| {
            !(kind(object) == wanted && namespace(object) == space && name(object) == title)
        });
        match wanted {
            "Pod" => self
                .pods
                .retain(|pod| !(pod.namespace == space && pod.name == title)),
            "Service" => self
                .services
                .retain(|service| !(service.namespace == space && service.name == title)),
            _ => {}
        }
    }

    /// Replaces an object that is no pod or Service, or adds it.
    pub fn put(&mut self, document: Value) -> Result<()> {
        self.objects.remove(&file_name(&document));
        self.insert(document)
    }

    /// Says of a pod whether it is ready, as its kubelet would.
    pub fn set_ready(&mut self, space: &str, title: &str, ready: bool) -> Result<()> {
        let pod = self.pod_mut(space, title)?;
        let status = if ready { "True" } else { "False" };
        object(pod, &["status"])?.insert(
            "conditions".into(),
            json!([{"type": "Ready", "status": status}]),
        );
        Ok(())
    }

    /// Says of a pod that it was deleted, as the API server would: it goes on until its kubelet is done.
    pub fn set_terminating(&mut self, space: &str, title: &str) -> Result<()> {
        let pod = self.pod_mut(space, title)?;
        object(pod, &["metadata"])?.insert("deletionTimestamp".into(), DELETED.into());
        Ok(())
    }

    fn pod_mut(&mut self, space: &str, title: &str) -> Result<&mut Value> {
        let wanted = |object: &&mut Value| {
            kind(object) == "Pod" && namespace(object) == space && name(object) == title
        };
        let pod = self.objects.values_mut().find(wanted);
        pod.with_context(|| format!("no pod {space}/{title}"))
    }

    fn add_pod(&mut self, mut document: Value, inherited: Option<u16>) -> Result<PodRecord> {
        let side = match text(&document, "/spec/nodeName") {
            "" => {
                let count = |side: Side| {
                    let on = |pod: &&PodRecord| pod.node == side.node();
                    self.pods.iter().filter(on).count()
                };
                if count(Side::A) <= count(Side::B) {
                    Side::A
                } else {
                    Side::B
                }
            }
            wanted => *Side::ALL
                .iter()
                .find(|side| side.node() == wanted)
                .with_context(|| format!("no node {wanted:?}: there are node-a and node-b"))?,
        };
        let index = match inherited {
            Some(index) => index,
            None => {
                let last = &mut self.last_pod[usize::from(side.index() - 1)];
                *last = last.checked_add(1).context("no pod address is left")?;
                *last
            }
        };

        let v4_only = object(&mut document, &["metadata", "annotations"])?.contains_key(V4_ONLY);
        let mut ips = vec![IpAddr::from(pod_v4(side.index(), index))];
        if !v4_only {
            ips.push(pod_v6(side.index(), index).into());
        }
        let service_account = match text(&document, "/spec/serviceAccountName") {
            "" => "default",
            account => account,
        };
        let mut pod = PodRecord {
            name: name(&document).to_owned(),
            namespace: namespace(&document).to_owned(),
            node: side.node().to_owned(),
            index,
            netns: PathBuf::new(),
            cgroup: PathBuf::new(),
            dir: PathBuf::new(),
            ips,
            service_account: service_account.to_owned(),
            mode: self.mode_of(&document),
            command: command_of(&document),
        };
        pod.netns = self.dir.join("netns").join(pod.key());
        pod.cgroup = self.cgroup.join(side.node()).join("pods").join(pod.key());
        pod.dir = self.dir.join("pods").join(pod.key());

        let metadata = object(&mut document, &["metadata"])?;
        metadata.insert("namespace".into(), pod.namespace.clone().into());
        // Never the same again for a pod of the same name.
        metadata
            .entry("uid")
            .or_insert_with(|| format!("{}-{}-{index}", pod.key(), pod.node).into());
        let annotations = object(&mut document, &["metadata", "annotations"])?;
        for (key, at) in [("netns", &pod.netns), ("cgroup", &pod.cgroup)] {
            let key = format!("undermesh.io/{key}");
            annotations.entry(key).or_insert_with(|| path(at));
        }
        object(&mut document, &["spec"])?.insert("nodeName".into(), side.node().into());
        let status = object(&mut document, &["status"])?;
        let listed: Vec<Value> = pod.ips.iter().map(|ip| json!({"ip": ip})).collect();
        status.insert("podIP".into(), pod.ips[0].to_string().into());
        status.insert("podIPs".into(), listed.into());
        status.entry("phase").or_insert_with(|| "Running".into());
        status
            .entry("conditions")
            .or_insert_with(|| json!([{"type": "Ready", "status": "True"}]));
        self.insert(document)?;
        self.pods.push(pod.clone());
        Ok(pod)
    }

    /// `strict`, `permissive` or `outside`, by the rules of the manifests.
    fn mode_of(&self, pod: &Value) -> String {
        const LABEL: &str = "/metadata/labels/undermesh.io~1mesh";
        let find = |wanted: &str, title: &str| {
            let mut all = self.objects.values();
            all.find(|object| kind(object) == wanted && (title.is_empty() || name(object) == title))
        };
        let enabled = match text(pod, LABEL) {
            "" => find("Namespace", namespace(pod)).map_or("", |object| text(object, LABEL)),
            label => label,
        };
        if enabled != "enabled" {
            return "outside".to_owned();
        }
        let mode = match text(pod, "/metadata/annotations/undermesh.io~1mode") {
            "" => find("MeshConfig", "").map_or("", |object| text(object, "/spec/mode")),
            mode => mode,
        };
        match mode {
            "" => "permissive".to_owned(),
            mode => mode.to_lowercase(),
        }
    }

    pub fn trust_domain(&self) -> &str {
        let config = self
            .objects
            .values()
            .find(|object| kind(object) == "MeshConfig");
        match config.map_or("", |object| text(object, "/spec/trustDomain")) {
            "" => "cluster.local",
            domain => domain,
        }
    }

    fn add_service(&mut self, mut document: Value) -> Result<()> {
        let spec = object(&mut document, &["spec"])?;
        if !spec.contains_key("clusterIP") {
            self.last_vip = self.last_vip.checked_add(1).context("no VIP is left")?;
            let vips = [
                vip_v4(self.last_vip).to_string(),
                vip_v6(self.last_vip).to_string(),
            ];
            spec.insert("clusterIP".into(), vips[0].clone().into());
            spec.insert("ipFamilies".into(), json!(["IPv4", "IPv6"]));
            spec.insert("clusterIPs".into(), json!(vips));
        }
        let metadata = object(&mut document, &["metadata"])?;
        metadata
            .entry("namespace")
            .or_insert_with(|| "default".into());
        let ports = items(&document, "/spec/ports");
        self.services.push(ServiceRecord {
            name: name(&document).to_owned(),
            namespace: namespace(&document).to_owned(),
            vips: vips(&document),
            ports: ports
                .iter()
                .filter_map(|port| number(&port["port"]))
                .collect(),
        });
        self.insert(document)
    }
}

fn path(path: &std::path::Path) -> Value {
    path.display().to_string().into()
}

/// What the first container runs: its `command` and `args`, on the machine's own file system.
fn command_of(pod: &Value) -> Vec<String> {
    let words = |pointer| items(pod, pointer).iter().filter_map(Value::as_str);
    let command: Vec<String> = words("/spec/containers/0/command")
        .map(str::to_owned)
        .collect();
    if command.is_empty() {
        // Arguments to an image's entry point, of which there is none here.
        return command;
    }
    command
        .into_iter()
        .chain(words("/spec/containers/0/args").map(str::to_owned))
        .collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::lab::builder::PodSpec;
    use crate::manifests::parse;

    pub(in crate::lab) fn plan(text: &str) -> Plan {
        let mut plan = Plan::new("/state".into(), "/cgroup".into());
        plan.add(parse(text).unwrap()).unwrap();
        plan
    }

    pub(in crate::lab) const WEB: &str = "
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: http}]}
---
kind: Pod
metadata: {name: one, labels: {app: web}}
spec: {containers: [{ports: [{name: http, containerPort: 8080}]}]}
---
kind: Pod
metadata: {name: two, labels: {app: web}}
spec: {containers: [{ports: [{name: http, containerPort: 9090}]}]}
---
kind: Pod
metadata: {name: sick, labels: {app: web}}
spec: {containers: [{ports: [{name: http, containerPort: 9090}]}]}
status: {conditions: [{type: Ready, status: 'False'}]}
";

    #[test]
    fn pods_are_spread_and_get_addresses_and_paths() {
        let plan = plan(WEB);
        assert_eq!(plan.pods[0].node, "node-a");
        assert_eq!(plan.pods[1].node, "node-b");
        assert_eq!(plan.pods[2].node, "node-a");
        assert_eq!(plan.pods[2].ips[0].to_string(), "10.241.0.3");
        assert_eq!(plan.pods[1].ips[1].to_string(), "fd00:10:242::2");
        let documents = plan.documents();
        let pod = &documents["pod-default-two.yaml"];
        assert_eq!(text(pod, "/status/podIPs/1/ip"), "fd00:10:242::2");
        assert_eq!(
            text(pod, "/metadata/annotations/undermesh.io~1netns"),
            "/state/netns/default.two"
        );
    }

    #[test]
    fn membership_comes_from_pod_namespace_and_mesh() {
        let plan = plan(
            "
kind: Namespace
metadata: {name: shop, labels: {undermesh.io/mesh: enabled}}
---
kind: MeshConfig
metadata: {name: mesh}
spec: {mode: Strict}
---
kind: Pod
metadata: {name: a, namespace: shop}
---
kind: Pod
metadata: {name: b, namespace: shop, annotations: {undermesh.io/mode: Permissive}}
---
kind: Pod
metadata: {name: c}
",
        );
        let modes: Vec<&str> = plan.pods.iter().map(|pod| pod.mode.as_str()).collect();
        assert_eq!(modes, ["strict", "permissive", "outside"]);
    }

    #[test]
    fn an_heir_has_the_addresses_of_the_former_pod_and_nothing_else_of_it() {
        let mut plan = plan(WEB);
        let former = plan.pods[0].clone();
        let spec = PodSpec::new("heir").on(Side::A).to_document();
        let heir = plan.add_heir(spec, &former).unwrap();
        assert_eq!(heir.ips, former.ips);
        assert_ne!(heir.netns, former.netns);
        let documents = plan.documents();
        let uid = |name: &str| {
            text(
                &documents[&format!("pod-default-{name}.yaml")],
                "/metadata/uid",
            )
        };
        assert_ne!(uid("heir"), uid("one"));
    }

    #[test]
    fn a_name_can_be_used_again_but_an_address_and_a_uid_are_not() {
        let mut plan = plan(WEB);
        let before = plan.pods[0].clone();
        plan.remove_object("Pod", "default", "one");
        let spec = PodSpec::new("one").on(Side::A).to_document();
        let after = plan.add(vec![spec.clone()]).unwrap().remove(0);
        assert_ne!(before.ips, after.ips);
        assert!(plan.add(vec![spec]).is_err());
    }
}
