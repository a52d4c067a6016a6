//! Verdicts in the agent's log: in debug builds, and nothing in a release.

use aya_ebpf::EbpfContext;
use undermesh_common::{Address, Verdict};

/// Says what was decided about a connection of the pod with this cookie, from or to this address.
/// The number is that of [`Verdict`].
#[inline(always)]
#[cfg_attr(not(feature = "log"), expect(unused_variables))]
pub fn decided(ctx: &impl EbpfContext, netns_cookie: u64, address: &Address, verdict: Verdict) {
    #[cfg(feature = "log")]
    aya_log_ebpf::debug!(
        ctx,
        "netns {}: {:i} verdict {}",
        netns_cookie,
        address.octets(),
        verdict as u32
    );
}
