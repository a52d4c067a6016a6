//! Does a pod forward what others send? Neither the connect hook nor the pod's own addresses are
//! theirs, so nothing of it is enforced: of nested containers, virtual machines behind masquerade,
//! VPNs.
//!
//! That forwarding is switched on says little: every pod inherits it from its node (IPv4 settings of
//! a new namespace are those of the first, `net.core.devconf_inherit_init_net`). With it there must
//! be somewhere to forward to or from: another device than the pod's own, or rules that translate
//! addresses, with which one device is enough.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

use super::enrol::EnrolError;
use super::netns::{Netns, NetnsWorker};
use super::network::{Device, Network};
use crate::mesh::Mode;

mod nat;

/// What says that a pod may forward.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Forwards {
    /// Another device is up.
    Device(String),
    /// Addresses are translated, by whom the kernel names.
    Translation(&'static str),
    /// The kernel did not say, for this reason. It is asked again at every verification.
    Unknown(String),
}

impl Forwards {
    /// Whether a pod of this mode has no place in the mesh. One of which nobody can tell has: out of
    /// it, STRICT would not hold for its own connections either.
    pub(super) fn refuses(&self, mode: Mode) -> bool {
        match self {
            Self::Device(_) | Self::Translation(_) => mode == Mode::Strict,
            Self::Unknown(_) => false,
        }
    }
}

impl fmt::Display for Forwards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(name) => write!(f, "IP forwarding is on, and device {name} is up"),
            Self::Translation(by) => {
                write!(f, "IP forwarding is on, and {by} translates addresses")
            }
            Self::Unknown(error) => write!(f, "whether it forwards is not known: {error}"),
        }
    }
}

/// Looks in a pod's namespace; `own` are the indices of the devices with the pod's addresses.
pub(super) async fn look(
    netns: &Netns,
    worker: &NetnsWorker,
    network: &Network,
    own: &BTreeSet<u32>,
) -> Result<Option<Forwards>, EnrolError> {
    match worker.run(netns, is_on).await? {
        Ok(true) => {}
        Ok(false) => return Ok(None),
        Err(error) => return Ok(Some(Forwards::Unknown(error.to_string()))),
    }
    if let Some(device) = another(network.all_devices().await?, own) {
        return Ok(Some(Forwards::Device(device.name)));
    }
    Ok(match worker.run(netns, nat::translator).await? {
        Ok(by) => by.map(Forwards::Translation),
        Err(error) => Some(Forwards::Unknown(error.to_string())),
    })
}

/// One that is down forwards nothing: the kernel itself makes such in every namespace (`sit0`, …).
fn another(devices: Vec<Device>, own: &BTreeSet<u32>) -> Option<Device> {
    devices
        .into_iter()
        .find(|device| device.is_up && !device.is_loopback && !own.contains(&device.index))
}

/// Whether any device takes packets to be forwarded. To be called in the pod's namespace.
fn is_on() -> io::Result<bool> {
    for version in ["ipv4", "ipv6"] {
        if is_on_below(&Path::new("/proc/sys/net").join(version).join("conf"))? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The settings of one version of IP, which the kernel may not have; nor need a device be there any
/// more that was a moment ago.
fn is_on_below(devices: &Path) -> io::Result<bool> {
    let Some(devices) = there(fs::read_dir(devices))? else {
        return Ok(false);
    };
    for device in devices {
        let setting = there(fs::read_to_string(device?.path().join("forwarding")))?;
        if setting.is_some_and(|text| text.trim() != "0") {
            return Ok(true);
        }
    }
    Ok(false)
}

fn there<T>(read: io::Result<T>) -> io::Result<Option<T>> {
    match read {
        Ok(read) => Ok(Some(read)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(index: u32, name: &str) -> Device {
        Device {
            index,
            name: name.to_owned(),
            is_up: true,
            is_loopback: index == 1,
        }
    }

    #[test]
    fn only_a_device_that_is_up_and_not_the_pods_own_is_another() {
        let own = BTreeSet::from([2]);
        let down = Device {
            is_up: false,
            ..device(3, "sit0")
        };
        let alone = vec![device(1, "lo"), device(2, "eth0"), down];
        assert_eq!(another(alone.clone(), &own), None);
        let more = alone.into_iter().chain([device(4, "docker0")]).collect();
        assert_eq!(another(more, &own).unwrap().name, "docker0");
    }

    #[test]
    fn what_cannot_be_read_is_not_taken_for_off() {
        let dir = tempfile::tempdir().unwrap();
        let conf = dir.path().join("conf");
        assert!(!is_on_below(&conf).unwrap(), "a kernel without it");
        let setting = |device: &str| {
            fs::create_dir_all(conf.join(device)).unwrap();
            conf.join(device).join("forwarding")
        };
        fs::write(setting("all"), "0\n").unwrap();
        setting("gone");
        assert!(!is_on_below(&conf).unwrap());
        // Even root cannot read a directory as a file.
        let unreadable = setting("eth0");
        fs::create_dir(&unreadable).unwrap();
        assert!(is_on_below(&conf).is_err());
        fs::remove_dir(&unreadable).unwrap();
        fs::write(&unreadable, "1\n").unwrap();
        assert!(is_on_below(&conf).unwrap());
    }

    #[test]
    fn a_strict_pod_is_refused_for_what_is_known_of_it_only() {
        let unknown = Forwards::Unknown("EPERM".to_owned());
        for forwards in [Forwards::Device("x".to_owned()), Forwards::Translation("x")] {
            assert!(forwards.refuses(Mode::Strict));
            assert!(!forwards.refuses(Mode::Permissive));
        }
        assert!(!unknown.refuses(Mode::Strict));
        assert_eq!(
            unknown.to_string(),
            "whether it forwards is not known: EPERM"
        );
    }
}
