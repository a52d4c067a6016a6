//! HTTP/1.1 and HTTP/2 as a proxy speaks them: one downstream connection ([`serve_http`]), the
//! upstream connections of a node ([`UpstreamPool`]), and what passes between them.
//!
//! hyper and h2 parse; this folder guards, forwards and pools. Three promises hold everywhere:
//! - A body that breaks off upstream never looks whole downstream: the client sees a RST (or
//!   RST_STREAM), never a FIN (or END_STREAM), and the other way round.
//! - A slow reader stalls its sender, through every hop: nothing here buffers a body beyond one
//!   window, and what a retry keeps is bounded.
//! - What two parsers could understand differently is refused with 400 and counted.

mod body;
mod care;
mod client;
mod counters;
mod detect;
mod framing;
mod guard;
mod h1;
mod h2;
mod headers;
mod io;
mod places;
mod pool;
mod refused;
mod replay;
mod respond;
mod server;
mod upgrade;
mod upstreams;
mod watch;

pub use body::{BodyEnd, BodyError, BodyWatch, ProxyBody};
pub use client::{Lease, NeverSent, SendError, Unanswered, UpstreamBody};
pub use counters::HttpCounters;
pub use detect::{Hint, Protocol, SNIFF_BYTES, Sniff, detect, detect_tunnel, hint, sniff};
pub use framing::{Framing, Violation};
pub use guard::{BadRequest, check_authority};
pub use headers::{ClientView, RequestId, Side, to_downstream, to_upstream};
pub use io::HttpIo;
pub use places::{Crowded, Place, PlaceCounts, Places};
pub use pool::{PoolCounters, PoolLimits, PoolStatus, Terms, UpstreamKey, UpstreamPool, Way};
pub use refused::request_info;
pub use replay::{Replay, ReplayBody};
pub use respond::{Dialect, REASON, is_grpc, own_response, own_response_in};
pub use server::{ResetNow, Served, ServedEnd, ServerContext, ServerLimits, Wire, serve_http};
pub use upstreams::{Connected, Held, Upstreams};

#[cfg(test)]
mod tests;
