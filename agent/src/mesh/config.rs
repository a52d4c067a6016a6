//! Settings of the whole mesh.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::Serialize;
use thiserror::Error;

use super::TrustDomain;

/// What happens to traffic that has no mesh identity on one of its sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Mode {
    /// Refused, with a reason in the log.
    Strict,
    /// Passed as plaintext, and labelled so in every metric.
    #[default]
    Permissive,
}

/// A text that names no [`Mode`].
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is not a mode: Strict or Permissive")]
pub struct ModeError(pub String);

impl FromStr for Mode {
    type Err = ModeError;

    /// Upper and lower case are alike: Istio writes `STRICT`, Kubernetes enums `Strict`.
    fn from_str(text: &str) -> Result<Self, ModeError> {
        if text.eq_ignore_ascii_case("strict") {
            Ok(Self::Strict)
        } else if text.eq_ignore_ascii_case("permissive") {
            Ok(Self::Permissive)
        } else {
            Err(ModeError(text.to_owned()))
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Strict => "Strict",
            Self::Permissive => "Permissive",
        })
    }
}

impl<'de> serde::Deserialize<'de> for Mode {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
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
    /// The same where nothing else is left to try. See [`MeshConfig::last_connect_limit`]. Default
    /// 10 s: time for SYNs that are sent again after 1, 3 and 7 s.
    pub last_connect_timeout: Duration,
    /// How long a client may be silent before its connection is taken for one that is not HTTP, where
    /// nothing says what is spoken. None: what is right for each side.
    pub detection_timeout: Option<Duration>,
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
            last_connect_timeout: Duration::from_secs(10),
            detection_timeout: None,
            drain_timeout: Duration::from_secs(30),
        }
    }
}

impl MeshConfig {
    /// How long connecting may take where nothing else is left to try: never less than where there
    /// is.
    #[must_use]
    pub fn last_connect_limit(&self) -> Duration {
        self.last_connect_timeout.max(self.connect_timeout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_is_read_in_any_case_and_written_as_kubernetes_writes_enums() {
        for text in ["Strict", "strict", "STRICT"] {
            assert_eq!(text.parse(), Ok(Mode::Strict));
        }
        assert_eq!("Permissive".parse(), Ok(Mode::Permissive));
        assert_eq!(Mode::Strict.to_string(), "Strict");
    }

    #[test]
    fn a_text_that_is_no_mode_is_refused_by_name() {
        let error = "off".parse::<Mode>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "\"off\" is not a mode: Strict or Permissive"
        );
        let error = serde_json::from_str::<Mode>("\"off\"").unwrap_err();
        assert!(error.to_string().contains("is not a mode"));
    }
}
