//! Desired destinations against those that the kernel holds: the least change.

use std::collections::BTreeSet;
use std::net::IpAddr;

use undermesh_common::{Target, bounds};

use super::{KernelError, maps::Table};
use crate::mesh::CaptureTarget;

/// In the kernel's form: port 0 is every port.
pub(super) fn to_kernel(target: &CaptureTarget) -> Target {
    Target {
        address: target.address.into(),
        port: target.port.map_or(0, u32::from),
    }
}

/// What the kernel holds now.
pub(super) fn read(table: &Table<Target, u32>) -> Result<BTreeSet<CaptureTarget>, KernelError> {
    let keys = table.keys()?;
    Ok(keys
        .into_iter()
        .map(|key| CaptureTarget {
            address: IpAddr::from(key.address),
            port: u16::try_from(key.port).ok().filter(|port| *port != 0),
        })
        .collect())
}

/// Brings the kernel from `now` to `wanted`: adds, then removes, so that no destination is missing
/// meanwhile. Only where both together exceed the bound does it remove first. `now` is what the
/// kernel holds at every moment, also after an error.
pub(super) fn change(
    table: &Table<Target, u32>,
    now: &mut BTreeSet<CaptureTarget>,
    wanted: &BTreeSet<CaptureTarget>,
) -> Result<(), KernelError> {
    let bound = bounds::TARGETS as usize;
    if wanted.len() > bound {
        return Err(KernelError::Full {
            map: table.name(),
            bound: bounds::TARGETS,
        });
    }
    let gone: Vec<_> = now.difference(wanted).copied().collect();
    let new: Vec<_> = wanted.difference(now).copied().collect();
    let fits = now.len() + new.len() <= bound;
    if !fits {
        remove(table, now, &gone)?;
    }
    for target in new {
        table.put(&to_kernel(&target), &1)?;
        now.insert(target);
    }
    if fits {
        remove(table, now, &gone)?;
    }
    Ok(())
}

fn remove(
    table: &Table<Target, u32>,
    now: &mut BTreeSet<CaptureTarget>,
    gone: &[CaptureTarget],
) -> Result<(), KernelError> {
    for target in gone {
        table.remove(&to_kernel(target))?;
        now.remove(target);
    }
    Ok(())
}
