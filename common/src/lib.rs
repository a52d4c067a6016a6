//! The ABI that the kernel programs and the agent share: keys, values, verdicts, bounds.
//!
//! Everything here is `#[repr(C)]`, without padding that could hold garbage, and `no_std`. The
//! decision of the `sk_lookup` hook is here too ([`Arrival::route`]), so that it is tested without a
//! kernel.
#![cfg_attr(not(test), no_std)]

mod address;
mod keys;
mod layout;
mod lookup;
mod native;
mod pod;
mod verdict;

pub use address::{Address, Family};
pub use keys::{Admission, ListenerKey, ListenerKind, Scope, Target, Tuple};
pub use layout::{LAYOUT, LAYOUT_TAG, bounds};
pub use lookup::{Arrival, Route};
pub use native::{DestinationClass, NativeConnection, NativeKey, NativeTraffic};
pub use pod::{Intent, Mode, Note, Pod, PodConstants, keepalive};
pub use verdict::Verdict;

/// The bit in a socket's mark that sends its packets over `lo` to the agent. One bit, OR-ed in, so
/// that an application's own marks survive. Kubernetes uses 0x4000 and 0x8000, Tailscale 0xff0000;
/// marks do not leave a pod's network namespace, so those of the node's own network do not matter.
/// It never changes: while the programs of one layout replace those of another, both set it.
pub const CAPTURE_MARK: u32 = 1 << 29;

/// Port on which every meshed pod speaks HBONE (as in Istio ambient).
pub const HBONE_PORT: u16 = 15008;

/// IP protocol number of TCP.
pub const IPPROTO_TCP: u32 = 6;

/// Interface index of `lo`, in every network namespace.
pub const LOOPBACK_INTERFACE: u32 = 1;
