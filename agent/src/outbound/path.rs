//! How a connection travels to an endpoint.

use crate::mesh::{MeshConfig, Mode, SpiffeId, Workload};

/// The way to one endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Path {
    /// Both pods are this agent's: authorized here, dialled from the client's netns, and the
    /// destination's kernel program admits exactly that connection.
    SameNode,
    /// HBONE to the agent of the other node, which must present this identity.
    Tunnel(SpiffeId),
    /// As it is, to an endpoint without mesh identity.
    Plaintext,
}

/// Why there is no way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoPath {
    /// The client is STRICT and the endpoint has no mesh identity.
    PlaintextRefused,
    /// The endpoint's pod is of this node and not enrolled yet, and one of both is STRICT.
    NotEnrolled,
}

/// Decides from the model and from what is enrolled here, never from what an address answers: a
/// peer that the model calls meshed is not downgraded to plaintext, whoever refuses its port.
pub(super) fn path(
    client: &Workload,
    destination: Option<&Workload>,
    enrolled_here: bool,
    config: &MeshConfig,
) -> Result<Path, NoPath> {
    let strict = client.mode() == Some(Mode::Strict);
    let Some((destination, mode)) = destination.and_then(|pod| Some((pod, pod.mode()?))) else {
        return if strict {
            Err(NoPath::PlaintextRefused)
        } else {
            Ok(Path::Plaintext)
        };
    };
    if destination.uid == client.uid {
        return Ok(Path::SameNode);
    }
    if enrolled_here {
        return Ok(if config.encrypt_same_node {
            Path::Tunnel(destination.identity.clone())
        } else {
            Path::SameNode
        });
    }
    if destination.node != client.node {
        return Ok(Path::Tunnel(destination.identity.clone()));
    }
    if strict || mode == Mode::Strict {
        Err(NoPath::NotEnrolled)
    } else {
        Ok(Path::Plaintext)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::mesh::{Membership, ObjectName, TrustDomain, WorkloadUid};

    fn pod(name: &str, node: &str, membership: Membership) -> Workload {
        Workload {
            uid: WorkloadUid(name.into()),
            name: ObjectName::new("default", name),
            workload: name.into(),
            version: None,
            node: node.into(),
            identity: SpiffeId::new(TrustDomain::default(), "default", name).unwrap(),
            addresses: Vec::new(),
            labels: Default::default(),
            named_ports: BTreeMap::new(),
            probe_ports: Default::default(),
            opaque_ports: Default::default(),
            membership,
            readiness: crate::mesh::Readiness::Ready,
            sandbox: None,
        }
    }

    const STRICT: Membership = Membership::Meshed(Mode::Strict);
    const PERMISSIVE: Membership = Membership::Meshed(Mode::Permissive);

    #[test]
    fn another_node_is_reached_through_a_tunnel_to_the_identity_of_its_pod() {
        let server = pod("server", "b", PERMISSIVE);
        let way = path(
            &pod("client", "a", STRICT),
            Some(&server),
            false,
            &MeshConfig::default(),
        );
        assert_eq!(way, Ok(Path::Tunnel(server.identity)));
    }

    #[test]
    fn the_same_node_needs_no_tunnel_unless_the_mesh_encrypts_there_too() {
        let (client, server) = (pod("client", "a", STRICT), pod("server", "a", STRICT));
        let mut config = MeshConfig::default();
        assert_eq!(
            path(&client, Some(&server), true, &config),
            Ok(Path::SameNode)
        );
        config.encrypt_same_node = true;
        let tunnel = Ok(Path::Tunnel(server.identity.clone()));
        assert_eq!(path(&client, Some(&server), true, &config), tunnel);
    }

    #[test]
    fn a_pod_reaches_itself_without_a_tunnel() {
        let client = pod("client", "a", STRICT);
        let config = MeshConfig {
            encrypt_same_node: true,
            ..MeshConfig::default()
        };
        assert_eq!(
            path(&client, Some(&client), true, &config),
            Ok(Path::SameNode)
        );
    }

    #[test]
    fn a_strict_client_sends_no_plaintext() {
        let client = pod("client", "a", STRICT);
        let config = MeshConfig::default();
        let outside = pod("server", "b", Membership::Outside);
        let refused = pod("server", "b", Membership::Refused("host network".into()));
        for server in [Some(&outside), Some(&refused), None] {
            assert_eq!(
                path(&client, server, false, &config),
                Err(NoPath::PlaintextRefused)
            );
        }
    }

    #[test]
    fn a_permissive_client_reaches_what_is_outside_the_mesh() {
        let client = pod("client", "a", PERMISSIVE);
        let server = pod("server", "b", Membership::Outside);
        let way = path(&client, Some(&server), false, &MeshConfig::default());
        assert_eq!(way, Ok(Path::Plaintext));
    }

    #[test]
    fn a_pod_of_this_node_that_is_not_enrolled_yet_gets_plaintext_only_if_both_are_permissive() {
        let config = MeshConfig::default();
        let server = pod("server", "a", PERMISSIVE);
        let way = |client, server| path(&pod("client", "a", client), Some(server), false, &config);
        assert_eq!(way(PERMISSIVE, &server), Ok(Path::Plaintext));
        assert_eq!(way(STRICT, &server), Err(NoPath::NotEnrolled));
        assert_eq!(
            way(PERMISSIVE, &pod("server", "a", STRICT)),
            Err(NoPath::NotEnrolled)
        );
    }
}
