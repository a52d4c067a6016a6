//! From Services and pods to EndpointSlices, and from those to what kube-proxy translates.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use serde_json::{Value, json};

use super::plan::Plan;
use crate::kube_proxy::{Backend, Protocol};
use crate::manifests::{file_name, items, kind, name, namespace, text};

const SERVICE_NAME: &str = "kubernetes.io/service-name";

impl Plan {
    /// Every object, by the name of its file: what was given, and EndpointSlices for the Services that have a
    /// selector and none of their own.
    pub fn documents(&self) -> BTreeMap<String, Value> {
        let mut all = self.objects.clone();
        for slice in self.endpoint_slices() {
            all.insert(file_name(&slice), slice);
        }
        all
    }

    fn endpoint_slices(&self) -> Vec<Value> {
        let own: BTreeSet<(&str, &str)> = self
            .objects
            .values()
            .filter(|object| kind(object) == "EndpointSlice")
            .map(|slice| (namespace(slice), service_of(slice)))
            .collect();
        let services = self.objects.values().filter(|object| {
            kind(object) == "Service" && !own.contains(&(namespace(object), name(object)))
        });
        services
            .flat_map(|service| self.slices_of(service))
            .collect()
    }

    fn slices_of(&self, service: &Value) -> Vec<Value> {
        let Some(selector) = service.pointer("/spec/selector").and_then(Value::as_object) else {
            return Vec::new();
        };
        let selected: Vec<&Value> = self
            .objects
            .values()
            .filter(|pod| kind(pod) == "Pod" && namespace(pod) == namespace(service))
            .filter(|pod| {
                let labels = pod.pointer("/metadata/labels");
                let has = |(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value);
                selector.iter().all(has)
            })
            .collect();
        let slice = |family: &str, fits: fn(&IpAddr) -> bool| {
            // Pods may give different numbers to a named port: then each has a slice of its own.
            let mut by_ports: BTreeMap<String, (Vec<Value>, Vec<Value>)> = BTreeMap::new();
            for pod in &selected {
                let Some(ip) = addresses(pod).into_iter().find(fits) else {
                    continue;
                };
                let ports = target_ports(service, pod);
                let group = by_ports
                    .entry(Value::from(ports.clone()).to_string())
                    .or_insert_with(|| (ports, Vec::new()));
                group.1.push(json!({
                    "addresses": [ip],
                    "conditions": conditions(pod),
                    "nodeName": text(pod, "/spec/nodeName"),
                    "targetRef": {
                        "kind": "Pod",
                        "namespace": namespace(pod),
                        "name": name(pod),
                        "uid": text(pod, "/metadata/uid"),
                    },
                }));
            }
            let groups = by_ports.into_values().enumerate();
            groups
                .map(|(index, (ports, endpoints))| {
                    json!({
                        "apiVersion": "discovery.k8s.io/v1",
                        "kind": "EndpointSlice",
                        "metadata": {
                            "name": format!("{}-{}-{index}", name(service), family.to_lowercase()),
                            "namespace": namespace(service),
                            "labels": {SERVICE_NAME: name(service)},
                        },
                        "addressType": family,
                        "ports": ports,
                        "endpoints": endpoints,
                    })
                })
                .collect::<Vec<_>>()
        };
        let mut slices = slice("IPv4", IpAddr::is_ipv4);
        slices.extend(slice("IPv6", IpAddr::is_ipv6));
        slices
    }

    /// What kube-proxy translates.
    pub fn backends(&self) -> Vec<Backend> {
        let documents = self.documents();
        let all = |wanted: &'static str| {
            let of_kind = move |object: &&Value| kind(object) == wanted;
            documents.values().filter(of_kind)
        };
        let mut backends = Vec::new();
        for service in all("Service") {
            let slices: Vec<&Value> = all("EndpointSlice")
                .filter(|slice| {
                    namespace(slice) == namespace(service) && service_of(slice) == name(service)
                })
                .collect();
            for port in items(service, "/spec/ports") {
                let Some(number) = number(&port["port"]) else {
                    continue;
                };
                let protocol = match text(port, "/protocol") {
                    "UDP" => Protocol::Udp,
                    _ => Protocol::Tcp,
                };
                for vip in vips(service) {
                    let with = |wanted: fn(&Value) -> bool| -> Vec<SocketAddr> {
                        let slices = slices.iter();
                        slices
                            .flat_map(|slice| endpoints(slice, text(port, "/name"), wanted))
                            .filter(|endpoint| endpoint.is_ipv4() == vip.is_ipv4())
                            .collect()
                    };
                    let mut endpoints = with(counts_as_ready);
                    if endpoints.is_empty() {
                        endpoints = with(is_leaving);
                    }
                    backends.push(Backend {
                        vip,
                        protocol,
                        port: number,
                        endpoints,
                    });
                }
            }
        }
        backends
    }
}

pub(super) fn number(value: &Value) -> Option<u16> {
    value.as_u64().and_then(|number| u16::try_from(number).ok())
}

fn service_of(slice: &Value) -> &str {
    text(slice, "/metadata/labels/kubernetes.io~1service-name")
}

fn addresses(pod: &Value) -> Vec<IpAddr> {
    let listed = items(pod, "/status/podIPs").iter();
    listed
        .filter_map(|entry| text(entry, "/ip").parse().ok())
        .collect()
}

pub(super) fn vips(service: &Value) -> Vec<IpAddr> {
    let parse = |value: &Value| value.as_str().and_then(|text| text.parse().ok());
    let listed: Vec<IpAddr> = items(service, "/spec/clusterIPs")
        .iter()
        .filter_map(parse)
        .collect();
    let mut vips = if listed.is_empty() {
        service
            .pointer("/spec/clusterIP")
            .and_then(parse)
            .into_iter()
            .collect()
    } else {
        listed
    };
    vips.extend(items(service, "/spec/externalIPs").iter().filter_map(parse));
    vips
}

/// As the controller writes them: what terminates is not ready, and serves for as long as its pod is ready.
fn conditions(pod: &Value) -> Value {
    let is_serving = is_ready(pod);
    let is_terminating = pod.pointer("/metadata/deletionTimestamp").is_some();
    json!({
        "ready": is_serving && !is_terminating,
        "serving": is_serving,
        "terminating": is_terminating,
    })
}

fn is_ready(pod: &Value) -> bool {
    let conditions = items(pod, "/status/conditions");
    let ready = conditions
        .iter()
        .find(|condition| text(condition, "/type") == "Ready");
    ready.is_none_or(|condition| text(condition, "/status") == "True")
}

/// A slice's ports for one pod: numbers stay, names are looked up among its containers' ports.
fn target_ports(service: &Value, pod: &Value) -> Vec<Value> {
    let containers = items(pod, "/spec/containers").iter();
    let named: Vec<&Value> = containers
        .flat_map(|container| items(container, "/ports"))
        .collect();
    let ports = items(service, "/spec/ports").iter();
    ports
        .filter_map(|port| {
            let target = match &port["targetPort"] {
                Value::Null => number(&port["port"]),
                Value::String(title) => named
                    .iter()
                    .find(|candidate| text(candidate, "/name") == title)
                    .and_then(|found| number(&found["containerPort"])),
                other => number(other),
            }?;
            let mut entry = json!({"name": text(port, "/name"), "port": target, "protocol": "TCP"});
            for key in ["protocol", "appProtocol"] {
                if let Some(value) = port.get(key) {
                    entry[key] = value.clone();
                }
            }
            Some(entry)
        })
        .collect()
}

fn counts_as_ready(endpoint: &Value) -> bool {
    endpoint.pointer("/conditions/ready") != Some(&false.into())
}

/// What kube-proxy falls back to where nothing is ready.
fn is_leaving(endpoint: &Value) -> bool {
    let is = |condition: &str| endpoint.pointer(condition) == Some(&true.into());
    is("/conditions/serving") && is("/conditions/terminating")
}

/// Addresses of a slice for a Service's port of that name, of those endpoints that are `wanted`.
fn endpoints(slice: &Value, port: &str, wanted: fn(&Value) -> bool) -> Vec<SocketAddr> {
    let ports = items(slice, "/ports").iter();
    let Some(number) = ports
        .filter(|entry| text(entry, "/name") == port)
        .find_map(|entry| number(&entry["port"]))
    else {
        return Vec::new();
    };
    items(slice, "/endpoints")
        .iter()
        .filter(|endpoint| wanted(endpoint))
        .flat_map(|endpoint| items(endpoint, "/addresses"))
        .filter_map(|address| address.as_str()?.parse().ok())
        .map(|ip: IpAddr| SocketAddr::new(ip, number))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::plan::tests::{WEB, plan};

    #[test]
    fn a_service_leads_to_its_ready_pods_by_named_port() {
        let backends = plan(WEB).backends();
        let v4 = backends
            .iter()
            .find(|backend| backend.vip.is_ipv4())
            .unwrap();
        let mut endpoints: Vec<String> = v4.endpoints.iter().map(ToString::to_string).collect();
        endpoints.sort();
        assert_eq!(endpoints, ["10.241.0.2:8080", "10.242.0.2:9090"]);
        assert_eq!(backends.len(), 2);
    }

    #[test]
    fn pods_that_terminate_are_left_to_who_finds_no_other() {
        let mut plan = plan(WEB);
        let v4 = |plan: &super::Plan| {
            let backends = plan.backends();
            let v4 = backends.into_iter().find(|backend| backend.vip.is_ipv4());
            v4.unwrap().endpoints
        };
        let names: Vec<(String, String)> = plan
            .pods
            .iter()
            .map(|pod| (pod.namespace.clone(), pod.name.clone()))
            .collect();
        let all = v4(&plan);
        assert_eq!(all.len(), 2);
        let (space, title) = &names[0];
        plan.set_terminating(space, title).unwrap();
        assert_eq!(v4(&plan).len(), 1);
        for (space, title) in &names {
            plan.set_terminating(space, title).unwrap();
        }
        assert_eq!(v4(&plan), all);
        plan.set_ready(space, title, false).unwrap();
        assert_eq!(v4(&plan).len(), 1);
    }
}
