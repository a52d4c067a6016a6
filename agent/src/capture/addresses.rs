//! Follows the node's own addresses, by which native connections to the node are known as such.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use nix::ifaddrs::getifaddrs;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::enrol::on_kernel;
use super::kernel::Kernel;
use crate::telemetry::error_chain;

/// How often it is looked. A connection to an address that is newer counts in the class of its
/// range.
const LOOK: Duration = Duration::from_secs(30);
/// kube-proxy's device for IPVS has every Service's address, which is not the node's.
const NOT_THE_NODES: &str = "kube-ipvs0";

/// Looks until told to stop.
pub(super) async fn follow(kernel: Arc<Kernel>, stop: CancellationToken) {
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        let addresses = match own() {
            Ok(addresses) => addresses,
            Err(error) => {
                tracing::warn!(%error, "cannot read the node's addresses");
                continue;
            }
        };
        let told = on_kernel(&kernel, move |kernel| kernel.set_node_addresses(&addresses)).await;
        if let Err(error) = told {
            let error = error_chain(&error);
            tracing::warn!(error, "cannot tell the kernel the node's addresses");
        }
    }
}

/// Addresses of this network namespace, which is the node's, without those of every namespace.
fn own() -> io::Result<BTreeSet<IpAddr>> {
    let addresses = getifaddrs()?
        .filter(|interface| interface.interface_name != NOT_THE_NODES)
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
        })
        .filter(|address| !address.is_loopback());
    Ok(addresses.collect())
}
