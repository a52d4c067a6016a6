//! What an operator wants to know about the process: the names are those that Prometheus clients
//! share.

use std::fmt;
use std::fs;
use std::time::{Duration, SystemTime};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

/// Clock ticks of /proc/self/stat: 100 in a second on every architecture that Linux has today
/// (USER_HZ is part of its ABI and does not follow CONFIG_HZ).
const TICKS_PER_SECOND: f64 = 100.0;

/// Resources of this process, read from /proc when metrics are scraped. What cannot be read is left
/// out.
#[derive(Debug)]
pub(super) struct Process {
    pub started: SystemTime,
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let gauges = [
            (
                "process_resident_memory_bytes",
                "Resident memory",
                kilobytes(&status, "VmRSS:"),
            ),
            (
                "process_virtual_memory_bytes",
                "Virtual memory",
                kilobytes(&status, "VmSize:"),
            ),
            (
                "process_threads",
                "Threads",
                number_after(&status, "Threads:"),
            ),
            (
                "process_open_fds",
                "Open file descriptors",
                open_descriptors(),
            ),
            (
                "process_max_fds",
                "Limit of open file descriptors",
                descriptor_limit(),
            ),
            (
                "process_start_time_seconds",
                "When the process started, in seconds since the epoch",
                self.started
                    .duration_since(SystemTime::UNIX_EPOCH)
                    .ok()
                    .map(|since| since.as_secs_f64()),
            ),
        ];
        for (name, help, value) in gauges {
            if let Some(value) = value {
                encoder
                    .encode_descriptor(name, help, None, MetricType::Gauge)?
                    .encode_gauge(&value)?;
            }
        }
        if let Some(time) = cpu_time() {
            encoder
                .encode_descriptor(
                    "process_cpu_seconds",
                    "CPU time in user and system mode",
                    None,
                    MetricType::Counter,
                )?
                .encode_counter::<NoLabelSet, _, u64>(&time.as_secs_f64(), None)?;
        }
        Ok(())
    }
}

fn number_after(text: &str, name: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

fn kilobytes(status: &str, name: &str) -> Option<f64> {
    number_after(status, name).map(|kilobytes| kilobytes * 1_024.0)
}

fn open_descriptors() -> Option<f64> {
    let count = u32::try_from(fs::read_dir("/proc/self/fd").ok()?.count()).ok()?;
    // One of them reads the directory.
    Some(f64::from(count.saturating_sub(1)))
}

fn descriptor_limit() -> Option<f64> {
    number_after(
        &fs::read_to_string("/proc/self/limits").ok()?,
        "Max open files",
    )
}

fn cpu_time() -> Option<Duration> {
    cpu_time_of(&fs::read_to_string("/proc/self/stat").ok()?)
}

/// User and system time out of /proc/<pid>/stat (proc(5), fields 14 and 15). The name of the
/// program stands in parentheses and may hold anything, so the fields are counted from behind it.
fn cpu_time_of(stat: &str) -> Option<Duration> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Duration::try_from_secs_f64((user + system) / TICKS_PER_SECOND).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_whatever_the_program_is_called() {
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 4 0 12345 1 2 3";
        assert_eq!(cpu_time_of(stat), Some(Duration::from_secs(3)));
    }

    #[test]
    fn the_running_process_has_memory_and_descriptors() {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        assert!(kilobytes(&status, "VmRSS:").unwrap() > 0.0);
        assert!(open_descriptors().unwrap() >= 3.0);
        assert!(descriptor_limit().unwrap() > 0.0);
        assert!(cpu_time().is_some());
    }
}
