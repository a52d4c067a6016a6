//! SPIFFE identities of workloads.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Serialize, Serializer};
use thiserror::Error;

/// Why a text is not a workload's SPIFFE id.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SpiffeIdError {
    /// Not of the form `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
    #[error("{0:?} is not spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    Form(String),
    /// The trust domain has a character outside `[a-z0-9._-]`, is empty or longer than 255 bytes.
    #[error("{0:?} is not a trust domain: 1 to 255 of a-z, 0-9, '.', '-', '_'")]
    TrustDomain(String),
    /// Namespace or service account is not a Kubernetes name (RFC 1123 subdomain).
    #[error("{0:?} is not a Kubernetes name")]
    Name(String),
}

/// A trust domain (SPIFFE-ID standard, section 2.1).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// The domain as it stands in an id.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for TrustDomain {
    fn default() -> Self {
        Self("cluster.local".into())
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeIdError;

    fn from_str(text: &str) -> Result<Self, SpiffeIdError> {
        let valid = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || b"._-".contains(&c);
        if text.is_empty() || text.len() > 255 || !text.bytes().all(valid) {
            return Err(SpiffeIdError::TrustDomain(text.to_owned()));
        }
        Ok(Self(text.into()))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Longest name of a Kubernetes object, in bytes.
pub const NAME_MAX: usize = 253;

/// Identity of a workload: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    trust_domain: TrustDomain,
    namespace: Arc<str>,
    service_account: Arc<str>,
}

impl SpiffeId {
    /// The identity of a service account. Errors if a part is not a Kubernetes name.
    pub fn new(
        trust_domain: TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, SpiffeIdError> {
        for name in [namespace, service_account] {
            if !is_kubernetes_name(name) {
                return Err(SpiffeIdError::Name(name.to_owned()));
            }
        }
        Ok(Self {
            trust_domain,
            namespace: namespace.into(),
            service_account: service_account.into(),
        })
    }

    /// The same service account in another trust domain.
    #[must_use]
    pub fn in_trust_domain(&self, trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            ..self.clone()
        }
    }

    /// The trust domain.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The service account.
    #[must_use]
    pub fn service_account(&self) -> &str {
        &self.service_account
    }

    /// Namespace and service account, for those who keep them.
    #[must_use]
    pub fn shared_names(&self) -> (&Arc<str>, &Arc<str>) {
        (&self.namespace, &self.service_account)
    }
}

/// Whether this is a name of a Kubernetes object (RFC 1123 subdomain): one that can stand in an
/// identity, a path and a log line.
#[must_use]
pub fn is_kubernetes_name(name: &str) -> bool {
    let alphanumeric = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    !name.is_empty()
        && name.len() <= NAME_MAX
        && name
            .bytes()
            .all(|c| alphanumeric(c) || c == b'-' || c == b'.')
        && name.bytes().next().is_some_and(alphanumeric)
        && name.bytes().next_back().is_some_and(alphanumeric)
}

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;

    fn from_str(text: &str) -> Result<Self, SpiffeIdError> {
        let form = || SpiffeIdError::Form(text.to_owned());
        let rest = text.strip_prefix("spiffe://").ok_or_else(form)?;
        let parts: Vec<&str> = rest.split('/').collect();
        let [trust_domain, "ns", namespace, "sa", service_account] = parts[..] else {
            return Err(form());
        };
        Self::new(trust_domain.parse()?, namespace, service_account)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            trust_domain,
            namespace,
            service_account,
        } = self;
        write!(
            f,
            "spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}"
        )
    }
}

impl Serialize for SpiffeId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_as_it_is_written() {
        let text = "spiffe://cluster.local/ns/shop/sa/web.front";
        let id: SpiffeId = text.parse().unwrap();
        assert_eq!(id.to_string(), text);
        assert_eq!(id.namespace(), "shop");
        assert_eq!(id.service_account(), "web.front");
        assert_eq!(serde_json::to_value(&id).unwrap(), text);
    }

    #[test]
    fn a_text_that_only_resembles_an_id_is_refused() {
        for text in [
            "",
            "spiffe://",
            "SPIFFE://cluster.local/ns/a/sa/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://Cluster.local/ns/a/sa/b",
            "spiffe://cluster.local/ns/a/sa/b/",
            "spiffe://cluster.local/ns/a/sa/b?x",
            "spiffe://cluster.local/ns//sa/b",
            "spiffe://cluster.local/ns/a/sa/-b",
            "spiffe://cluster.local/ns/a/sa/b\0",
            "spiffe://cluster.local/sa/b/ns/a",
            "spiffe://user@cluster.local/ns/a/sa/b",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text:?} passed");
        }
    }

    #[test]
    fn a_service_account_can_move_to_another_trust_domain() {
        let id = SpiffeId::new(TrustDomain::default(), "a", "b").unwrap();
        let moved = id.in_trust_domain("other.example".parse().unwrap());
        assert_eq!(moved.to_string(), "spiffe://other.example/ns/a/sa/b");
    }

    #[test]
    fn a_trust_domain_has_a_bounded_length_and_few_characters() {
        assert!("a".repeat(255).parse::<TrustDomain>().is_ok());
        assert!("a".repeat(256).parse::<TrustDomain>().is_err());
        assert!("".parse::<TrustDomain>().is_err());
        assert!("a/b".parse::<TrustDomain>().is_err());
    }
}
