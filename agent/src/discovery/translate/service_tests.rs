use serde_json::{Value, json};

use super::*;

fn facts(spec: Value, status: Value) -> Result<Option<ServiceFacts>, Fault> {
    let manifest = json!({
        "metadata": {"name": "web", "namespace": "shop"}, "spec": spec, "status": status});
    ServiceFacts::of(&serde_json::from_value(manifest).unwrap())
}

fn good(spec: Value) -> ServiceFacts {
    facts(spec, json!({})).unwrap().unwrap()
}

#[test]
fn a_service_has_cluster_external_and_load_balancer_addresses_once_each() {
    let spec = json!({
        "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00:96::1"],
        "externalIPs": ["198.51.100.1", "10.96.0.1"]});
    let status = json!({"loadBalancer": {"ingress": [
        {"ip": "198.51.100.2"}, {"ip": "198.51.100.3", "ipMode": "Proxy"}, {"hostname": "x"}]}});
    let facts = facts(spec, status).unwrap().unwrap();
    let vips: Vec<_> = facts
        .vips
        .iter()
        .map(|(vip, field)| (vip.to_string(), field.as_str()))
        .collect();
    let expected = [
        ("10.96.0.1".to_owned(), "spec.clusterIPs[0]"),
        ("fd00:96::1".to_owned(), "spec.clusterIPs[1]"),
        ("198.51.100.1".to_owned(), "spec.externalIPs[0]"),
        (
            "198.51.100.2".to_owned(),
            "status.loadBalancer.ingress[0].ip",
        ),
    ];
    assert_eq!(vips, expected);
}

#[test]
fn a_headless_service_has_no_address_and_serves_every_family() {
    let facts = good(json!({"clusterIP": "None", "ports": [{"port": 80}]}));
    assert!(facts.vips.is_empty());
    assert!(facts.serves("fd00::1".parse().unwrap()) && facts.serves("10.0.0.1".parse().unwrap()));
    let facts = good(json!({"clusterIP": "10.96.0.1"}));
    assert!(!facts.serves("fd00::1".parse().unwrap()));
}

#[test]
fn only_tcp_ports_count_and_targets_are_numbers_or_names() {
    let facts = good(json!({"ports": [
        {"name": "http", "port": 80, "targetPort": 8080, "appProtocol": "http"},
        {"name": "dns", "port": 53, "protocol": "UDP"},
        {"name": "admin", "port": 81, "targetPort": "admin"},
        {"name": "same", "port": 82}]}));
    let ports: Vec<_> = facts
        .ports
        .iter()
        .map(|port| (&*port.name, port.port, port.target.clone()))
        .collect();
    let expected = [
        ("http", 80, TargetPort::Number(8080)),
        ("admin", 81, TargetPort::Name("admin".to_owned())),
        ("same", 82, TargetPort::Number(82)),
    ];
    assert_eq!(ports, expected);
    assert_eq!(facts.ports[0].app_protocol.as_deref(), Some("http"));
}

#[test]
fn opaque_ports_are_those_of_the_service_not_of_its_pods() {
    let annotated = |ports: &str| {
        let manifest = json!({
            "metadata": {"name": "web", "namespace": "shop",
                "annotations": {"undermesh.io/opaque-ports": ports}},
            "spec": {"ports": [
                {"name": "mysql", "port": 3306, "targetPort": 9999},
                {"name": "web", "port": 80, "targetPort": 3306}]}});
        ServiceFacts::of(&serde_json::from_value(manifest).unwrap())
    };
    let facts = annotated("3300-3310,9999").unwrap().unwrap();
    let opaque: Vec<_> = facts.ports.iter().map(|port| port.opaque).collect();
    assert_eq!(opaque, [true, false]);
    let fault = annotated("3306;80").unwrap_err();
    assert_eq!(
        fault.field,
        "metadata.annotations[undermesh.io/opaque-ports]"
    );
    assert!(
        fault
            .reason
            .starts_with("\"3306;80\" is not a port or a range")
    );
}

#[test]
fn an_external_name_is_of_no_concern() {
    let spec = json!({"type": "ExternalName", "externalName": "example.com"});
    assert_eq!(facts(spec, json!({})), Ok(None));
}

#[test]
fn an_empty_selector_selects_nothing() {
    let labels = BTreeMap::from([("app".to_owned(), "web".to_owned())]);
    assert!(!good(json!({})).selects(&labels));
    assert!(good(json!({"selector": {"app": "web"}})).selects(&labels));
    assert!(!good(json!({"selector": {"app": "web", "x": "y"}})).selects(&labels));
}

#[test]
fn each_fault_names_its_field_and_its_reason() {
    for (spec, field, reason) in [
        (
            json!({"clusterIP": "10.96"}),
            "spec.clusterIP",
            "\"10.96\" is not an IP address",
        ),
        (
            json!({"externalIPs": ["127.0.0.1"]}),
            "spec.externalIPs[0]",
            "127.0.0.1 is no address of a pod or a Service",
        ),
        (
            json!({"ports": [{"port": 70000}]}),
            "spec.ports[0].port",
            "70000 is not a port: 1 to 65535",
        ),
        (
            json!({"ports": [{"port": 80, "targetPort": 0}]}),
            "spec.ports[0].targetPort",
            "0 is not a port: 1 to 65535",
        ),
        (
            json!({"ports": [{"name": "a", "port": 80}, {"port": 81}]}),
            "spec.ports[1].name",
            "is missing: a Service of several ports names each",
        ),
        (
            json!({"ports": [{"name": "a", "port": 80}, {"name": "a", "port": 81}]}),
            "spec.ports[1].name",
            "\"a\" is the name of an earlier port",
        ),
        (
            json!({"ports": [{"name": "a", "port": 80}, {"name": "b", "port": 80}]}),
            "spec.ports[1].port",
            "80 is the number of an earlier port",
        ),
    ] {
        let fault = facts(spec, json!({})).unwrap_err();
        assert_eq!(
            (fault.field.as_str(), fault.reason.as_str()),
            (field, reason)
        );
    }
}
