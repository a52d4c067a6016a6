use serde_json::{Value, json};

use super::*;
use crate::discovery::translate::{PodContext, PodFacts, ServiceFacts};
use crate::mesh::MeshConfig;

fn slice(change: impl FnOnce(&mut Value)) -> Result<Option<SliceFacts>, Fault> {
    let mut manifest = json!({
        "metadata": {"name": "web-x", "namespace": "shop",
            "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}],
        "endpoints": [{"addresses": ["10.0.0.1"], "conditions": {"ready": true},
            "targetRef": {"kind": "Pod", "name": "web-1", "uid": "u-1"}}]});
    change(&mut manifest);
    SliceFacts::of(&serde_json::from_value(manifest).unwrap())
}

fn good(change: impl FnOnce(&mut Value)) -> SliceFacts {
    slice(change).unwrap().unwrap()
}

fn service(spec: Value) -> ServiceFacts {
    let manifest = json!({"metadata": {"name": "web", "namespace": "shop"}, "spec": spec});
    let service = serde_json::from_value(manifest).unwrap();
    ServiceFacts::of(&service).unwrap().unwrap()
}

fn http() -> ServiceFacts {
    service(json!({"clusterIP": "10.96.0.1",
        "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}))
}

fn pod(name: &str, uid: Value, ips: Value, ready: &str) -> Arc<Workload> {
    let pod = json!({
        "metadata": {"name": name, "namespace": "shop", "uid": uid},
        "spec": {"containers": [{"name": "a", "ports": [{"name": "http", "containerPort": 8080}]}]},
        "status": {"podIPs": ips, "conditions": [{"type": "Ready", "status": ready}]}});
    let context = PodContext {
        namespace: None,
        config: &MeshConfig::default(),
        node: "node-a",
    };
    let facts = PodFacts::of(&serde_json::from_value(pod).unwrap()).unwrap();
    Arc::new(facts.workload(context).unwrap())
}

fn of_slices(slices: &[SliceFacts], pod: Option<&Arc<Workload>>) -> Vec<(String, bool, bool)> {
    slice_endpoints(&http().ports[0], slices.iter(), |address| {
        pod.filter(|pod| pod.addresses.contains(&address))
    })
    .into_iter()
    .map(|one| {
        (
            one.address.to_string(),
            one.readiness == Readiness::Ready,
            one.workload.is_some(),
        )
    })
    .collect()
}

#[test]
fn an_endpoint_is_the_pod_that_has_its_address() {
    let pod = pod("web-1", "u-1".into(), json!([{"ip": "10.0.0.1"}]), "True");
    let known = [("10.0.0.1:8080".to_owned(), true, true)];
    assert_eq!(of_slices(&[good(|_| ())], Some(&pod)), known);
    let unknown = [("10.0.0.1:8080".to_owned(), true, false)];
    assert_eq!(of_slices(&[good(|_| ())], None), unknown);
    let no_target = good(|slice| slice["endpoints"][0]["targetRef"] = Value::Null);
    assert_eq!(of_slices(&[no_target], Some(&pod)), known);
}

#[test]
fn an_address_that_is_another_pods_by_now_is_left_out() {
    let ips = || json!([{"ip": "10.0.0.1"}]);
    let other = pod("web-2", "u-2".into(), ips(), "True");
    assert_eq!(of_slices(&[good(|_| ())], Some(&other)), []);
    let reborn = pod("web-1", "u-3".into(), ips(), "True");
    assert_eq!(of_slices(&[good(|_| ())], Some(&reborn)), []);
    let without_uid = pod("web-1", Value::Null, ips(), "True");
    assert_eq!(of_slices(&[good(|_| ())], Some(&without_uid)).len(), 1);
}

#[test]
fn slices_of_both_families_merge_and_an_address_counts_once() {
    let unready = good(|slice| slice["endpoints"][0]["conditions"]["ready"] = false.into());
    let unset = good(|slice| slice["endpoints"][0]["conditions"] = json!({}));
    let v6 = good(|slice| {
        slice["addressType"] = "IPv6".into();
        slice["endpoints"][0]["addresses"] = json!(["fd00::1"]);
    });
    let other_port = good(|slice| slice["ports"] = json!([{"name": "admin", "port": 1}]));
    assert!(!of_slices(std::slice::from_ref(&unready), None)[0].1);
    let expected = [
        ("10.0.0.1:8080".to_owned(), true, false),
        ("[fd00::1]:8080".to_owned(), true, false),
    ];
    assert_eq!(of_slices(&[unready, unset, v6, other_port], None), expected);
}

#[test]
fn what_terminates_is_leaving_while_it_serves_and_is_unready_after() {
    let readiness = |conditions: Value| {
        let slice = good(|slice| slice["endpoints"][0]["conditions"] = conditions);
        slice.endpoints[0].readiness
    };
    for (ready, serving, terminating, expected) in [
        (json!(true), json!(true), json!(false), Readiness::Ready),
        (json!(false), json!(true), json!(true), Readiness::Leaving),
        (json!(false), json!(false), json!(true), Readiness::Unready),
        (json!(false), json!(false), json!(false), Readiness::Unready),
        // Not ready and not terminating, whatever it serves.
        (json!(false), json!(true), json!(false), Readiness::Unready),
        // `serving` is `ready` where nobody says it.
        (json!(false), Value::Null, json!(true), Readiness::Unready),
        (Value::Null, Value::Null, Value::Null, Readiness::Ready),
        // With `publishNotReadyAddresses`.
        (json!(true), json!(true), json!(true), Readiness::Ready),
    ] {
        let conditions = json!({"ready": ready, "serving": serving, "terminating": terminating});
        let shown = conditions.to_string();
        assert_eq!(readiness(conditions), expected, "{shown}");
    }
    let leaving = json!({"ready": false, "serving": true, "terminating": true});
    let leaving = good(|slice| slice["endpoints"][0]["conditions"] = leaving);
    let of = |slices: &[SliceFacts]| {
        slice_endpoints(&http().ports[0], slices.iter(), |_| None)[0].readiness
    };
    assert_eq!(of(&[leaving.clone(), good(|_| ())]), Readiness::Ready);
    assert_eq!(of(&[leaving]), Readiness::Leaving);
}

#[test]
fn a_slice_without_a_service_or_with_names_is_of_no_concern() {
    let no_service = slice(|slice| slice["metadata"]["labels"] = json!({}));
    assert_eq!(no_service, Ok(None));
    assert_eq!(
        slice(|slice| slice["addressType"] = "FQDN".into()),
        Ok(None)
    );
}

#[test]
fn each_fault_names_its_field_and_its_reason() {
    let fault = |change: fn(&mut Value)| {
        let fault = slice(change).unwrap_err();
        format!("{}: {}", fault.field, fault.reason)
    };
    assert_eq!(
        fault(|slice| slice["addressType"] = "IPX".into()),
        "addressType: \"IPX\" is none of IPv4, IPv6, FQDN"
    );
    assert_eq!(
        fault(|slice| slice["endpoints"][0]["addresses"] = json!(["fd00::1"])),
        "endpoints[0].addresses[0]: fd00::1 is not of the slice's addressType"
    );
    assert_eq!(
        fault(|slice| slice["endpoints"][0]["addresses"] = json!([])),
        "endpoints[0].addresses[0]: is missing"
    );
    assert_eq!(
        fault(|slice| slice["ports"] = json!([{"port": 99999}])),
        "ports[0].port: 99999 is not a port: 1 to 65535"
    );
}

#[test]
fn endpoints_are_derived_from_pods_by_number_or_name_in_the_families_of_the_service() {
    let ips = json!([{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]);
    let pod = pod("web-1", "u-1".into(), ips, "False");
    let derive = |service: &ServiceFacts| -> Vec<(String, bool)> {
        derive_endpoints(service, &service.ports[0], std::iter::once(&pod))
            .into_iter()
            .map(|one| (one.address.to_string(), one.readiness == Readiness::Ready))
            .collect()
    };
    assert_eq!(derive(&http()), [("10.0.0.1:8080".to_owned(), false)]);
    let headless = service(
        json!({"clusterIP": "None", "publishNotReadyAddresses": true,
        "ports": [{"port": 80, "targetPort": 81}]}),
    );
    let expected = [
        ("10.0.0.1:81".to_owned(), true),
        ("[fd00::1]:81".to_owned(), true),
    ];
    assert_eq!(derive(&headless), expected);
    let unnamed = service(json!({"ports": [{"port": 80, "targetPort": "https"}]}));
    assert_eq!(derive(&unnamed), []);
}
