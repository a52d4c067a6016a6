//! Settings of the whole mesh.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::TrustDomain;

/// What happens to traffic that has no mesh identity on one of its sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Mode {
    /// Refused, with a reason in the log.
    Strict,
    /// Passed as plaintext, and labelled so in every metric.
    #[default]
    Permissive,
}

/// Settings of the whole mesh (kind `MeshConfig`, `undermesh.io/v1alpha1`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshConfig {
    /// Trust domain of every identity of this mesh. Default `cluster.local`.
    pub trust_domain: TrustDomain,
    /// Mode of a pod that names none. Default [`Mode::Permissive`].
    pub mode: Mode,
    /// Use mTLS between pods of one node too. Default `false`: both identities are known to the agent.
    pub encrypt_same_node: bool,
    /// How long a TCP connect to an endpoint may take before the next is tried. Default 1 s.
    pub connect_timeout: Duration,
    /// How long connections of a pod that leaves the mesh may finish. Default 30 s.
    pub drain_timeout: Duration,
}

impl Default for MeshConfig {
    fn default() -> Self {
        Self {
            trust_domain: TrustDomain::default(),
            mode: Mode::default(),
            encrypt_same_node: false,
            connect_timeout: Duration::from_secs(1),
            drain_timeout: Duration::from_secs(30),
        }
    }
}
