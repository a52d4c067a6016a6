//! What the kernel programs are built with: found, or installed where that is possible.
//!
//! In this order: a rustup nightly with `rust-src` and `bpf-linker` on PATH; else Debian's packages
//! of a compiler that knows the target, and a `bpf-linker` built once into `target/tools`.

use std::env;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::build::execute;
use crate::debian;

const LINKER_VERSION: &str = "0.13.0";
const LLVM: &str = "llvm-22";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// Where the core library for the target comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Core {
    /// It came compiled with the compiler.
    Precompiled,
    /// It is built from the compiler's library sources.
    FromSource,
}

enum Compiler {
    /// `rustup run nightly`.
    Nightly,
    /// Debian's, at [`DEBIAN_RUSTC`].
    Debian,
}

/// A compiler and a linker for eBPF.
pub struct Toolchain {
    compiler: Compiler,
    core: Core,
    linker: PathBuf,
}

impl Toolchain {
    /// Looks for one, in the order of this module's description; installs the second as root on
    /// Debian. Prints what it installs. An error says what to install by hand.
    pub fn find_or_install(workspace: &Path) -> Result<Self> {
        match Self::nightly() {
            Ok(toolchain) => return Ok(toolchain),
            Err(reason) => println!("rustup nightly not taken: {reason}"),
        }
        Self::debian(workspace).context(
            "no toolchain for eBPF. Either: rustup toolchain install nightly --component rust-src, \
             and bpf-linker on PATH (cargo install bpf-linker). Or, on Debian and as root, run this \
             command again: it installs what is missing",
        )
    }

    /// Cargo, with this compiler.
    pub fn cargo(&self) -> Command {
        let mut cargo = match self.compiler {
            Compiler::Nightly => {
                let mut rustup = Command::new("rustup");
                rustup.args(["run", "nightly", "cargo"]);
                rustup
            }
            Compiler::Debian => {
                let mut cargo =
                    Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
                cargo.env("RUSTC", DEBIAN_RUSTC);
                cargo
            }
        };
        // Of the cargo that runs this program, and about that one's compiler.
        for variable in ["RUSTUP_TOOLCHAIN", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS"] {
            cargo.env_remove(variable);
        }
        if self.core == Core::FromSource {
            // Cargo asks for it before it knows -Z, also on a compiler that is no nightly.
            cargo.env("RUSTC_BOOTSTRAP", "1");
        }
        cargo
    }

    /// The linker.
    pub fn linker(&self) -> &Path {
        &self.linker
    }

    /// Where the core library comes from.
    pub fn core(&self) -> Core {
        self.core
    }

    /// The reason why not, as error.
    fn nightly() -> Result<Self> {
        let output = Command::new("rustup")
            .args(["run", "nightly", "rustc", "--print", "sysroot"])
            .output()
            .context("rustup is not there")?;
        ensure!(output.status.success(), "there is none");
        let sysroot = PathBuf::from(String::from_utf8(output.stdout)?.trim());
        ensure!(
            sysroot.join("lib/rustlib/src/rust/library/core").is_dir(),
            "it has no rust-src"
        );
        let linker = on_path("bpf-linker").context("bpf-linker is not on PATH")?;
        Ok(Self {
            compiler: Compiler::Nightly,
            core: Core::FromSource,
            linker,
        })
    }

    fn debian(workspace: &Path) -> Result<Self> {
        let compiled = "libstd-rust-web-dev-bpf";
        let known = || debian::is_installed(compiled) || debian::is_available(compiled);
        if !known() && debian::is_debian() && debian::is_root() {
            debian::update()?;
        }
        let core = if known() || !debian::is_debian() {
            Core::Precompiled
        } else {
            Core::FromSource
        };
        let library = match core {
            Core::Precompiled => compiled,
            Core::FromSource => "rust-web-src",
        };
        let tools = workspace.join("target/tools");
        let linker = tools.join("bin/bpf-linker");
        debian::install(&["rustc-web", library, &format!("{LLVM}-dev")])?;
        if !Path::new(DEBIAN_RUSTC).exists() {
            bail!("Debian's rustc-web is installed, but there is no {DEBIAN_RUSTC}");
        }
        if !is_linker(&linker) {
            println!(
                "installing bpf-linker {LINKER_VERSION} into {}",
                tools.display()
            );
            let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
            execute(
                Command::new(cargo)
                    .env("LLVM_PREFIX", format!("/usr/lib/{LLVM}"))
                    .args(["install", "bpf-linker", "--version", LINKER_VERSION])
                    .args(["--locked", "--no-default-features", "--features", LLVM])
                    .arg("--root")
                    .arg(&tools),
            )?;
        }
        Ok(Self {
            compiler: Compiler::Debian,
            core,
            linker,
        })
    }
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let compiler = match self.compiler {
            Compiler::Nightly => "rustup nightly",
            Compiler::Debian => DEBIAN_RUSTC,
        };
        let core = match self.core {
            Core::Precompiled => "precompiled core",
            Core::FromSource => "core from source",
        };
        write!(f, "{compiler}, {core}, {}", self.linker.display())
    }
}

fn is_linker(path: &Path) -> bool {
    Command::new(path)
        .arg("--version")
        .output()
        .is_ok_and(|output| {
            output.status.success()
                && String::from_utf8_lossy(&output.stdout).contains(LINKER_VERSION)
        })
}

fn on_path(program: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}
