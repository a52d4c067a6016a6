//! Taking away what enrolment laid, by this agent or by a former one.

use super::{EnrolError, KINDS, Tools, on_kernel};
use crate::capture::kernel::{Family, ListenerSlot};
use crate::capture::netns::Netns;
use crate::capture::network::Network;
use crate::capture::sysctl;

/// Takes away whatever was laid in a namespace, by whomever, at once.
pub(in crate::capture) async fn unlay(tools: &Tools, netns: &Netns) -> Result<(), EnrolError> {
    let cookie = netns.cookie();
    let cleared = on_kernel(&tools.kernel, move |kernel| kernel.remove_pod(cookie)).await;
    let unlaid = unlay_network(tools, netns).await;
    cleared.and(forget(tools, cookie).await)?;
    unlaid
}

/// Takes away what the kernel holds for a pod whose namespace cannot be entered any more.
pub(in crate::capture) async fn forget(tools: &Tools, cookie: u64) -> Result<(), EnrolError> {
    let done = on_kernel(&tools.kernel, move |kernel| {
        let cleared = kernel.remove_pod(cookie);
        cleared.and(kernel.detach_lookup(cookie))
    })
    .await;
    done.and(remove_listeners(tools, cookie).await)
}

/// Rules, routes and settings; the note of the former ones last.
pub(super) async fn unlay_network(tools: &Tools, netns: &Netns) -> Result<(), EnrolError> {
    let network = Network::open(netns, &tools.worker).await?;
    network.remove().await?;
    if let Some(former) = network.note().await? {
        tools
            .worker
            .run(netns, move || sysctl::restore(former))
            .await??;
        network.remove_note().await?;
    }
    Ok(())
}

/// Empties the slots of a pod's listeners.
pub(super) async fn remove_listeners(tools: &Tools, netns_cookie: u64) -> Result<(), EnrolError> {
    on_kernel(&tools.kernel, move |kernel| {
        for family in [Family::V4, Family::V6] {
            for kind in KINDS {
                kernel.remove_listener(ListenerSlot {
                    netns_cookie,
                    family,
                    kind,
                })?;
            }
        }
        Ok(())
    })
    .await
}
