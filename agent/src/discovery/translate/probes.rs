//! The ports of a pod that the kubelet connects to: probes and lifecycle handlers.

use std::collections::BTreeSet;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, LifecycleHandler, Pod, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::super::object::Fault;
use super::check_port;

/// Where a connection of the kubelet's goes: `httpGet.host` or `tcpSocket.host`, and the port.
type Goal<'a> = (Option<&'a str>, &'a IntOrString);

/// Ports of `livenessProbe`, `readinessProbe` and `startupProbe` (`httpGet`, `tcpSocket`, `grpc`)
/// and of `lifecycle` handlers, of all containers. Those that name a host go there and not to the
/// pod, unless it is the pod's own address. A port's name that no port of the container bears is no
/// port: the kubelet cannot probe it either.
pub(super) fn probe_ports(pod: &Pod, addresses: &[IpAddr]) -> Result<BTreeSet<u16>, Fault> {
    let mut ports = BTreeSet::new();
    let Some(spec) = &pod.spec else {
        return Ok(ports);
    };
    let inits = spec.init_containers.iter().flatten().enumerate();
    let containers = spec.containers.iter().enumerate();
    let all = containers
        .map(|(at, container)| (format!("spec.containers[{at}]"), container))
        .chain(inits.map(|(at, container)| (format!("spec.initContainers[{at}]"), container)));
    for (place, container) in all {
        let own = |(host, _): &Goal<'_>| leads_to_pod(*host, addresses);
        for (field, goal) in goals(container).filter(|(_, goal)| own(goal)) {
            ports.extend(resolve(format!("{place}.{field}.port"), goal.1, container)?);
        }
        for (field, number) in grpc_ports(container) {
            ports.insert(check_port(format!("{place}.{field}.grpc.port"), number)?);
        }
    }
    Ok(ports)
}

fn probes(container: &Container) -> impl Iterator<Item = (&'static str, &Probe)> {
    [
        ("livenessProbe", container.liveness_probe.as_ref()),
        ("readinessProbe", container.readiness_probe.as_ref()),
        ("startupProbe", container.startup_probe.as_ref()),
    ]
    .into_iter()
    .filter_map(|(field, probe)| Some((field, probe?)))
}

fn handlers(container: &Container) -> impl Iterator<Item = (&'static str, &LifecycleHandler)> {
    let lifecycle = container.lifecycle.as_ref();
    [
        (
            "lifecycle.postStart",
            lifecycle.and_then(|lifecycle| lifecycle.post_start.as_ref()),
        ),
        (
            "lifecycle.preStop",
            lifecycle.and_then(|lifecycle| lifecycle.pre_stop.as_ref()),
        ),
    ]
    .into_iter()
    .filter_map(|(field, handler)| Some((field, handler?)))
}

fn goals(container: &Container) -> impl Iterator<Item = (String, Goal<'_>)> {
    let probes = probes(container)
        .map(|(field, probe)| (field, probe.http_get.as_ref(), probe.tcp_socket.as_ref()));
    let handlers = handlers(container).map(|(field, handler)| {
        (
            field,
            handler.http_get.as_ref(),
            handler.tcp_socket.as_ref(),
        )
    });
    probes.chain(handlers).flat_map(|(field, http, tcp)| {
        let http = http.map(|http| {
            let goal = (http.host.as_deref(), &http.port);
            (format!("{field}.httpGet"), goal)
        });
        let tcp = tcp.map(|tcp| {
            let goal = (tcp.host.as_deref(), &tcp.port);
            (format!("{field}.tcpSocket"), goal)
        });
        http.into_iter().chain(tcp)
    })
}

fn grpc_ports(container: &Container) -> impl Iterator<Item = (&'static str, i32)> {
    probes(container).filter_map(|(field, probe)| Some((field, probe.grpc.as_ref()?.port)))
}

fn leads_to_pod(host: Option<&str>, addresses: &[IpAddr]) -> bool {
    match host.filter(|host| !host.is_empty()) {
        None => true,
        Some(host) => host
            .parse()
            .is_ok_and(|host: IpAddr| addresses.contains(&host.to_canonical())),
    }
}

/// As the kubelet does: a number, a name of one of the container's own ports whatever its protocol,
/// or a number written as text.
fn resolve(field: String, port: &IntOrString, container: &Container) -> Result<Option<u16>, Fault> {
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => {
            let mut ports = container.ports.iter().flatten();
            let named = ports.find(|port| port.name.as_deref() == Some(name));
            named
                .map(|port| port.container_port)
                .or_else(|| name.parse().ok())
        }
    };
    number.map(|number| check_port(field, number)).transpose()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn ports(spec: Value) -> Result<Vec<u16>, Fault> {
        let pod = serde_json::from_value(json!({ "spec": spec })).unwrap();
        let ports = probe_ports(&pod, &["10.0.0.1".parse().unwrap()])?;
        Ok(ports.into_iter().collect())
    }

    fn container(fields: Value) -> Result<Vec<u16>, Fault> {
        let mut container = json!({"name": "app", "ports": [
            {"name": "http", "containerPort": 8080},
            {"name": "health", "containerPort": 9000, "protocol": "UDP"},
        ]});
        for (name, value) in fields.as_object().unwrap() {
            container[name] = value.clone();
        }
        ports(json!({ "containers": [container] }))
    }

    #[test]
    fn probes_and_lifecycle_handlers_of_every_kind_count_and_commands_do_not() {
        let found = container(json!({
            "livenessProbe": {"httpGet": {"port": 8081}},
            "readinessProbe": {"tcpSocket": {"port": "http"}},
            "startupProbe": {"grpc": {"port": 8083}},
            "lifecycle": {
                "postStart": {"httpGet": {"port": "health"}},
                "preStop": {"tcpSocket": {"port": "8085"}},
            },
        }));
        assert_eq!(found.unwrap(), [8080, 8081, 8083, 8085, 9000]);
        let commands = container(json!({
            "livenessProbe": {"exec": {"command": ["true"]}},
            "lifecycle": {"preStop": {"sleep": {"seconds": 1}}},
        }));
        assert!(commands.unwrap().is_empty());
    }

    #[test]
    fn a_name_is_that_of_the_containers_own_port() {
        let found = ports(json!({
            "containers": [
                {"name": "app", "ports": [{"name": "http", "containerPort": 8080}]},
                {"name": "other", "livenessProbe": {"httpGet": {"port": "http"}}},
            ],
            "initContainers": [{"name": "sidecar", "restartPolicy": "Always",
                "ports": [{"name": "http", "containerPort": 15}],
                "startupProbe": {"httpGet": {"port": "http"}}}],
        }));
        assert_eq!(found.unwrap(), [15]);
    }

    #[test]
    fn a_probe_of_another_host_is_no_probe_of_the_pod() {
        let to = |host: &str| {
            container(json!({
                "livenessProbe": {"httpGet": {"port": 1, "host": host}},
                "readinessProbe": {"tcpSocket": {"port": 2, "host": host}},
            }))
            .unwrap()
        };
        assert!(to("127.0.0.1").is_empty());
        assert!(to("example.com").is_empty());
        assert_eq!(to("10.0.0.1"), [1, 2]);
        assert_eq!(to(""), [1, 2]);
    }

    #[test]
    fn a_number_that_is_no_port_is_refused_with_its_place() {
        let fault = container(json!({"livenessProbe": {"httpGet": {"port": 70000}}})).unwrap_err();
        assert_eq!(fault.field, "spec.containers[0].livenessProbe.httpGet.port");
        let fault = container(json!({"startupProbe": {"grpc": {"port": 0}}})).unwrap_err();
        assert_eq!(fault.field, "spec.containers[0].startupProbe.grpc.port");
    }
}
