//! Kernel settings of a pod's network namespace that capture needs, and what they were before.
//!
//! `/proc/sys/net` shows the namespace of the thread that reads it: everything here runs on the
//! thread that entered the pod's.

use std::fs;
use std::io;
use std::ops::RangeInclusive;

use thiserror::Error;

/// Why a setting could not be read or written.
#[derive(Debug, Error)]
#[error("kernel setting {name}")]
pub struct SysctlError {
    /// Path below `/proc/sys`.
    pub name: &'static str,
    /// What the kernel said.
    pub source: io::Error,
}

/// A setting that capture needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setting {
    /// Path below `/proc/sys`.
    pub name: &'static str,
    /// What capture needs.
    pub wanted: u8,
    /// Bits that its values take in a [`Former`] note.
    bits: u32,
}

/// In the order in which a [`Former`] note holds them: append only.
pub const SETTINGS: [Setting; 4] = [
    // Accepted sockets take the mark of their SYN: replies to a captured or delivered connection
    // stay on lo, and the agent tells captured connections from others by it.
    Setting {
        name: "net/ipv4/tcp_fwmark_accept",
        wanted: 1,
        bits: 1,
    },
    // The RST of an app that refuses a delivery finds its way back over lo.
    Setting {
        name: "net/ipv4/fwmark_reflect",
        wanted: 1,
        bits: 1,
    },
    Setting {
        name: "net/ipv6/fwmark_reflect",
        wanted: 1,
        bits: 1,
    },
    // Captured connections go over lo; without it, those that the client closed hold their port
    // for a minute. 2 means "on loopback only".
    Setting {
        name: "net/ipv4/tcp_tw_reuse",
        wanted: 1,
        bits: 2,
    },
];

/// The settings' values before enrolment, small enough to be kept in the namespace itself (see
/// `network`), so that they outlive the agent and die with the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Former([Option<u8>; SETTINGS.len()]);

impl Former {
    /// Packs the values into a number that is never 0.
    #[must_use]
    pub fn to_note(self) -> u32 {
        let mut note = 1;
        for (setting, value) in SETTINGS.iter().zip(self.0) {
            note = (note << 1) | u32::from(value.is_some());
            note = (note << setting.bits) | u32::from(value.unwrap_or(0));
        }
        note
    }

    /// The values that a number holds, none if it was not made by [`Former::to_note`].
    #[must_use]
    pub fn from_note(mut note: u32) -> Option<Self> {
        let mut values = [None; SETTINGS.len()];
        for (setting, value) in SETTINGS.iter().zip(&mut values).rev() {
            let read = note & ((1 << setting.bits) - 1);
            note >>= setting.bits;
            if note & 1 == 1 {
                *value = u8::try_from(read).ok();
            }
            note >>= 1;
        }
        (note == 1).then_some(Self(values))
    }
}

/// Reads the values as they are now. A setting that this kernel does not have is none.
pub fn read() -> Result<Former, SysctlError> {
    let mut values = [None; SETTINGS.len()];
    for (setting, value) in SETTINGS.iter().zip(&mut values) {
        *value = get(setting)?;
    }
    Ok(Former(values))
}

/// Writes what capture needs. Returns how many had another value.
pub fn set() -> Result<usize, SysctlError> {
    let mut changed = 0;
    for setting in &SETTINGS {
        match get(setting)? {
            Some(value) if value != setting.wanted => {
                put(setting, setting.wanted)?;
                changed += 1;
            }
            Some(_) | None => {}
        }
    }
    Ok(changed)
}

/// Puts the former values back, except where somebody has changed ours meanwhile.
pub fn restore(former: Former) -> Result<(), SysctlError> {
    for (setting, value) in SETTINGS.iter().zip(former.0) {
        if let Some(value) = value
            && get(setting)? == Some(setting.wanted)
        {
            put(setting, value)?;
        }
    }
    Ok(())
}

/// Whether the namespace has IPv6 at all.
#[must_use]
pub fn has_v6() -> bool {
    fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6")
        .is_ok_and(|value| value.trim() == "0")
}

/// The ports that the kernel gives to sockets that name none.
pub fn local_ports() -> Result<RangeInclusive<u16>, SysctlError> {
    const NAME: &str = "net/ipv4/ip_local_port_range";
    let failed = |source| SysctlError { name: NAME, source };
    let text = fs::read_to_string(path(NAME)).map_err(failed)?;
    let mut ports = text.split_whitespace().map(str::parse::<u16>);
    match (ports.next(), ports.next()) {
        (Some(Ok(first)), Some(Ok(last))) if first <= last => Ok(first..=last),
        _ => Err(failed(io::Error::new(io::ErrorKind::InvalidData, text))),
    }
}

fn path(name: &str) -> String {
    format!("/proc/sys/{name}")
}

fn get(setting: &Setting) -> Result<Option<u8>, SysctlError> {
    let failed = |source| SysctlError {
        name: setting.name,
        source,
    };
    match fs::read_to_string(path(setting.name)) {
        Ok(text) => text
            .trim()
            .parse()
            .map(Some)
            .map_err(|_| failed(io::Error::new(io::ErrorKind::InvalidData, text))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

fn put(setting: &Setting, value: u8) -> Result<(), SysctlError> {
    fs::write(path(setting.name), value.to_string()).map_err(|source| SysctlError {
        name: setting.name,
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_note_gives_back_the_values_that_were_put_into_it(
            bits in proptest::array::uniform3(proptest::option::of(0_u8..2)),
            reuse in proptest::option::of(0_u8..4),
        ) {
            let former = Former([bits[0], bits[1], bits[2], reuse]);
            prop_assert_eq!(Former::from_note(former.to_note()), Some(former));
        }
    }

    #[test]
    fn a_number_that_is_no_note_is_not_taken_for_one() {
        assert_eq!(Former::from_note(0), None);
        assert_eq!(Former::from_note(1024), None);
        assert_eq!(Former::from_note(u32::MAX), None);
    }
}
