//! Network namespaces that are files in the lab's own directory.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace, held by a bind mount at its path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Netns {
    path: PathBuf,
}

impl Netns {
    /// Makes a namespace and binds it to `path`, with its loopback up.
    pub fn create(path: &Path) -> Result<Self> {
        File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        let target = path.to_owned();
        on_a_thread(move || {
            unshare(CloneFlags::CLONE_NEWNET).context("unshare(CLONE_NEWNET)")?;
            let none: Option<&str> = None;
            mount(
                Some("/proc/thread-self/ns/net"),
                &target,
                none,
                MsFlags::MS_BIND,
                none,
            )
            .with_context(|| format!("cannot bind a namespace to {}", target.display()))
        })?;
        let netns = Self::at(path);
        netns.ip(&["link set lo up".to_owned()])?;
        Ok(netns)
    }

    /// One that exists.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// Its file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lets go of the namespace: it ends with its last process and socket.
    pub fn remove(&self) -> Result<()> {
        match umount2(&self.path, MntFlags::MNT_DETACH) {
            // EINVAL: created, but never bound.
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(error) => {
                return Err(error).with_context(|| format!("umount {}", self.path.display()));
            }
        }
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", self.path.display()))
            }
            _ => Ok(()),
        }
    }

    /// Runs `work` on a thread that is in the namespace: sockets it opens belong there, and `/proc/sys/net`
    /// is the namespace's.
    pub fn enter<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let path = self.path.clone();
        on_a_thread(move || {
            let file = File::open(&path).with_context(|| format!("no {}", path.display()))?;
            setns(&file, CloneFlags::CLONE_NEWNET)
                .with_context(|| format!("cannot enter {}", path.display()))?;
            work()
        })
    }

    /// Runs lines of `ip` in one go.
    pub fn ip(&self, lines: &[String]) -> Result<()> {
        self.feed(&["ip", "-batch", "-"], &lines.join("\n"))
    }

    /// Sets `/proc/sys/net/<name>`; a setting that this kernel lacks is an error.
    pub fn sysctl(&self, settings: &[(&str, &str)]) -> Result<()> {
        let settings: Vec<(String, String)> = settings
            .iter()
            .map(|(name, value)| (format!("/proc/sys/net/{name}"), (*value).to_owned()))
            .collect();
        self.enter(move || {
            for (path, value) in &settings {
                std::fs::write(path, value).with_context(|| format!("cannot set {path}"))?;
            }
            Ok(())
        })
    }

    /// Runs a command in the namespace with `input` on its stdin; its stderr is in the error.
    pub fn feed(&self, command: &[&str], input: &str) -> Result<()> {
        use std::io::Write;
        let mut child = Command::new("nsenter")
            .arg(self.nsenter_argument())
            .arg("--")
            .args(command)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run nsenter (package util-linux)")?;
        if let Some(mut stdin) = child.stdin.take() {
            // A command that ends early says why on stderr.
            let _ = stdin.write_all(input.as_bytes());
        }
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!(
                "{} in {}: {}\n{input}",
                command.join(" "),
                self.path.display(),
                String::from_utf8_lossy(&output.stderr).trim(),
            );
        }
        Ok(())
    }

    /// The argument that makes nsenter(1) enter it.
    #[must_use]
    pub fn nsenter_argument(&self) -> String {
        format!("--net={}", self.path.display())
    }
}

/// setns and unshare change the calling thread only: it must end afterwards.
fn on_a_thread<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    std::thread::Builder::new()
        .name("netns".into())
        .spawn(work)?
        .join()
        .map_err(|_| anyhow!("a thread inside a network namespace panicked"))?
}
