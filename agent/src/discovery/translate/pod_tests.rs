use serde_json::{Value, json};

use super::*;
use crate::mesh::Mode;

fn facts(manifest: Value) -> Result<PodFacts, Fault> {
    PodFacts::of(&serde_json::from_value(manifest).unwrap())
}

/// A pod with an address and these labels, changed as told.
fn pod(change: impl FnOnce(&mut Value)) -> Value {
    let mut manifest = json!({
        "metadata": {"name": "web-1", "namespace": "shop", "uid": "u-1",
            "labels": {"undermesh.io/mesh": "enabled"}, "annotations": {}},
        "spec": {"nodeName": "node-a", "containers": [{"name": "app"}]},
        "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}]}
    });
    change(&mut manifest);
    manifest
}

fn workload_in(manifest: Value, namespace: Value, node: &str) -> Option<Workload> {
    let namespace = serde_json::from_value(namespace).unwrap();
    let namespace = NamespaceFacts::of(&namespace).unwrap();
    facts(manifest).unwrap().workload(PodContext {
        namespace: Some(&namespace),
        config: &MeshConfig::default(),
        node,
    })
}

fn workload(manifest: Value) -> Workload {
    workload_in(manifest, json!({"metadata": {"name": "shop"}}), "node-a").unwrap()
}

fn labelled(name: &str, value: &str) -> Value {
    json!({"metadata": {"name": "shop", "labels": {name: value}}})
}

fn refusal(change: impl FnOnce(&mut Value)) -> String {
    match workload(pod(change)).membership {
        Membership::Refused(reason) => reason,
        other => panic!("{other:?}"),
    }
}

fn fault(change: impl FnOnce(&mut Value)) -> (String, String) {
    let fault = facts(pod(change)).unwrap_err();
    (fault.field, fault.reason)
}

#[test]
fn a_pods_opaque_ports_are_those_that_it_lists() {
    let workload = workload(pod(|pod| {
        pod["metadata"]["annotations"]["undermesh.io/opaque-ports"] = "25, 9000-9100".into();
    }));
    assert_eq!(workload.opaque_ports, "25,9000-9100".parse().unwrap());
}

#[test]
fn a_pod_becomes_a_workload_with_all_that_the_mesh_knows_of_it() {
    let workload = workload(pod(|pod| {
        pod["metadata"]["labels"]["app.kubernetes.io/version"] = "v2".into();
        pod["metadata"]["labels"]["version"] = "v1".into();
        pod["metadata"]["annotations"] = json!({
            "undermesh.io/netns": "/run/netns/web", "undermesh.io/cgroup": "/cg/web",
            "undermesh.io/mode": "Strict"});
        pod["spec"]["serviceAccountName"] = "web".into();
        pod["status"]["podIPs"] = json!([{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]);
    }));
    assert_eq!(workload.uid, WorkloadUid("u-1".into()));
    assert_eq!(workload.name, ObjectName::new("shop", "web-1"));
    assert_eq!(&*workload.workload, "web-1");
    assert_eq!(workload.version.as_deref(), Some("v2"));
    assert_eq!(&*workload.node, "node-a");
    let identity = "spiffe://cluster.local/ns/shop/sa/web";
    assert_eq!(workload.identity.to_string(), identity);
    let addresses: [IpAddr; 2] = ["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
    assert_eq!(workload.addresses, addresses);
    assert_eq!(workload.membership, Membership::Meshed(Mode::Strict));
    assert!(workload.readiness == Readiness::Ready);
    let sandbox = workload.sandbox.unwrap();
    assert_eq!(sandbox.netns, PathBuf::from("/run/netns/web"));
    assert_eq!(sandbox.cgroup, Some(PathBuf::from("/cg/web")));
}

#[test]
fn what_a_manifest_leaves_out_has_the_defaults_of_kubernetes() {
    let manifest = json!({"metadata": {"name": "web"}, "status": {"podIP": "10.0.0.1"}});
    let workload = workload(manifest);
    assert_eq!(workload.uid, WorkloadUid("default/web".into()));
    let identity = "spiffe://cluster.local/ns/default/sa/default";
    assert_eq!(workload.identity.to_string(), identity);
    assert_eq!(workload.addresses, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
    assert_eq!(workload.membership, Membership::Outside);
    assert!(workload.readiness == Readiness::Ready && workload.sandbox.is_none());
}

#[test]
fn the_label_of_the_pod_wins_over_that_of_its_namespace() {
    let unlabelled = |pod: &mut Value| pod["metadata"]["labels"] = json!({});
    let disabled = |pod: &mut Value| pod["metadata"]["labels"][MESH] = "disabled".into();
    const MESH: &str = "undermesh.io/mesh";
    let of = |manifest, namespace| {
        let workload = workload_in(manifest, namespace, "node-a").unwrap();
        workload.is_meshed()
    };
    assert!(of(pod(unlabelled), labelled(MESH, "enabled")));
    assert!(!of(pod(unlabelled), labelled(MESH, "disabled")));
    assert!(!of(pod(disabled), labelled(MESH, "enabled")));
    assert!(of(pod(|_| ()), labelled(MESH, "disabled")));
}

#[test]
fn an_ambient_pod_counts_as_meshed_on_other_nodes_only() {
    let ambient =
        || pod(|pod| pod["metadata"]["labels"] = json!({"istio.io/dataplane-mode": "ambient"}));
    let nothing = || json!({"metadata": {"name": "shop"}});
    let on = |manifest, namespace, node| workload_in(manifest, namespace, node).unwrap();
    assert!(on(ambient(), nothing(), "node-b").is_meshed());
    assert!(!on(ambient(), nothing(), "node-a").is_meshed());
    let mesh_label = labelled("undermesh.io/mesh", "disabled");
    assert!(!on(ambient(), mesh_label, "node-b").is_meshed());

    let plain = || pod(|pod| pod["metadata"]["labels"] = json!({}));
    let namespace = || labelled("istio.io/dataplane-mode", "ambient");
    assert!(on(plain(), namespace(), "node-b").is_meshed());
    let none = pod(|pod| pod["metadata"]["labels"] = json!({"istio.io/dataplane-mode": "none"}));
    assert!(!on(none, namespace(), "node-b").is_meshed());
}

#[test]
fn pods_that_cannot_be_in_the_mesh_are_refused_with_the_reason() {
    assert_eq!(
        refusal(|pod| pod["spec"]["hostNetwork"] = true.into()),
        "hostNetwork: it shares the network namespace of its node"
    );
    for class in ["kata-qemu", "gVisor", "runsc"] {
        assert_eq!(
            refusal(|pod| pod["spec"]["runtimeClassName"] = class.into()),
            format!("runtimeClassName {class}: its sockets are not in the pod's network namespace")
        );
    }
    for list in ["containers", "initContainers"] {
        assert_eq!(
            refusal(|pod| pod["spec"][list] = json!([{"name": "istio-proxy"}])),
            "container istio-proxy: a sidecar of another mesh"
        );
    }
    assert_eq!(
        refusal(|pod| {
            pod["metadata"]["annotations"]["linkerd.io/proxy-version"] = "2".into();
        }),
        "annotation linkerd.io/proxy-version: a sidecar of another mesh"
    );
    assert_eq!(
        refusal(|pod| pod["metadata"]["labels"]["sidecar.istio.io/inject"] = "true".into()),
        "sidecar.istio.io/inject: true: asks for a sidecar of another mesh"
    );
}

#[test]
fn a_pod_that_nobody_asks_for_is_outside_whatever_it_has() {
    let workload = workload(pod(|pod| {
        pod["metadata"]["labels"] = json!({});
        pod["spec"]["containers"] = json!([{"name": "istio-proxy"}]);
    }));
    assert_eq!(workload.membership, Membership::Outside);
}

#[test]
fn the_address_of_a_host_network_pod_is_not_its_own() {
    let workload = workload(pod(|pod| pod["spec"]["hostNetwork"] = true.into()));
    assert!(workload.addresses.is_empty());
}

#[test]
fn a_pod_without_an_address_is_pending_and_one_that_ended_is_finished() {
    let pending = facts(pod(|pod| pod["status"] = json!({"phase": "Pending"}))).unwrap();
    assert_eq!(pending.state, PodState::Pending);
    for phase in ["Succeeded", "Failed"] {
        let finished = facts(pod(|pod| pod["status"]["phase"] = phase.into())).unwrap();
        assert_eq!(finished.state, PodState::Finished);
        assert!(finished.addresses().is_empty());
        let context = PodContext {
            namespace: None,
            config: &MeshConfig::default(),
            node: "node-a",
        };
        assert_eq!(finished.workload(context), None);
    }
}

#[test]
fn readiness_is_the_condition_and_a_deleted_pod_is_leaving() {
    let readiness = |conditions: Value, deleted: Value| {
        let pod = pod(|pod| {
            pod["status"]["conditions"] = conditions;
            pod["metadata"]["deletionTimestamp"] = deleted;
        });
        workload(pod).readiness
    };
    let (ready, deleted) = (
        json!([{"type": "Ready", "status": "True"}]),
        json!("2026-01-01T00:00:00Z"),
    );
    let other = json!([{"type": "PodScheduled", "status": "True"}]);
    let unready = json!([{"type": "Ready", "status": "False"}]);
    for (conditions, deleted, expected) in [
        (json!([]), Value::Null, Readiness::Ready),
        (ready.clone(), Value::Null, Readiness::Ready),
        (unready.clone(), Value::Null, Readiness::Unready),
        (other, Value::Null, Readiness::Unready),
        (ready, deleted.clone(), Readiness::Leaving),
        (json!([]), deleted.clone(), Readiness::Leaving),
        (unready, deleted, Readiness::Unready),
    ] {
        let shown = format!("{conditions} {deleted}");
        assert_eq!(readiness(conditions, deleted), expected, "{shown}");
    }
}

#[test]
fn the_workload_is_named_by_the_owner_that_people_speak_of() {
    let name = |kind: &str, owner: &str, hash: &str| {
        let workload = workload(pod(|pod| {
            pod["metadata"]["labels"]["pod-template-hash"] = hash.into();
            pod["metadata"]["ownerReferences"] = json!([
                {"apiVersion": "v1", "kind": kind, "name": owner, "uid": "x", "controller": true}]);
        }));
        workload.workload.to_string()
    };
    assert_eq!(name("ReplicaSet", "web-7d4b9c", "7d4b9c"), "web");
    assert_eq!(name("ReplicaSet", "web-7d4b9c", "other"), "web-7d4b9c");
    assert_eq!(name("StatefulSet", "db", ""), "db");
    assert_eq!(name("Job", "backup-28371234", ""), "backup");
    assert_eq!(name("Job", "backup-1", ""), "backup-1");
    assert_eq!(name("Node", "node-a", ""), "web-1");
}

#[test]
fn named_ports_are_those_of_tcp_in_containers_and_sidecars() {
    let workload = workload(pod(|pod| {
        pod["spec"]["containers"] = json!([
            {"name": "a", "ports": [{"name": "http", "containerPort": 8080},
                {"name": "dns", "containerPort": 53, "protocol": "UDP"}, {"containerPort": 9}]},
            {"name": "b", "ports": [{"name": "http", "containerPort": 8081}]}]);
        pod["spec"]["initContainers"] = json!([
            {"name": "c", "restartPolicy": "Always",
                "ports": [{"name": "log", "containerPort": 24224}]},
            {"name": "d", "ports": [{"name": "setup", "containerPort": 1}]}]);
    }));
    let expected = [("http".to_owned(), 8080), ("log".to_owned(), 24224)];
    assert_eq!(workload.named_ports, BTreeMap::from(expected));
}

#[test]
fn each_fault_names_its_field_and_its_reason() {
    let expect = |(field, reason): (String, String), field_now: &str, reason_now: &str| {
        assert_eq!((field.as_str(), reason.as_str()), (field_now, reason_now));
    };
    expect(
        fault(|pod| pod["status"]["podIPs"] = json!([{"ip": "10.0.0"}])),
        "status.podIPs[0].ip",
        "\"10.0.0\" is not an IP address",
    );
    expect(
        fault(|pod| pod["status"]["podIPs"] = json!([{"ip": "10.0.0.1"}, {"ip": "10.0.0.2"}])),
        "status.podIPs[1].ip",
        "10.0.0.2 is a second address of the family of 10.0.0.1",
    );
    expect(
        fault(|pod| pod["metadata"]["annotations"]["undermesh.io/mode"] = "off".into()),
        "metadata.annotations[undermesh.io/mode]",
        "\"off\" is not a mode: Strict or Permissive",
    );
    expect(
        fault(|pod| pod["metadata"]["labels"]["undermesh.io/mesh"] = "yes".into()),
        "metadata.labels[undermesh.io/mesh]",
        "\"yes\" is neither \"enabled\" nor \"disabled\"",
    );
    expect(
        fault(|pod| pod["metadata"]["annotations"]["undermesh.io/netns"] = "web".into()),
        "metadata.annotations[undermesh.io/netns]",
        "\"web\" is not an absolute path",
    );
    expect(
        fault(|pod| pod["metadata"]["annotations"]["undermesh.io/opaque-ports"] = "25,db".into()),
        "metadata.annotations[undermesh.io/opaque-ports]",
        "\"db\" is not a port or a range: 1 to 65535, or two of them like \"9000-9100\"",
    );
    expect(
        fault(|pod| pod["spec"]["serviceAccountName"] = "a/b".into()),
        "spec.serviceAccountName",
        "\"a/b\" is not a Kubernetes name",
    );
    expect(
        fault(|pod| {
            pod["spec"]["containers"] = json!([{"name": "a", "ports": [{"containerPort": 0}]}]);
        }),
        "spec.containers[0].ports[0].containerPort",
        "0 is not a port: 1 to 65535",
    );
}
