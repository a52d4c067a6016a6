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

use super::enrol::EnrolError;
use super::netns::{Netns, NetnsWorker};
use super::network::{Device, Network};

mod nat;

/// What says that a pod may forward.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Forwards {
    /// Another device is up.
    Device(String),
    /// Addresses are translated, by whom the kernel names.
    Translation(&'static str),
}

impl fmt::Display for Forwards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IP forwarding is on, and ")?;
        match self {
            Self::Device(name) => write!(f, "device {name} is up"),
            Self::Translation(by) => write!(f, "{by} translates addresses"),
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
    if !worker.run(netns, is_on).await? {
        return Ok(None);
    }
    if let Some(device) = another(network.all_devices().await?, own) {
        return Ok(Some(Forwards::Device(device.name)));
    }
    Ok(worker
        .run(netns, nat::translator)
        .await?
        .map(Forwards::Translation))
}

/// One that is down forwards nothing: the kernel itself makes such in every namespace (`sit0`, …).
fn another(devices: Vec<Device>, own: &BTreeSet<u32>) -> Option<Device> {
    devices
        .into_iter()
        .find(|device| device.is_up && !device.is_loopback && !own.contains(&device.index))
}

/// Whether any device takes packets to be forwarded. To be called in the pod's namespace.
fn is_on() -> bool {
    ["ipv4", "ipv6"].into_iter().any(|version| {
        let devices = fs::read_dir(format!("/proc/sys/net/{version}/conf"));
        devices.into_iter().flatten().flatten().any(|device| {
            let setting = fs::read_to_string(device.path().join("forwarding"));
            setting.is_ok_and(|text| text.trim() != "0")
        })
    })
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
}
