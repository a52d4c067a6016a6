//! The node-local HTTP endpoint.
//!
//! Three listeners: the admin endpoint on the node's loopback, metrics, and readiness. What they
//! show comes from closures in [`AdminState`], so that nothing here knows the parts that it shows.
//!
//! What changes something comes by the [`Control`] socket, which is root's.
//!
//! The admin endpoint tells who talks to whom on this node. It is therefore bound to loopback unless
//! the operator asks for more, answers GET only, changes nothing, and refuses a `Host` that is a
//! name other than `localhost`: a browser on the node that was led here by DNS rebinding bears the
//! attacker's name there.

pub mod breakers;
mod control;
mod host;
mod listener;
mod negotiate;
pub mod policies;
mod routes;
mod server;
mod state;
mod table;

pub use control::{Control, ControlError, FORCE_PATH, ForceAnswer, ForceRequest, ForceTo};
pub use server::{Addresses, Admin, AdminError, AdminListeners, AdminOptions, Exposure, serve};
pub use state::{AdminState, Column, Condition};
