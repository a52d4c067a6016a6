//! What the machine must have, and how it gets it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::Uid;

/// A program and the Debian package that holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tool {
    /// Name of the program.
    pub program: &'static str,
    /// Debian package.
    pub package: &'static str,
}

/// ip(8).
pub const IP: Tool = tool("ip", "iproute2");
/// nft(8).
pub const NFT: Tool = tool("nft", "nftables");
/// tcpdump(8).
pub const TCPDUMP: Tool = tool("tcpdump", "tcpdump");
/// nginx.
pub const NGINX: Tool = tool("nginx", "nginx-light");
/// curl.
pub const CURL: Tool = tool("curl", "curl");
/// h2load.
pub const H2LOAD: Tool = tool("h2load", "nghttp2-client");
/// python3.
pub const PYTHON: Tool = tool("python3", "python3-minimal");
/// redis-server.
pub const REDIS: Tool = tool("redis-server", "redis-server");
/// redis-cli and redis-benchmark.
pub const REDIS_TOOLS: Tool = tool("redis-benchmark", "redis-tools");
/// PostgreSQL's server, whose programs Debian keeps off the path.
pub const POSTGRES: Tool = tool("pg_ctlcluster", "postgresql");
/// pgbench comes with the server's package.
pub const PGBENCH: Tool = tool("pgbench", "postgresql");
/// openssl.
pub const OPENSSL: Tool = tool("openssl", "openssl");
/// wrk.
pub const WRK: Tool = tool("wrk", "wrk");
/// valgrind.
pub const VALGRIND: Tool = tool("valgrind", "valgrind");
/// iperf3.
pub const IPERF3: Tool = tool("iperf3", "iperf3");

const fn tool(program: &'static str, package: &'static str) -> Tool {
    Tool { program, package }
}

/// An error unless this runs as root.
pub fn require_root() -> Result<()> {
    ensure!(
        Uid::effective().is_root(),
        "this makes network namespaces and loads eBPF programs: run it as root"
    );
    Ok(())
}

/// The path of a program, in `PATH` or where Debian keeps those of root.
#[must_use]
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let root = ["/usr/local/sbin", "/usr/sbin", "/sbin"];
    std::env::split_paths(&path)
        .chain(root.iter().map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// Makes sure that these programs are there: on Debian, as root, missing ones are installed, and named;
/// elsewhere the error says what to install.
pub fn require(tools: &[Tool]) -> Result<()> {
    let mut packages: Vec<&str> = tools
        .iter()
        .filter(|tool| find(tool.program).is_none())
        .map(|tool| tool.package)
        .collect();
    packages.dedup();
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    if !Uid::effective().is_root() || find("apt-get").is_none() {
        bail!("missing programs; on Debian: apt-get install {list}");
    }
    eprintln!("installing from Debian: {list}");
    install(&packages)?;
    for tool in tools {
        ensure!(
            find(tool.program).is_some(),
            "package {} is installed, but there is no {}",
            tool.package,
            tool.program
        );
    }
    Ok(())
}

/// Debian's Python, which has Debian's modules, whatever other one `PATH` has.
pub const DEBIAN_PYTHON: &str = "/usr/bin/python3";

/// Makes sure that [`DEBIAN_PYTHON`] can import `module`, which `package` of Debian brings.
pub fn require_module(module: &str, package: &str) -> Result<()> {
    let imports = || {
        let import = format!("import {module}");
        let mut python = Command::new(DEBIAN_PYTHON);
        python.args(["-c", &import]).stderr(Stdio::null());
        python.status().is_ok_and(|status| status.success())
    };
    if imports() {
        return Ok(());
    }
    if !Uid::effective().is_root() || find("apt-get").is_none() {
        bail!("{DEBIAN_PYTHON} cannot import {module}; on Debian: apt-get install {package}");
    }
    eprintln!("installing from Debian: {package}");
    install(&[package])?;
    ensure!(
        imports(),
        "package {package} is installed, but {DEBIAN_PYTHON} cannot import {module}"
    );
    Ok(())
}

fn install(packages: &[&str]) -> Result<()> {
    let _no_services = NoServices::start()?;
    let arguments = ["install", "--yes", "--quiet", "--no-install-recommends"];
    if apt(&arguments, packages).is_ok() {
        return Ok(());
    }
    // A machine that never fetched the lists, or long ago.
    apt(&["update", "--quiet"], &[])?;
    apt(&arguments, packages)
}

fn apt(arguments: &[&str], packages: &[&str]) -> Result<()> {
    let output = Command::new("apt-get")
        .args(arguments)
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .output()
        .context("apt-get")?;
    ensure!(
        output.status.success(),
        "apt-get {} {}: {}",
        arguments.join(" "),
        packages.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// While it lives, packages that are installed start no services (invoke-rc.d asks policy-rc.d). A policy that
/// the machine has already is left alone.
struct NoServices(bool);

const POLICY: &str = "/usr/sbin/policy-rc.d";

impl NoServices {
    fn start() -> Result<Self> {
        if Path::new(POLICY).exists() {
            return Ok(Self(false));
        }
        fs::write(POLICY, "#!/bin/sh\nexit 101\n")?;
        fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755))?;
        Ok(Self(true))
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.0 {
            let _ = fs::remove_file(POLICY);
        }
    }
}

/// Release of the running kernel.
#[must_use]
pub fn kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// What the processors call themselves.
#[must_use]
pub fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("model name"));
    let name = line.and_then(|line| line.split_once(':'));
    name.map_or_else(|| "unknown".to_owned(), |(_, name)| name.trim().to_owned())
}

/// Processors that this process may use.
#[must_use]
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
