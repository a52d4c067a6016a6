//! Packages of Debian that a command needs: installed as root, named otherwise.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::build::execute;

/// Whether this is Debian or made of it, with apt.
pub fn is_debian() -> bool {
    fs::read_to_string("/etc/os-release").is_ok_and(|text| {
        text.lines().any(|line| {
            let line = line.replace('"', "");
            line == "ID=debian"
                || line
                    .strip_prefix("ID_LIKE=")
                    .is_some_and(|like| like.split(' ').any(|name| name == "debian"))
        })
    })
}

/// Installs those packages that are missing, and prints each. An error says what to install where
/// this is not root or not Debian.
pub fn install(packages: &[&str]) -> Result<()> {
    let missing: Vec<&str> = packages
        .iter()
        .copied()
        .filter(|package| !is_installed(package))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    if !is_debian() {
        bail!("this is not Debian: install what corresponds to its packages {names}");
    }
    if !is_root() {
        bail!("not root: install with apt-get install --no-install-recommends {names}");
    }
    println!("installing from Debian: {names}");
    if missing.iter().any(|package| !is_available(package)) {
        update()?;
    }
    execute(
        Command::new("apt-get")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .args(["install", "--yes", "--no-install-recommends"])
            .args(&missing),
    )
}

/// Fetches the lists of packages, which a bare machine does not have. Needs root.
pub fn update() -> Result<()> {
    execute(Command::new("apt-get").arg("update"))
}

/// Whether the package is installed.
pub fn is_installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["--show", "--showformat=${db:Status-Status}", package])
        .stderr(Stdio::null())
        .output()
        .is_ok_and(|output| output.stdout == b"installed")
}

/// Whether apt knows a version of the package that could be installed.
pub fn is_available(package: &str) -> bool {
    Command::new("apt-cache")
        .args(["show", "--no-all-versions", package])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Whether this process is root.
pub fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| {
        use std::os::unix::fs::MetadataExt as _;
        process.uid() == 0
    })
}
