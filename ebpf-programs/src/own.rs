//! connect(2) of the agent's own sockets: the options that they need before their SYN. To set them here costs a
//! fraction of a system call for each.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{SO_KEEPALIVE, SOL_SOCKET},
    programs::SockAddrContext,
};
use undermesh_common::{IPPROTO_TCP, Intent, LOOPBACK_INTERFACE, keepalive};

use crate::mark::{self, Refused};

/// Options of TCP: include/uapi/linux/tcp.h.
const TCP_NODELAY: u32 = 1;
const TCP_KEEPIDLE: u32 = 4;
const TCP_KEEPINTVL: u32 = 5;
const TCP_KEEPCNT: u32 = 6;
/// Of include/uapi/asm-generic/socket.h.
const SO_BINDTOIFINDEX: u32 = 62;

/// Gives the hook's socket what its intent asks for. What the agent has set itself stays, its own bits of the
/// mark too. `is_from_pod` tells whether the socket is bound to an address of its pod.
#[inline(always)]
pub fn prepare(
    ctx: &SockAddrContext,
    intent: Intent,
    is_from_pod: impl FnOnce() -> bool,
) -> Result<(), Refused> {
    let set = |level, option, mut value| mark::set(ctx.as_ptr(), level, option, &mut value);
    // Whatever is sent was waited for by somebody.
    set(IPPROTO_TCP, TCP_NODELAY, 1)?;
    match intent {
        // The kernel of this machine tells the one end when the other is gone.
        Intent::Delivery => {
            mark::set_bit(ctx.as_ptr(), true)?;
            // Without it the SYN may loop; with it, when the client is the pod itself, the SYN-ACK never matches.
            if is_from_pod() {
                return Ok(());
            }
            set(SOL_SOCKET, SO_BINDTOIFINDEX, LOOPBACK_INTERFACE)
        }
        Intent::Own | Intent::Admitted => {
            set(SOL_SOCKET, SO_KEEPALIVE, 1)?;
            set(IPPROTO_TCP, TCP_KEEPIDLE, keepalive::IDLE_SECONDS)?;
            set(IPPROTO_TCP, TCP_KEEPINTVL, keepalive::INTERVAL_SECONDS)?;
            set(IPPROTO_TCP, TCP_KEEPCNT, keepalive::RETRIES)
        }
    }
}
