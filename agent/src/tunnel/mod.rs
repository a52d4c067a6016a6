//! HBONE: HTTP/2 CONNECT over mutual TLS 1.3, as Istio's ztunnel speaks it.
//!
//! One tunnel carries many connections between one local pod and one remote pod. [`Pool`] opens
//! and keeps tunnels, [`serve`] answers them, and both sides hand a connection on as
//! [`TunnelSend`] and [`TunnelReceive`].
//!
//! Three promises hold everywhere here:
//! - An end is orderly only if END_STREAM was seen. Whatever else ends a stream is a
//!   [`StreamReset`].
//! - A stream that nobody reads holds no more than its window, and no window but its own.
//! - The peer's identity comes from its certificate, never from a header.

mod client;
mod error;
mod headers;
mod io;
mod limits;
mod liveness;
mod peer;
mod pool;
mod room;
mod server;
mod status;
mod stream;
mod tls;

pub use error::{Refusal, ResetBy, ResetReason, Stage, StreamReset, TunnelError};
pub use headers::{ConnectRequest, Forwarded};
pub use io::TunnelIo;
pub use limits::{Limits, MAX_CHUNK};
pub use liveness::Transport;
pub use pool::{Pool, PoolOptions, TunnelKey, Tunnelled};
pub use room::{Room, set_short_of_memory};
pub use server::{HBONE_PORT, Incoming, Side, TunnelService, serve, serve_with};
pub use status::TunnelStatus;
pub use stream::{TunnelReceive, TunnelSend};
pub use tls::free_buffers;

#[cfg(test)]
mod tests;
