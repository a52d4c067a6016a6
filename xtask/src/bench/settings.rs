//! Settings of this machine that a measurement needs, as they were again afterwards.

use std::fs;
use std::io::ErrorKind;

use anyhow::{Context, Result};

/// Congestion control of the pods. The same everywhere, and the kernel's own default.
pub const CUBIC: &str = "cubic";
const ALLOWED: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";
const AUTOGROUP: &str = "/proc/sys/kernel/sched_autogroup_enabled";

/// While it lives, the machine is set for measuring.
#[must_use]
pub struct Settings {
    _changed: Vec<Changed>,
}

impl Settings {
    /// Lets namespaces use cubic, and has the scheduler weigh every thread for itself: with automatic groups
    /// (`CONFIG_SCHED_AUTOGROUP`, sched(7)) each session weighs as much as any other, so a spinner of the idle
    /// class takes half of a processor away from what is measured, or all of it for seconds. Groups are joined
    /// at fork, so this comes before all that is measured.
    pub fn take() -> Result<Self> {
        let mut changed = Vec::new();
        let allowed = read(ALLOWED)?;
        if !allowed.split_whitespace().any(|one| one == CUBIC) {
            changed.push(Changed::to(
                ALLOWED,
                allowed.clone(),
                &format!("{allowed} {CUBIC}"),
            )?);
        }
        match fs::read_to_string(AUTOGROUP) {
            Ok(value) if value.trim() != "0" => {
                changed.push(Changed::to(AUTOGROUP, value.trim().to_owned(), "0")?);
            }
            Ok(_) => {}
            // A kernel without them.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).context(AUTOGROUP),
        }
        Ok(Self { _changed: changed })
    }
}

struct Changed {
    path: &'static str,
    former: String,
}

impl Changed {
    fn to(path: &'static str, former: String, value: &str) -> Result<Self> {
        fs::write(path, value).context(path)?;
        Ok(Self { path, former })
    }
}

impl Drop for Changed {
    fn drop(&mut self) {
        if let Err(error) = fs::write(self.path, &self.former) {
            eprintln!("{} was {:?}: {error}", self.path, self.former);
        }
    }
}

fn read(path: &'static str) -> Result<String> {
    let text = fs::read_to_string(path).context(path)?;
    Ok(text.trim().to_owned())
}
