//! A machine that boots a kernel, runs test programs and goes off: qemu without KVM, and an initramfs.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use undermesh_lab::{interrupt, machine};

use super::packages::Kernel;
use crate::build::execute;

/// What the tests run, and what the first process does.
const PROGRAMS: [&str; 8] = [
    "sh", "bash", "mount", "modprobe", "ip", "sysctl", "cat", "prlimit",
];
/// Networks between namespaces.
const MODULES: [&str; 2] = ["veth", "bridge"];
/// Directories of those modules and of what they need, below `kernel`.
const MODULE_DIRS: [&str; 4] = [
    "drivers/net/veth",
    "net/bridge/bridge",
    "net/802/stp",
    "net/llc/llc",
];
/// Before and after the lines of a test program; status follows the second.
const BEGIN: &str = "@@ begin ";
const END: &str = "@@ end ";
/// A kernel that hangs does so for good; on a busy machine a test may be silent for long.
const SILENCE: Duration = Duration::from_secs(400);

/// A test program and its arguments.
pub struct Job {
    pub name: &'static str,
    pub program: PathBuf,
    pub arguments: &'static str,
}

/// What a program said, line by line, and how it ended.
pub struct Outcome {
    pub name: String,
    pub lines: Vec<String>,
    /// None if the machine went off before.
    pub status: Option<i32>,
    /// How long it ran, by the clock of whoever waits.
    pub took: Duration,
}

/// Boots, runs the jobs one after another, and gives back what each said. Nothing may take longer than `limit`.
pub fn run(kernel: &Kernel, jobs: &[Job], limit: Duration) -> Result<Vec<Outcome>> {
    let scratch = kernel.dir.join("machine");
    let _ = fs::remove_dir_all(&scratch);
    let root = scratch.join("root");
    lay_root(&root, kernel, jobs)?;
    let archive = scratch.join("initramfs");
    pack(&root, &archive)?;
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args([
            "-accel",
            "tcg,thread=single",
            "-cpu",
            "max,la57=off,cx16=off",
        ])
        // Its clock counts instructions, a nanosecond each: however busy the machine is, the tests' deadlines
        // see the same, and what only waits takes no time. CPUs of such a machine take turns: a second one
        // would only spin while it waits for the first.
        .args(["-icount", "shift=0,sleep=off"])
        .args([
            "-smp",
            "1",
            "-m",
            "2048",
            "-nographic",
            "-no-reboot",
            "-nic",
            "none",
        ])
        .args(["-append", "console=ttyS0 quiet panic=-1 rdinit=/init"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(&archive);
    let lines = lines_of(command, limit)?;
    let lines = lines.iter().map(|(at, line)| (*at, line.as_str()));
    Ok(outcomes(lines))
}

/// Files of the programs, what they are linked against, the kernel's modules, and what runs first.
fn lay_root(root: &Path, kernel: &Kernel, jobs: &[Job]) -> Result<()> {
    for dir in [
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "tests",
        "lib64",
        "usr/bin",
        "lib/modules",
    ] {
        fs::create_dir_all(root.join(dir))?;
    }
    let mut files = BTreeSet::new();
    for program in PROGRAMS {
        let path =
            machine::find(program).with_context(|| format!("no {program} on this machine"))?;
        let place = root.join("usr/bin").join(program);
        fs::copy(&path, &place).with_context(|| path.display().to_string())?;
        files.extend(libraries(&path)?);
    }
    // Some are called by path.
    for alias in ["bin", "sbin", "usr/sbin"] {
        std::os::unix::fs::symlink("/usr/bin", root.join(alias))?;
    }
    let mut script = INIT.to_owned();
    for module in MODULES {
        script.push_str(&format!("modprobe {module}\n"));
    }
    for job in jobs {
        files.extend(libraries(&job.program)?);
        let place = root.join("tests").join(job.name);
        // Lines of a backtrace are worth less than the time that it takes to unpack them.
        execute(
            Command::new("strip")
                .args(["--strip-debug", "-o"])
                .arg(&place)
                .arg(&job.program),
        )?;
        let (name, arguments) = (job.name, job.arguments);
        script.push_str(&format!(
            "echo '{BEGIN}{name}'\n/tests/{name} {arguments} 2>&1\necho \"{END}{name} $?\"\n"
        ));
    }
    script.push_str(OFF);
    // A file that is no namespace, as every machine has it: a test takes it for one.
    fs::create_dir_all(root.join("etc"))?;
    fs::write(root.join("etc/hostname"), "emulated\n")?;
    for file in files {
        let place = root.join(file.strip_prefix("/")?);
        fs::create_dir_all(place.parent().context("a library at /")?)?;
        fs::copy(&file, &place).with_context(|| file.display().to_string())?;
    }
    lay_modules(root, kernel)?;
    let init = root.join("init");
    fs::write(&init, script)?;
    execute(Command::new("chmod").arg("755").arg(&init))
}

const INIT: &str = "#!/bin/sh
export PATH=/usr/bin HOME=/ RUST_BACKTRACE=0
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
ip link set lo up
ulimit -n 20000
";
/// The kernel's own way: there is no init system that could be asked.
const OFF: &str = "echo o > /proc/sysrq-trigger\nwhile :; do :; done\n";

fn lay_modules(root: &Path, kernel: &Kernel) -> Result<()> {
    let below = Path::new("lib/modules").join(&kernel.release);
    let from = kernel.root.join(&below).join("kernel");
    for module in MODULE_DIRS {
        let (dir, name) = module.rsplit_once('/').unwrap_or(("", module));
        let dir_from = from.join(dir);
        let names = [".ko", ".ko.xz", ".ko.zst"].map(|end| format!("{name}{end}"));
        let file = names.iter().find(|file| dir_from.join(file).exists());
        let file = file.with_context(|| format!("no module {module} in {}", from.display()))?;
        let dir_to = root.join(&below).join("kernel").join(dir);
        fs::create_dir_all(&dir_to)?;
        fs::copy(dir_from.join(file), dir_to.join(file))?;
    }
    for list in [
        "modules.builtin",
        "modules.builtin.modinfo",
        "modules.order",
    ] {
        fs::copy(
            kernel.root.join(&below).join(list),
            root.join(&below).join(list),
        )?;
    }
    let depmod = machine::find("depmod").context("no depmod on this machine")?;
    execute(
        Command::new(depmod)
            .arg("-b")
            .arg(root)
            .arg(&kernel.release),
    )
}

/// Shared libraries of a program, the dynamic linker among them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let words = text.lines().filter_map(|line| {
        let path = line.split("=>").last()?.split_whitespace().next()?;
        path.starts_with('/').then(|| PathBuf::from(path))
    });
    Ok(words.collect())
}

/// In the format that the kernel unpacks (Documentation/driver-api/early-userspace/buffer-format.rst).
fn pack(root: &Path, archive: &Path) -> Result<()> {
    let to = fs::File::create(archive).with_context(|| archive.display().to_string())?;
    let mut find = Command::new("find")
        .arg(".")
        .current_dir(root)
        .stdout(Stdio::piped())
        .spawn()?;
    let names = find.stdout.take().context("find has no output")?;
    let status = Command::new("cpio")
        .args(["--quiet", "--create", "--format=newc"])
        .current_dir(root)
        .stdin(names)
        .stdout(to)
        .status()
        .context("cpio")?;
    ensure!(find.wait()?.success() && status.success(), "cpio: {status}");
    Ok(())
}

/// Runs it to its end and shows what it says. Killed when it says nothing any more or takes too long. Each line has
/// the time from the start.
fn lines_of(mut command: Command, limit: Duration) -> Result<Vec<(Duration, String)>> {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {command:?}"))?;
    let mut child = Ends(child);
    let output = child.0.stdout.take().context("no output")?;
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    let start = Instant::now();
    let mut heard = start;
    let mut lines = Vec::new();
    loop {
        interrupt::check()?;
        match receiver.recv_timeout(Duration::from_millis(200)) {
            Ok(line) => {
                println!("{line}");
                lines.push((start.elapsed(), line));
                heard = Instant::now();
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(lines),
            Err(RecvTimeoutError::Timeout) if heard.elapsed() > SILENCE => {
                bail!("the machine says nothing any more");
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        if start.elapsed() > limit {
            bail!("the machine was not done within {limit:?}");
        }
    }
}

/// Kills the machine with whoever waits for it.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn outcomes<'a>(lines: impl Iterator<Item = (Duration, &'a str)>) -> Vec<Outcome> {
    let mut outcomes: Vec<Outcome> = Vec::new();
    let mut began = Duration::ZERO;
    for (at, line) in lines {
        if let Some((_, name)) = line.split_once(BEGIN) {
            began = at;
            outcomes.push(Outcome {
                name: name.to_owned(),
                lines: Vec::new(),
                status: None,
                took: Duration::ZERO,
            });
            continue;
        }
        let Some(current) = outcomes
            .last_mut()
            .filter(|outcome| outcome.status.is_none())
        else {
            continue;
        };
        current.took = at.saturating_sub(began);
        let end = line
            .split_once(END)
            .and_then(|(_, end)| end.split_once(' '));
        match end {
            Some((name, status)) if name == current.name => current.status = status.parse().ok(),
            _ => current.lines.push(line.to_owned()),
        }
    }
    outcomes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_each_program_said_is_told_apart_and_one_that_was_cut_short_has_no_status() {
        let lines = [
            "boot",
            "@@ begin one",
            "test a ... ok",
            "@@ end one 0",
            "between",
            "\u{1b}[0m@@ begin two",
            "test b",
        ];
        let lines = lines.into_iter().zip(0..);
        let outcomes = outcomes(lines.map(|(line, second)| (Duration::from_secs(second), line)));
        assert_eq!(outcomes.len(), 2);
        assert_eq!(outcomes[0].took, Duration::from_secs(2));
        assert_eq!(outcomes[0].lines, ["test a ... ok"]);
        assert_eq!((outcomes[0].status, outcomes[1].status), (Some(0), None));
        assert_eq!(outcomes[1].name, "two");
    }
}
