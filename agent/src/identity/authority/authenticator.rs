//! Who may ask for what, from a file: for use without Kubernetes.
//!
//! ```yaml
//! nodes:
//!   - name: node-a
//!     token: "at least 16 characters"
//!     identities: ["shop/web", "shop/cart"]
//! ```

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use parking_lot::Mutex;
use serde::Deserialize;
use thiserror::Error;
use zeroize::Zeroizing;

use crate::mesh::{SpiffeId, SpiffeIdError, TrustDomain};

/// Largest file, in bytes.
const MAX_FILE: u64 = 4 * 1024 * 1024;
/// Shortest token that is worth the name, in bytes.
const MIN_TOKEN: usize = 16;
/// Longest token, in bytes.
const MAX_TOKEN: usize = 8 * 1024;

/// Why a file is not put in force. Never tells a token.
#[derive(Debug, Error)]
pub enum AuthenticatorError {
    /// It cannot be read.
    #[error("cannot read {path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// More than 4 MiB.
    #[error("{0} is larger than {MAX_FILE} bytes")]
    TooLarge(PathBuf),
    /// Not YAML, or not of this form. Tells the place.
    #[error("{path}: {reason}")]
    Form {
        /// The file.
        path: PathBuf,
        /// Line, column, and what is wrong there.
        reason: String,
    },
    /// What one node says.
    #[error("{path}: node {node:?}: {fault}")]
    Node {
        /// The file.
        path: PathBuf,
        /// The node's name.
        node: String,
        /// What is wrong with it.
        fault: NodeFault,
    },
}

/// What is wrong with one node of the file.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum NodeFault {
    /// A name must tell nodes apart in the log.
    #[error("its name is empty, or another node has it too")]
    Name,
    /// Too short to be a secret, or absurdly long.
    #[error("its token has {0} characters, expected {MIN_TOKEN} to {MAX_TOKEN}")]
    TokenLength(usize),
    /// Not what can stand in a header.
    #[error("its token holds characters other than printable ASCII")]
    TokenCharacters,
    /// Then it would not tell who asks.
    #[error("another node has the same token")]
    SameToken,
    /// Not `namespace/serviceaccount`.
    #[error("identity {0:?} is not NAMESPACE/SERVICEACCOUNT")]
    Identity(String),
    /// Not Kubernetes names.
    #[error(transparent)]
    NotAName(#[from] SpiffeIdError),
}

/// A node that has shown its token.
#[derive(Debug)]
pub(super) struct Node {
    /// Its name, for the log.
    pub(super) name: String,
    token: [u8; SHA256_OUTPUT_LEN],
    identities: BTreeSet<SpiffeId>,
}

impl Node {
    /// Whether it may ask for this identity.
    pub(super) fn may(&self, id: &SpiffeId) -> bool {
        self.identities.contains(id)
    }
}

/// The nodes of a file, reloaded when it changes; the last good ones stay when it goes bad.
pub(super) struct Authenticator {
    path: PathBuf,
    trust_domain: TrustDomain,
    nodes: ArcSwap<Vec<Arc<Node>>>,
    /// Digest of the content that was looked at last, good or bad; none if it could not be read.
    seen: Mutex<Option<[u8; SHA256_OUTPUT_LEN]>>,
}

/// What a look at the file found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reload {
    /// The same as before.
    Unchanged,
    /// Other nodes, in force now.
    Changed,
}

impl Authenticator {
    /// Loads the file; a bad one is an error, since there is no last good one yet.
    pub(super) fn open(
        path: &Path,
        trust_domain: &TrustDomain,
    ) -> Result<Self, AuthenticatorError> {
        let content = read(path)?;
        let nodes = parse(path, &content, trust_domain)?;
        Ok(Self {
            path: path.to_owned(),
            trust_domain: trust_domain.clone(),
            nodes: ArcSwap::from_pointee(nodes),
            seen: Mutex::new(Some(sha256(content.as_bytes()))),
        })
    }

    /// Looks at the file again. Each bad content is an error once, then counts as unchanged.
    pub(super) fn reload(&self) -> Result<Reload, AuthenticatorError> {
        let content = read(&self.path);
        let now = content.as_ref().ok().map(|text| sha256(text.as_bytes()));
        let mut seen = self.seen.lock();
        if *seen == now {
            return Ok(Reload::Unchanged);
        }
        *seen = now;
        let content = content?;
        let nodes = parse(&self.path, &content, &self.trust_domain)?;
        self.nodes.store(Arc::new(nodes));
        Ok(Reload::Changed)
    }

    /// The node that holds this token. Every node is compared, each in constant time, by digest:
    /// the time taken tells nothing of any token.
    pub(super) fn authenticate(&self, token: &[u8]) -> Option<Arc<Node>> {
        let given = sha256(token);
        let nodes = self.nodes.load();
        let mut found = None;
        for node in nodes.iter() {
            if verify_slices_are_equal(&node.token, &given).is_ok() {
                found = Some(node.clone());
            }
        }
        found
    }
}

fn sha256(bytes: &[u8]) -> [u8; SHA256_OUTPUT_LEN] {
    let mut output = [0; SHA256_OUTPUT_LEN];
    output.copy_from_slice(digest(&SHA256, bytes).as_ref());
    output
}

fn read(path: &Path) -> Result<Zeroizing<String>, AuthenticatorError> {
    let mut content = Zeroizing::new(String::new());
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_FILE + 1).read_to_string(&mut content))
        .map_err(|error| AuthenticatorError::Read {
            path: path.to_owned(),
            error,
        })?;
    if content.len() as u64 > MAX_FILE {
        return Err(AuthenticatorError::TooLarge(path.to_owned()));
    }
    Ok(content)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    nodes: Vec<NodeEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NodeEntry {
    name: String,
    token: Zeroizing<String>,
    identities: Vec<String>,
}

fn parse(
    path: &Path,
    content: &str,
    trust_domain: &TrustDomain,
) -> Result<Vec<Arc<Node>>, AuthenticatorError> {
    let mut options = serde_saphyr::Options::default();
    // A snippet of the file would carry tokens into the log.
    options.with_snippet = false;
    let document: Document = serde_saphyr::from_str_with_options(content, options).map_err(
        |error: serde_saphyr::Error| AuthenticatorError::Form {
            path: path.to_owned(),
            reason: error.without_snippet().to_string(),
        },
    )?;
    let mut names = BTreeSet::new();
    let mut tokens = BTreeSet::new();
    document
        .nodes
        .into_iter()
        .map(|entry| {
            let name = entry.name.clone();
            if name.is_empty() || !names.insert(name.clone()) {
                return Err((name, NodeFault::Name));
            }
            let node = node(entry, trust_domain).map_err(|fault| (name.clone(), fault))?;
            if !tokens.insert(node.token) {
                return Err((name, NodeFault::SameToken));
            }
            Ok(Arc::new(node))
        })
        .collect::<Result<_, _>>()
        .map_err(|(node, fault)| AuthenticatorError::Node {
            path: path.to_owned(),
            node,
            fault,
        })
}

fn node(entry: NodeEntry, trust_domain: &TrustDomain) -> Result<Node, NodeFault> {
    let token = entry.token.as_bytes();
    if !(MIN_TOKEN..=MAX_TOKEN).contains(&token.len()) {
        return Err(NodeFault::TokenLength(token.len()));
    }
    if !token.iter().all(u8::is_ascii_graphic) {
        return Err(NodeFault::TokenCharacters);
    }
    let mut identities = BTreeSet::new();
    for identity in entry.identities {
        let (namespace, service_account) = identity
            .split_once('/')
            .ok_or_else(|| NodeFault::Identity(identity.clone()))?;
        identities.insert(SpiffeId::new(
            trust_domain.clone(),
            namespace,
            service_account,
        )?);
    }
    Ok(Node {
        token: sha256(token),
        name: entry.name,
        identities,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
nodes:
  - name: node-a
    token: "token-of-node-a-0001"
    identities: ["shop/web", "shop/cart"]
  - name: node-b
    token: "token-of-node-b-0001"
    identities: []
"#;

    fn load(content: &str) -> Result<(tempfile::TempDir, Authenticator), AuthenticatorError> {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("nodes.yaml");
        std::fs::write(&path, content).unwrap();
        let authenticator = Authenticator::open(&path, &TrustDomain::default())?;
        Ok((base, authenticator))
    }

    fn fault(content: &str) -> String {
        load(content).err().unwrap().to_string()
    }

    #[test]
    fn a_token_tells_its_node_and_what_it_may_ask_for() {
        let (_base, authenticator) = load(GOOD).unwrap();
        let node = authenticator.authenticate(b"token-of-node-a-0001").unwrap();
        assert_eq!(node.name, "node-a");
        assert!(node.may(&"spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()));
        assert!(!node.may(&"spiffe://cluster.local/ns/shop/sa/db".parse().unwrap()));
        assert!(!node.may(&"spiffe://other/ns/shop/sa/web".parse().unwrap()));
    }

    #[test]
    fn no_other_text_is_a_token() {
        let (_base, authenticator) = load(GOOD).unwrap();
        for token in ["", "token-of-node-a-000", "token-of-node-a-00011", "node-a"] {
            assert!(authenticator.authenticate(token.as_bytes()).is_none());
        }
    }

    #[test]
    fn a_change_is_in_force_after_a_reload_and_a_bad_one_leaves_the_last_good() {
        let (base, authenticator) = load(GOOD).unwrap();
        let path = base.path().join("nodes.yaml");
        assert_eq!(authenticator.reload().unwrap(), Reload::Unchanged);
        std::fs::write(&path, GOOD.replace("a-0001", "a-0002")).unwrap();
        assert_eq!(authenticator.reload().unwrap(), Reload::Changed);
        assert!(
            authenticator
                .authenticate(b"token-of-node-a-0001")
                .is_none()
        );

        std::fs::write(&path, "nodes: [{name: x}]").unwrap();
        assert!(authenticator.reload().is_err());
        assert_eq!(authenticator.reload().unwrap(), Reload::Unchanged);
        std::fs::remove_file(&path).unwrap();
        assert!(authenticator.reload().is_err());
        assert_eq!(authenticator.reload().unwrap(), Reload::Unchanged);
        assert!(
            authenticator
                .authenticate(b"token-of-node-a-0002")
                .is_some()
        );
    }

    #[test]
    fn each_fault_is_named_with_its_node() {
        assert!(fault(&GOOD.replace("node-b", "node-a")).contains("another node has it too"));
        assert!(
            fault(
                &GOOD
                    .replace("b-0001", "a-0001")
                    .replace("of-node-b", "of-node-a")
            )
            .contains("same token")
        );
        assert!(fault(&GOOD.replace("shop/web", "shop")).contains("NAMESPACE/SERVICEACCOUNT"));
        assert!(fault(&GOOD.replace("shop/web", "shop/*")).contains("Kubernetes name"));
        assert!(fault(&GOOD.replace("token-of-node-b-0001", "short")).contains("5 characters"));
        assert!(fault(&GOOD.replace("identities: []", "identity: []")).contains("identity"));
    }

    #[test]
    fn no_error_repeats_a_token() {
        let secret = "token-of-node-a-0001";
        for bad in [
            GOOD.replace("identities: []", "identity: []"),
            GOOD.replace("\"shop/cart\"]", "\"shop/cart\""),
            GOOD.replace(&format!("\"{secret}\""), &format!("[\"{secret}\"]")),
            GOOD.replace(secret, &format!("{secret} {secret}")),
            GOOD.replace("- name: node-a\n", "- "),
            GOOD.replace("token:", "tokens:"),
        ] {
            let text = fault(&bad);
            assert!(!text.contains(secret), "{text}");
        }
    }
}
