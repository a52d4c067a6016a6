//! Nodes.

use k8s_openapi::api::core::v1::Node;

use super::super::object::Fault;
use super::check_address;
use crate::mesh;

/// What the mesh needs to know of a node.
pub fn node(node: &Node) -> Result<mesh::Node, Fault> {
    let label = |name: &str| {
        let labels = node.metadata.labels.as_ref()?;
        labels.get(name).map(|value| value.as_str().into())
    };
    let given = node
        .status
        .iter()
        .flat_map(|status| status.addresses.iter().flatten());
    let mut addresses = Vec::new();
    for (index, address) in given.enumerate() {
        if address.type_ == "InternalIP" {
            let field = format!("status.addresses[{index}].address");
            addresses.push(check_address(field, &address.address)?);
        }
    }
    Ok(mesh::Node {
        name: node.metadata.name.as_deref().unwrap_or_default().into(),
        addresses,
        region: label("topology.kubernetes.io/region"),
        zone: label("topology.kubernetes.io/zone"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_known_by_its_internal_addresses_and_its_zone() {
        let manifest: Node = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "node-a", "labels": {
                "topology.kubernetes.io/region": "eu", "topology.kubernetes.io/zone": "eu-1"}},
            "status": {"addresses": [
                {"type": "Hostname", "address": "node-a"},
                {"type": "InternalIP", "address": "192.0.2.1"},
                {"type": "ExternalIP", "address": "198.51.100.1"}]}
        }))
        .unwrap();
        let expected = mesh::Node {
            name: "node-a".into(),
            addresses: vec!["192.0.2.1".parse().unwrap()],
            region: Some("eu".into()),
            zone: Some("eu-1".into()),
        };
        assert_eq!(node(&manifest), Ok(expected));
    }

    #[test]
    fn a_bad_address_of_a_node_is_refused_with_its_field() {
        let manifest: Node = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "node-a"},
            "status": {"addresses": [{"type": "InternalIP", "address": "node-a"}]}
        }))
        .unwrap();
        let fault = node(&manifest).unwrap_err();
        assert_eq!(fault.field, "status.addresses[0].address");
        assert_eq!(fault.reason, "\"node-a\" is not an IP address");
    }
}
