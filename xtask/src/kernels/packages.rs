//! Debian's kernels, unpacked into a folder: the machine's own packages stay as they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::build::{execute, workspace};
use crate::debian;

/// A kernel of Debian's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    /// As `uname -r` begins.
    pub name: &'static str,
    /// The release of Debian that has it.
    suite: &'static str,
}

/// The oldest that is supported, and the newest of a stable Debian.
pub const VERSIONS: [Version; 2] = [
    Version {
        name: "6.1",
        suite: "bookworm",
    },
    Version {
        name: "6.12",
        suite: "trixie",
    },
];

/// Without drivers for hardware; what the tests need it has.
const PACKAGE: &str = "linux-image-cloud-amd64";

/// Package `debian-archive-keyring`: the keys of every release.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// An unpacked kernel.
pub struct Kernel {
    /// A directory of its own, for what is made of it.
    pub dir: PathBuf,
    /// `vmlinuz`.
    pub image: PathBuf,
    /// The directory that holds `lib/modules/RELEASE`.
    pub root: PathBuf,
    /// As `uname -r` says.
    pub release: String,
}

/// The kernel, downloaded unless it is in `target/kernels` already.
pub fn kernel(version: Version) -> Result<Kernel> {
    let dir = workspace().join("target/kernels").join(version.name);
    let unpacked = dir.join("unpacked");
    if !unpacked.exists() {
        let package = download(version, &dir)
            .with_context(|| format!("cannot get Debian's kernel {}", version.name))?;
        let fresh = dir.join("unpacked.new");
        let _ = fs::remove_dir_all(&fresh);
        execute(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&fresh))?;
        fs::rename(&fresh, &unpacked)?;
    }
    let image = only(&unpacked.join("boot"), "vmlinuz-")?;
    let release = name_of(&image)?.trim_start_matches("vmlinuz-").to_owned();
    ensure!(
        release.starts_with(&format!("{}.", version.name)),
        "{} is no {}",
        image.display(),
        version.name
    );
    // Since trixie everything lies below /usr.
    let roots = [unpacked.join("usr"), unpacked];
    let has_modules = |root: &&PathBuf| root.join("lib/modules").join(&release).is_dir();
    let root = roots
        .iter()
        .find(has_modules)
        .context("no modules")?
        .clone();
    Ok(Kernel {
        dir,
        image,
        root,
        release,
    })
}

/// The file of the package that the kernel's package stands for.
fn download(version: Version, dir: &Path) -> Result<PathBuf> {
    let _ = fs::remove_dir_all(dir);
    for name in ["lists/partial", "cache/archives/partial", "packages"] {
        fs::create_dir_all(dir.join(name))?;
    }
    fs::write(dir.join("sources.list"), source(version.suite)?)?;
    execute(apt("apt-get", dir).args(["--quiet=2", "update"]))?;
    let output = apt("apt-cache", dir).args(["depends", PACKAGE]).output()?;
    let depends = String::from_utf8_lossy(&output.stdout).into_owned();
    let image = depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .with_context(|| format!("{PACKAGE} depends on no kernel: {depends}"))?;
    println!("downloading {image} from Debian");
    let packages = dir.join("packages");
    execute(
        apt("apt-get", dir)
            .args(["--quiet=2", "download", image])
            .current_dir(&packages),
    )?;
    only(&packages, image)
}

/// apt with lists and caches of its own.
fn apt(program: &str, dir: &Path) -> Command {
    let mut command = Command::new(program);
    for (option, value) in [
        ("Dir::Etc::sourcelist", dir.join("sources.list")),
        ("Dir::Etc::sourceparts", "/dev/null".into()),
        ("Dir::State::lists", dir.join("lists")),
        ("Dir::Cache", dir.join("cache")),
        // The directory is root's alone.
        ("APT::Sandbox::User", "root".into()),
    ] {
        command.arg(format!("-o={option}={}", value.display()));
    }
    command
}

/// A source list for another release, from where the machine has its own packages.
fn source(suite: &str) -> Result<String> {
    let targets = || -> Result<String> {
        let output = Command::new("apt-get")
            .args(["indextargets", "--format"])
            .arg("$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)")
            .arg("Created-By: Packages")
            .output()
            .context("apt-get indextargets")?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let uri = match archive(&targets()?) {
        Some(found) => found,
        None => {
            // A bare machine knows its sources only once it has read them.
            debian::update()?;
            let targets = targets()?;
            archive(&targets).with_context(|| format!("no archive of Debian among {targets}"))?
        }
    };
    let options = if Path::new(KEYS).exists() {
        format!("[signed-by={KEYS}] ")
    } else {
        // Then apt takes the keys that it trusts for everything.
        String::new()
    };
    Ok(format!("deb {options}{uri} {suite} main\n"))
}

/// Address of Debian's own archive, in lines as [`source`] asks for them.
fn archive(targets: &str) -> Option<String> {
    targets.lines().find_map(|line| {
        let fields: Vec<&str> = line.split('|').collect();
        match fields[..] {
            ["Debian", "Debian", "main", uri] => Some(uri.to_owned()),
            _ => None,
        }
    })
}

/// The one file whose name begins so.
fn only(dir: &Path, prefix: &str) -> Result<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if name_of(&path)?.starts_with(prefix) {
            found.push(path);
        }
    }
    match found.pop() {
        Some(path) if found.is_empty() => Ok(path),
        _ => bail!("not one {prefix}* in {}", dir.display()),
    }
}

fn name_of(path: &Path) -> Result<&str> {
    let name = path.file_name().and_then(|name| name.to_str());
    name.with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_debians_and_not_that_of_security_or_of_others() {
        let targets = "nodistro|nodistro|main|https://one\n\
                       Debian|Debian-Security|main|http://two\n\
                       Debian|Debian|contrib|http://three\n\
                       Debian|Debian|main|http://four\n";
        assert_eq!(archive(targets).as_deref(), Some("http://four"));
        assert_eq!(archive(""), None);
    }
}
