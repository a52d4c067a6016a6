//! From Kubernetes objects to the model. Pure: no clock, no I/O, and no other object than the one
//! at hand; what needs several of them is put together in [`super::Cluster`].
//!
//! Each kind becomes its *facts*: what the mesh needs to know of it, checked field by field.

mod backend_traffic_policy;
mod config;
mod endpoints;
mod grpc_route;
mod http_route;
mod membership;
mod node;
mod pod;
mod probes;
mod reference_grant;
mod route;
mod route_cors;
mod route_filter;
mod route_match;
mod route_requests;
mod route_session;
mod service;
mod tcp_route;
mod tls_route;
mod traffic_policy;

pub use backend_traffic_policy::BACKEND_TRAFFIC_POLICY_API_VERSION;
pub use config::{MESH_CONFIG_API_VERSION, MeshConfigManifest, MeshConfigSpec};
pub use endpoints::{EndpointFacts, SliceFacts, TargetRef, derive_endpoints, slice_endpoints};
pub use membership::{MESH_LABEL, MODE_ANNOTATION, NamespaceFacts};
pub use node::node;
pub use pod::{CGROUP_ANNOTATION, NETNS_ANNOTATION, PodContext, PodFacts, PodState};
pub use reference_grant::GrantFacts;
pub use route::{
    BackendFacts, BackendRef, GATEWAY_GROUP, ParentFacts, Referent, RouteFacts, RouteRules,
    RuleFacts, StreamRuleFacts, route_parents,
};
pub use route_filter::FilterFacts;
pub use service::{PortFacts, ServiceFacts, TargetPort, Unready};
pub use traffic_policy::{
    PolicyFacts, PolicyTarget, TRAFFIC_POLICY_API_VERSION, TrafficPolicyManifest,
};

use std::net::IpAddr;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::object::Fault;
use crate::mesh::{NAME_MAX, PortSet, PortSetError, is_kubernetes_name};
use membership::annotation;

/// A name that can stand in an identity, a path and a log line.
pub(super) fn check_name(field: &str, name: &str) -> Result<(), Fault> {
    if is_kubernetes_name(name) {
        return Ok(());
    }
    Err(Fault::new(
        field,
        format!("{name:?} is not a name: 1 to {NAME_MAX} of a-z, 0-9, '-', '.'"),
    ))
}

/// A port number of 1 to 65535.
pub(super) fn check_port(field: impl Into<String>, number: i32) -> Result<u16, Fault> {
    u16::try_from(number)
        .ok()
        .filter(|&port| port != 0)
        .ok_or_else(|| Fault::new(field, format!("{number} is not a port: 1 to 65535")))
}

/// Annotation of a Pod or a Service: its ports whose connections are not looked into, as Linkerd's
/// `config.linkerd.io/opaque-ports` lists them.
pub const OPAQUE_PORTS_ANNOTATION: &str = "undermesh.io/opaque-ports";

/// The ports that [`OPAQUE_PORTS_ANNOTATION`] lists.
pub(super) fn opaque_ports(metadata: &ObjectMeta) -> Result<PortSet, Fault> {
    let listed = annotation(metadata, OPAQUE_PORTS_ANNOTATION).map(str::parse);
    listed
        .transpose()
        .map(Option::unwrap_or_default)
        .map_err(|error: PortSetError| {
            Fault::new(
                format!("metadata.annotations[{OPAQUE_PORTS_ANNOTATION}]"),
                error.to_string(),
            )
        })
}

/// An address that a pod or a Service can have.
pub(super) fn check_address(field: impl Into<String>, text: &str) -> Result<IpAddr, Fault> {
    let field = field.into();
    let Ok(address) = text.parse::<IpAddr>() else {
        return Err(Fault::new(field, format!("{text:?} is not an IP address")));
    };
    if address.is_unspecified() || address.is_loopback() || address.is_multicast() {
        return Err(Fault::new(
            field,
            format!("{address} is no address of a pod or a Service"),
        ));
    }
    if address.to_canonical() != address {
        return Err(Fault::new(
            field,
            format!(
                "{address} is IPv4 in IPv6: write {}",
                address.to_canonical()
            ),
        ));
    }
    Ok(address)
}

/// Whether a port with this `protocol` is TCP: the API's default is.
pub(super) fn is_tcp(protocol: Option<&str>) -> bool {
    protocol.is_none_or(|protocol| protocol == "TCP")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_outside_of_1_to_65535_is_refused_with_its_field() {
        assert_eq!(check_port("x", 1), Ok(1));
        assert_eq!(check_port("x", 65535), Ok(65535));
        for number in [0, -1, 65536] {
            let fault = check_port("spec.ports[0].port", number).unwrap_err();
            assert_eq!(fault.field, "spec.ports[0].port");
            assert_eq!(fault.reason, format!("{number} is not a port: 1 to 65535"));
        }
    }

    #[test]
    fn an_address_that_nobody_can_have_is_refused() {
        assert!(check_address("x", "10.0.0.1").is_ok());
        assert!(check_address("x", "fd00::1").is_ok());
        for text in [
            "",
            "10.0.0",
            "10.0.0.1/8",
            "127.0.0.1",
            "::1",
            "0.0.0.0",
            "224.0.0.1",
        ] {
            assert!(check_address("x", text).is_err(), "{text:?} passed");
        }
        let mapped = check_address("x", "::ffff:10.0.0.1").unwrap_err();
        assert_eq!(
            mapped.reason,
            "::ffff:10.0.0.1 is IPv4 in IPv6: write 10.0.0.1"
        );
    }

    #[test]
    fn a_name_that_could_forge_a_path_or_a_log_line_is_refused() {
        assert!(check_name("x", "web-1.front").is_ok());
        for name in ["", "Web", "web/1", "web\n", "-web", "web.", "we b"] {
            assert!(
                check_name("metadata.name", name).is_err(),
                "{name:?} passed"
            );
        }
        assert!(check_name("x", &"a".repeat(254)).is_err());
    }
}
