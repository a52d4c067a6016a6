//! Processes in a namespace and a cgroup.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cgroup::Cgroup;
use crate::netns::Netns;
use crate::{interrupt, wait};

/// Enters the cgroup before anything else, so that nothing runs outside it.
const ENTER: &str = r#"echo $$ > "$0/cgroup.procs" && exec "$@""#;

/// Where a process runs.
#[derive(Debug, Clone)]
pub struct Place {
    /// Network namespace.
    pub netns: Netns,
    /// cgroup2 directory.
    pub cgroup: Cgroup,
    /// Directory for logs and sockets.
    pub dir: PathBuf,
}

impl Place {
    /// A command that will run here, keeping its pid from start to end. `ip netns exec` would not do: it
    /// remounts /sys, and hides the cgroup tree.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("sh");
        command
            .args(["-c", ENTER])
            .arg(self.cgroup.path())
            .arg("nsenter")
            .arg(self.netns.nsenter_argument())
            .arg("--")
            .arg(program);
        command
    }

    /// The same, in a session of its own: neither Ctrl-C nor the end of a terminal reaches it.
    #[must_use]
    pub fn detached(&self, program: &str) -> Command {
        let mut command = self.command("setsid");
        command.arg(program);
        command
    }

    /// Starts `program` with its output in `<dir>/<name>.log`.
    pub fn spawn<S: AsRef<str>>(&self, name: &str, program: &str, args: &[S]) -> Result<Process> {
        let mut command = self.detached(program);
        command.args(args.iter().map(AsRef::as_ref));
        Process::start(name, command, &self.dir.join(format!("{name}.log")))
    }

    /// Runs `program` to its end and gives back what it wrote; on failure the error holds its stderr.
    pub fn run<S: AsRef<str>>(&self, program: &str, args: &[S]) -> Result<String> {
        let output = self.output(program, args)?;
        if !output.status.success() {
            bail!(
                "{program} {}: {}: {}{}",
                args.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(" "),
                output.status,
                String::from_utf8_lossy(&output.stderr).trim(),
                String::from_utf8_lossy(&output.stdout).trim(),
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs `program` to its end, whatever that is. Killed on Ctrl-C.
    pub fn output<S: AsRef<str>>(&self, program: &str, args: &[S]) -> Result<Output> {
        let mut command = self.detached(program);
        command.args(args.iter().map(AsRef::as_ref));
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {program}"))?;
        let pid = pid_of(&child);
        let waiter = std::thread::spawn(move || child.wait_with_output());
        while !waiter.is_finished() {
            if interrupt::interrupted() {
                // The pid cannot have been reused: the thread has not reaped it, or is about to say so.
                let _ = kill(pid, Signal::SIGKILL);
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let output = waiter
            .join()
            .map_err(|_| anyhow::anyhow!("waiting for {program} panicked"))??;
        interrupt::check()?;
        Ok(output)
    }
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX))
}

/// A process that the lab started. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Option<Child>,
    pid: Pid,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with both outputs appended to `log`.
    pub fn start(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("cannot write {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            pid: pid_of(&child),
            child: Some(child),
            log: log.to_owned(),
        })
    }

    /// What it is called in messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// The file that holds its output.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// What it wrote so far.
    #[must_use]
    pub fn output(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid, signal).with_context(|| format!("{signal} to {}", self.name))
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        match self.child.as_mut() {
            Some(child) => Ok(child.try_wait()?),
            None => Ok(None),
        }
    }

    /// An error with the end of its log if it does not run any more.
    pub fn check_alive(&mut self) -> Result<()> {
        if let Some(status) = self.ended()? {
            bail!(
                "{} ended: {status}; {}:\n{}",
                self.name,
                self.log.display(),
                tail(&self.log, 15)
            );
        }
        Ok(())
    }

    /// Waits until `condition` holds, but no longer than it runs; the error shows the end of its log.
    pub fn until(
        &mut self,
        what: &str,
        limit: Duration,
        mut condition: impl FnMut(&Self) -> Result<bool>,
    ) -> Result<()> {
        let outcome = wait::until_true(what, limit, || {
            Ok(self.ended()?.is_some() || condition(self)?)
        });
        explained(outcome, &self.log)?;
        self.check_alive()
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            interrupt::check()?;
            if start.elapsed() > limit {
                bail!("{} did not end in {limit:?}", self.name);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends `signal` and waits for its end.
    pub fn stop(&mut self, signal: Signal, limit: Duration) -> Result<ExitStatus> {
        self.signal(signal)?;
        self.wait(limit)
    }

    /// Lets it run on after this program.
    pub fn leave_running(mut self) {
        self.child = None;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Adds the end of a log to an error, unless someone asked to stop: then there is nothing to explain.
fn explained<T>(outcome: Result<T>, log: &Path) -> Result<T> {
    outcome.map_err(|error| {
        if interrupt::interrupted() {
            return error;
        }
        anyhow::anyhow!("{error:#}; {}:\n{}", log.display(), tail(log, 15))
    })
}

/// The last lines of a file, for error messages.
#[must_use]
pub fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// The start time of a process in clock ticks since boot (field 22 of `/proc/PID/stat`): with the pid it
/// names a process for good.
#[must_use]
pub fn start_time(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may itself hold spaces and parentheses.
    let (_, rest) = text.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

/// Ticks of `/proc/PID/stat` per second: USER_HZ, which is the same on every architecture that this runs on.
const TICKS_PER_SECOND: u64 = 100;

/// Processor time that a process has used, of user and system (fields 14 and 15 of `/proc/PID/stat`).
#[must_use]
pub fn cpu_time(pid: i32) -> Option<Duration> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(Duration::from_millis(
        (user + system) * 1000 / TICKS_PER_SECOND,
    ))
}

/// Resident memory of a process in bytes.
#[must_use]
pub fn resident_bytes(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// Truncates or creates a log, so that an old run's lines are not taken for a new one's.
pub fn fresh_log(path: &Path) -> Result<()> {
    File::create(path).with_context(|| path.display().to_string())?;
    Ok(())
}
