//! What goes over a link, captured into a pcap file and searched.

use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use memchr::memmem;
use nix::sys::signal::Signal;

use crate::machine;
use crate::process::{Place, Process};

const START: Duration = Duration::from_secs(10);
/// Written by tcpdump -B, in KiB: enough for bursts while the disk is busy.
const BUFFER_KIB: &str = "65536";
const LONGEST_PACKET: u32 = 262_144;

/// A tcpdump that runs.
#[derive(Debug)]
pub struct Capture {
    process: Process,
    file: PathBuf,
}

/// What a capture held.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Packets {
    /// Packets.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Packets with a marker in them, for each marker that was asked for.
    pub marker_hits: Vec<u64>,
    /// Packets that the kernel could not give to tcpdump in time.
    pub dropped: u64,
}

impl Capture {
    /// Captures on `interface` of `place` until stopped.
    pub fn start(place: &Place, interface: &str, name: &str) -> Result<Self> {
        machine::require(&[machine::TCPDUMP])?;
        let file = place.dir.join(format!("{name}.pcap"));
        let path = file.display().to_string();
        let args = [
            "-i",
            interface,
            "-w",
            &path,
            "-s",
            "0",
            "-B",
            BUFFER_KIB,
            "-U",
            "-n",
            "-Z",
            "root",
            // Else SIGINT throws away what waits in the kernel's buffer.
            "--immediate-mode",
        ];
        let mut process = place.spawn(name, "tcpdump", &args)?;
        process.until("tcpdump to listen", START, |tcpdump| {
            Ok(tcpdump.output().contains("listening on"))
        })?;
        Ok(Self { process, file })
    }

    /// The pcap file.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Ends the capture and looks for `markers` in every packet.
    pub fn stop(mut self, markers: &[&str]) -> Result<Packets> {
        self.catch_up();
        // SIGINT makes tcpdump write what it holds, and say what it lost.
        self.process.stop(Signal::SIGINT, START)?;
        let mut packets = search(&self.file, markers)?;
        packets.dropped =
            dropped(&self.process.output()).context("tcpdump said not what it lost")?;
        Ok(packets)
    }
}

impl Capture {
    /// Waits until the file grows no more: all that was sent before is in it then. With traffic that does not
    /// end there is no such moment.
    fn catch_up(&self) {
        let length = || std::fs::metadata(&self.file).map_or(0, |file| file.len());
        for _ in 0..20 {
            let before = length();
            std::thread::sleep(Duration::from_millis(100));
            if length() == before {
                return;
            }
        }
    }
}

fn dropped(output: &str) -> Option<u64> {
    let line = output
        .lines()
        .find(|line| line.contains("dropped by kernel"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// pcap-savefile(5), as written on this machine: a header of 24 bytes, then records of 16 bytes and a packet.
fn search(file: &Path, markers: &[&str]) -> Result<Packets> {
    let empty = markers.iter().any(|marker| marker.is_empty());
    ensure!(!empty, "an empty marker is everywhere");
    let mut reader = BufReader::with_capacity(
        1 << 20,
        File::open(file).with_context(|| file.display().to_string())?,
    );
    let mut header = [0; 24];
    reader.read_exact(&mut header)?;
    let magic = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]);
    if !matches!(magic, 0xa1b2_c3d4 | 0xa1b2_3c4d) {
        bail!("{}: no pcap file", file.display());
    }
    let finders: Vec<_> = markers.iter().map(memmem::Finder::new).collect();
    let mut found = Packets {
        marker_hits: vec![0; markers.len()],
        ..Packets::default()
    };
    let mut packet = Vec::new();
    loop {
        let mut record = [0; 16];
        match reader.read_exact(&mut record) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(found),
            Err(error) => return Err(error.into()),
        }
        let length = u32::from_ne_bytes([record[8], record[9], record[10], record[11]]);
        ensure!(length <= LONGEST_PACKET, "a packet of {length} bytes");
        packet.resize(usize::try_from(length)?, 0);
        reader.read_exact(&mut packet)?;
        found.packets += 1;
        found.bytes += u64::from(length);
        for (hits, finder) in found.marker_hits.iter_mut().zip(&finders) {
            *hits += u64::from(finder.find(&packet).is_some());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_with_the_marker_are_counted() {
        let mut bytes = 0xa1b2_c3d4_u32.to_ne_bytes().to_vec();
        bytes.resize(24, 0);
        for packet in [&b"nothing"[..], b"a needle, a needle", b"need", b"le"] {
            let length = u32::try_from(packet.len()).unwrap().to_ne_bytes();
            bytes.extend([[0; 4], [0; 4], length, length].concat());
            bytes.extend(packet);
        }
        let file = std::env::temp_dir().join(format!("lab-{}.pcap", std::process::id()));
        std::fs::write(&file, bytes).unwrap();
        let found = search(&file, &["needle", "hay"]).unwrap();
        std::fs::remove_file(&file).unwrap();
        assert_eq!((found.packets, found.bytes), (4, 31));
        assert_eq!(found.marker_hits, [1, 0]);
        assert_eq!(
            dropped("3 packets captured\n7 packets dropped by kernel\n"),
            Some(7)
        );
    }
}
