//! The mesh's CA, and what it may issue to whom.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use super::network::CONTROL;
use super::state::{LabState, PodRecord};
use crate::cgroup::Cgroup;
use crate::manifests;
use crate::netns::Netns;
use crate::process::{Place, Process};

const READY: Duration = Duration::from_secs(20);

/// The CA of a lab: `undermesh ca`, in a namespace that both nodes reach.
#[derive(Debug, Clone)]
pub struct Authority {
    place: Place,
    state_dir: PathBuf,
}

impl Authority {
    /// The CA of a lab that is up.
    #[must_use]
    pub fn of(state: &LabState) -> Self {
        Self {
            place: Place {
                netns: Netns::at(&state.dir.join("netns/control")),
                cgroup: Cgroup::at(&state.cgroup.join("control")),
                dir: state.dir.join("control"),
            },
            state_dir: state.dir.join("control/ca"),
        }
    }

    /// Where it listens.
    #[must_use]
    pub fn address() -> SocketAddr {
        (CONTROL, 15012).into()
    }

    /// Where it runs.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// What agents are to trust.
    #[must_use]
    pub fn root_file(&self) -> PathBuf {
        self.state_dir.join("root.pem")
    }

    fn authenticator(&self) -> PathBuf {
        self.place.dir.join("authenticator.yaml")
    }

    /// Each node may ask for the identities of the pods that it runs.
    pub(super) fn write_authenticator(&self, state: &LabState, pods: &[PodRecord]) -> Result<()> {
        let mut nodes = Vec::new();
        for node in &state.nodes {
            let token = fs::read_to_string(node.dir.join("token"))?;
            let here = pods.iter().filter(|pod| pod.node == node.name);
            let identities: BTreeSet<String> = here
                .map(|pod| format!("{}/{}", pod.namespace, pod.service_account))
                .collect();
            nodes.push(json!({
                "name": node.name,
                "token": token,
                "identities": identities,
            }));
        }
        let text = manifests::to_yaml(&json!({"nodes": nodes}))?;
        manifests::write(&self.place.dir, "authenticator.yaml", &state.dir, &text)?;
        fs::set_permissions(self.authenticator(), fs::Permissions::from_mode(0o600))?;
        Ok(())
    }

    pub(super) fn start(
        &self,
        state: &LabState,
        lifetime: Option<&str>,
        environment: &[(String, String)],
    ) -> Result<Process> {
        let program = state.binaries.agent.display().to_string();
        let mut command = self.place.detached(&program);
        command
            .args(["ca", "--listen"])
            .arg(Self::address().to_string())
            .arg("--state-dir")
            .arg(&self.state_dir)
            .args(["--trust-domain", &state.trust_domain])
            .arg("--authenticator")
            .arg(self.authenticator());
        if let Some(lifetime) = lifetime {
            command.args(["--certificate-lifetime", lifetime]);
        }
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        let mut process = Process::start("ca", command, &self.place.dir.join("ca.log"))?;
        let root = self.root_file();
        process.until("the CA to listen", READY, |_| {
            let reached = self.place.netns.enter(|| {
                TcpStream::connect_timeout(&Self::address(), Duration::from_secs(1))?;
                Ok(())
            });
            Ok(root.exists() && reached.is_ok())
        })?;
        Ok(process)
    }
}

/// A bearer token that nobody can guess.
pub(super) fn write_token(path: &Path) -> Result<()> {
    fs::write(path, random_hex(32)?)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(())
}

/// Random bytes in hex, from the kernel.
pub fn random_hex(bytes: usize) -> Result<String> {
    let mut random = vec![0; bytes];
    fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}
