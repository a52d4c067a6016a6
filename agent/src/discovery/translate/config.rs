//! `MeshConfig`, Undermesh's own kind: settings of the whole mesh.

use std::ops::RangeInclusive;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Deserializer};

use super::super::object::Fault;
use crate::mesh::{MeshConfig, Mode, parse_duration};

/// `apiVersion` of [`MeshConfigManifest`].
pub const MESH_CONFIG_API_VERSION: &str = "undermesh.io/v1alpha1";

/// Longest timeout that can be set: a longer one is a mistake of units.
const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// What can be set for detection: below it no client is fast enough, and beyond it those that wait
/// for a server to speak first have given up.
const DETECTION_RANGE: RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_secs(10);

/// A `MeshConfig` as it is written.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MeshConfigManifest {
    /// `undermesh.io/v1alpha1`.
    pub api_version: String,
    /// `MeshConfig`.
    pub kind: String,
    /// Its name; it has no namespace.
    pub metadata: ObjectMeta,
    /// The settings.
    #[serde(default)]
    pub spec: MeshConfigSpec,
}

/// The settings, each with the default of [`MeshConfig`] where it is left out.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MeshConfigSpec {
    /// See [`MeshConfig::trust_domain`].
    pub trust_domain: Option<String>,
    /// See [`MeshConfig::mode`].
    pub mode: Option<Mode>,
    /// See [`MeshConfig::encrypt_same_node`].
    pub encrypt_same_node: Option<bool>,
    /// See [`MeshConfig::connect_timeout`]. Above 0, at most 24 h.
    #[serde(default, deserialize_with = "duration")]
    pub connect_timeout: Option<Duration>,
    /// See [`MeshConfig::last_connect_timeout`]. Above 0, at most 24 h.
    #[serde(default, deserialize_with = "duration")]
    pub last_connect_timeout: Option<Duration>,
    /// See [`MeshConfig::detection_timeout`]. 1 ms to 10 s.
    #[serde(default, deserialize_with = "duration")]
    pub detection_timeout: Option<Duration>,
    /// See [`MeshConfig::drain_timeout`]. At most 24 h; 0 ends connections at once.
    #[serde(default, deserialize_with = "duration")]
    pub drain_timeout: Option<Duration>,
}

impl MeshConfigSpec {
    /// The settings in force.
    pub fn settings(&self) -> Result<MeshConfig, Fault> {
        let default = MeshConfig::default();
        let trust_domain = match &self.trust_domain {
            Some(text) => text
                .parse()
                .map_err(|error| Fault::new("spec.trustDomain", format!("{error}")))?,
            None => default.trust_domain,
        };
        let connect_timeout = self.connect_timeout.unwrap_or(default.connect_timeout);
        let last_connect_timeout = self
            .last_connect_timeout
            .unwrap_or(default.last_connect_timeout);
        for (timeout, field) in [
            (connect_timeout, "spec.connectTimeout"),
            (last_connect_timeout, "spec.lastConnectTimeout"),
        ] {
            if timeout.is_zero() {
                return Err(Fault::new(field, "0 lets no connection come about"));
            }
        }
        if let Some(timeout) = self.detection_timeout
            && !DETECTION_RANGE.contains(&timeout)
        {
            return Err(Fault::new(
                "spec.detectionTimeout",
                format!("{timeout:?} is not within 1ms and 10s"),
            ));
        }
        Ok(MeshConfig {
            trust_domain,
            mode: self.mode.unwrap_or(default.mode),
            encrypt_same_node: self.encrypt_same_node.unwrap_or(default.encrypt_same_node),
            connect_timeout,
            last_connect_timeout,
            detection_timeout: self.detection_timeout,
            drain_timeout: self.drain_timeout.unwrap_or(default.drain_timeout),
        })
    }
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let Some(text) = Option::<String>::deserialize(deserializer)? else {
        return Ok(None);
    };
    match parse_duration(&text) {
        Some(duration) if duration <= TIMEOUT_MAX => Ok(Some(duration)),
        Some(_) => Err(serde::de::Error::custom(format!(
            "{text:?} is longer than 24h"
        ))),
        None => Err(serde::de::Error::custom(format!(
            "{text:?} is not a duration: numbers with units h, m, s, ms, like \"1s\" or \"1m30s\""
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(spec: serde_json::Value) -> Result<MeshConfig, String> {
        let spec: MeshConfigSpec = serde_json::from_value(spec).map_err(|e| e.to_string())?;
        spec.settings()
            .map_err(|fault| format!("{}: {}", fault.field, fault.reason))
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        assert_eq!(settings(serde_json::json!({})), Ok(MeshConfig::default()));
    }

    #[test]
    fn every_setting_is_taken() {
        let spec = serde_json::json!({
            "trustDomain": "mesh.example", "mode": "Strict", "encryptSameNode": true,
            "connectTimeout": "500ms", "lastConnectTimeout": "3s", "detectionTimeout": "300ms",
            "drainTimeout": "2m"
        });
        let expected = MeshConfig {
            trust_domain: "mesh.example".parse().unwrap(),
            mode: Mode::Strict,
            encrypt_same_node: true,
            connect_timeout: Duration::from_millis(500),
            last_connect_timeout: Duration::from_secs(3),
            detection_timeout: Some(Duration::from_millis(300)),
            drain_timeout: Duration::from_secs(120),
        };
        assert_eq!(settings(spec), Ok(expected));
    }

    #[test]
    fn a_wrong_setting_is_refused_with_its_reason() {
        for (spec, reason) in [
            (
                serde_json::json!({"trustDomain": "Mesh"}),
                "spec.trustDomain: \"Mesh\" is not a trust domain",
            ),
            (
                serde_json::json!({"mode": "off"}),
                "\"off\" is not a mode: Strict or Permissive",
            ),
            (
                serde_json::json!({"connectTimeout": "0s"}),
                "spec.connectTimeout: 0 lets no connection come about",
            ),
            (
                serde_json::json!({"detectionTimeout": "0s"}),
                "spec.detectionTimeout: 0ns is not within 1ms and 10s",
            ),
            (
                serde_json::json!({"detectionTimeout": "10s1ms"}),
                "spec.detectionTimeout: 10.001s is not within 1ms and 10s",
            ),
            (
                serde_json::json!({"drainTimeout": "25h"}),
                "\"25h\" is longer than 24h",
            ),
            (
                serde_json::json!({"drainTimeout": "soon"}),
                "\"soon\" is not a duration",
            ),
            (
                serde_json::json!({"conectTimeout": "1s"}),
                "unknown field `conectTimeout`",
            ),
        ] {
            let error = settings(spec).unwrap_err();
            assert!(error.contains(reason), "{error} lacks {reason}");
        }
    }
}
